"""What the commands share: kinds of arguments, and the packages that one of them needs."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence

from mistral_nb.errors import MissingDependency
from mistral_nb.types import MOST_RANK

__all__ = ["count", "gigabytes", "port", "positive", "rank", "require", "seconds"]


def require(extra: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f'this needs {", ".join(missing)}: pip install "mistral-nb[{extra}]"')


def port(text: str) -> int:
    value = _whole(text)
    if not 0 <= value <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 0 to 65535")
    return value


def count(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: a whole number, 1 or more")
    return value


def rank(text: str) -> int:
    value = _whole(text)
    if not 1 <= value <= MOST_RANK:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rank: a whole number from 1 to {MOST_RANK}")
    return value


def gigabytes(text: str) -> float:
    size = _number(text)
    if not 0.25 <= size <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: gigabytes from 0.25 to 100")
    return size


def seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: seconds, 0 or more")
    return value


def positive(text: str) -> float:
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0: a number")
    return value


def _whole(text: str) -> int:
    """-1 for what is no whole number."""
    return int(text) if text.isascii() and text.isdigit() else -1


def _number(text: str) -> float:
    """NaN, which is within no bounds, for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
