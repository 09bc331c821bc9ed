"""How the kernel bench's figures look: a colour and a mark for each provider, the same in all of them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["OURS", "PARTLY", "STYLE", "Mark", "handle", "logarithmic", "marks"]

STYLE: Mapping[str, Any] = {
    "text.parse_math": False,
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
"""Settings of matplotlib that the figures are drawn under."""
OURS = ("ours", "candidate")
"""Those that stand out."""
PARTLY = "hollow: less work than the op"


@dataclass(frozen=True, slots=True)
class Mark:
    """A provider's colour, its mark, and the dashes of its line; ink: the colour of a number on it."""

    colour: str
    shape: str
    dashes: str = "-"
    ink: str = "black"


# Okabe and Ito's colours but yellow, told apart by all who see colours otherwise, and grey.
_BLUE, _VERMILLION, _BLACK, _ORANGE = "#0072B2", "#D55E00", "#000000", "#E69F00"
_GREEN, _SKY, _PURPLE, _GREY = "#009E73", "#56B4E9", "#CC79A7", "#808080"
_MARKS = {
    "ours": Mark(_BLUE, "o", ink="white"),
    "candidate": Mark(_VERMILLION, "*", ink="white"),
    "eager": Mark(_BLACK, "s", ink="white"),
    "compile": Mark(_PURPLE, "D"),
    "sdpa flash": Mark(_ORANGE, "^"),
    "sdpa cudnn": Mark(_GREEN, "v"),
    "sdpa efficient": Mark(_SKY, "<"),
    "sdpa math": Mark(_GREY, ">", ink="white"),
    "cublas": Mark(_ORANGE, "P"),
    "blas": Mark(_GREY, "P"),
    "torch": Mark(_GREEN, "P"),
    "torch int8": Mark(_GREEN, "X"),
    "torch int4": Mark(_SKY, "d"),
    "liger": Mark(_ORANGE, "h", "--"),
    "flash-attn": Mark(_SKY, "p", "--"),
    "flashinfer": Mark(_PURPLE, "8", "--"),
}
_OTHERS = tuple(Mark(colour, shape, ":") for shape in "HsD" for colour in (_GREY, _GREEN, _ORANGE, _SKY, _PURPLE))


def marks(providers: Iterable[str]) -> dict[str, Mark]:
    """Of each provider, ours and the candidate first; one that nobody knows gets one of its own as far as they go."""
    names = set(providers)
    others = sorted(names.difference(_MARKS))
    known = {name: mark for name, mark in _MARKS.items() if name in names}
    return known | {name: _OTHERS[at % len(_OTHERS)] for at, name in enumerate(others)}


def handle(label: str, **style: Any) -> Any:
    """An entry of a legend."""
    return importlib.import_module("matplotlib.lines").Line2D([], [], label=label, **style)


def logarithmic(side: Any) -> None:
    """Plain numbers on a logarithmic axis whose limits are set, some between the powers of ten where those are few."""
    ticker = importlib.import_module("matplotlib.ticker")
    least, most = side.get_view_interval()
    decades = math.log10(most / least)
    between = (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 3 else (1.0,)
    side.set_major_locator(ticker.LogLocator(subs=between))
    side.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:g}"))
    side.set_minor_formatter(ticker.NullFormatter())
