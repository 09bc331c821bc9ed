"""The figures of a record of the kernel bench as PNG: speed over the size, and each kernel on a roofline."""

from __future__ import annotations

import importlib
import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_nb_kernels.bench.marks import OURS, PARTLY, STYLE, Mark, handle, logarithmic, marks
from mistral_nb_kernels.bench.record import Ceilings, Key, Record, Row
from mistral_nb_kernels.bench.roofline import roofline
from mistral_nb_kernels.bench.table import digits, plain

__all__ = ["Figure", "MissingPlots", "figures"]

_PANELS = 12
"""More of them are a figure for each op."""
_COLUMNS = 5
_SIZES = ("tokens", "rows", "batch")
_DPI = 110


@dataclass(frozen=True, slots=True)
class Figure:
    """name: of its file; alt: what it shows, in words."""

    name: str
    alt: str
    png: bytes


class MissingPlots(Exception):
    """matplotlib is not there; says how to get it."""


@dataclass(frozen=True, slots=True)
class _Panel:
    """The rows of an op that differ in size alone. sizes: by row; what: they count, None where all are the same."""

    op: str
    title: str
    what: str | None
    rows: tuple[Row, ...]
    sizes: Mapping[Key, int]

    def lines(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.provider, []).append(row)
        return found


def figures(record: Record) -> list[Figure]:
    """Speed over the size ("speed"; of a large record one for each op, "speed-" and its name), and the "roofline".

    None of a record without rows. `MissingPlots` where matplotlib is not there.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise MissingPlots('figures need matplotlib: pip install "mistral-nb[plots]"') from error
    with matplotlib.rc_context(STYLE):
        return [*_speeds(record), *_roofline(record)]


def _speeds(record: Record) -> Iterator[Figure]:
    panels = [panel for op in dict.fromkeys(row.op for row in record.rows) for panel in _panels(record, op)]
    if len(panels) <= _PANELS:
        groups = {"speed": panels} if panels else {}
    else:
        ops = list(dict.fromkeys(panel.op for panel in panels))
        groups = {f"speed-{op}": [each for each in panels if each.op == op] for op in ops}
    for name, group in groups.items():
        yield Figure(name, _words(record, group), _png(_speed(record, group)))


def _roofline(record: Record) -> Iterator[Figure]:
    drawn = roofline(record)
    if drawn is not None:
        figure, words = drawn
        yield Figure("roofline", words, _png(figure))


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI, bbox_inches="tight", metadata={"Software": None})
    return file.getvalue()


def _panels(record: Record, op: str) -> Iterator[_Panel]:
    """Of an op one for each type and each shape but for the size and what goes with it."""
    rows = [row for row in record.rows if row.op == op]
    size = _size(rows)
    apart = [
        name for name in dict.fromkeys(name for row in rows for name in row.shape) if not _follows(name, size, rows)
    ]
    typed = len({row.dtype for row in record.rows}) > 1
    groups: dict[str, list[Row]] = {}
    for row in rows:
        rest = {name: row.shape[name] for name in apart if name in row.shape}
        words = [f"{name} {value}" if isinstance(value, int) else value for name, value in rest.items()]
        groups.setdefault(", ".join([*words, *([row.dtype] if typed else [])]), []).append(row)
    for title, group in groups.items():
        sizes = {row.key: _count(row, size) for row in group}
        if len(set(sizes.values())) > 1 and all(sizes.values()):
            yield _Panel(op, f"{op}: {title}" if title else op, size, tuple(group), sizes)
            continue
        for case in dict.fromkeys(row.case for row in group):
            words = [f"{op}: {case}", *([group[0].dtype] if typed else [])]
            yield _Panel(op, ", ".join(words), None, tuple(row for row in group if row.case == case), sizes)


def _size(rows: Sequence[Row]) -> str:
    """The number of the shapes that a sweep of the op runs over: the one of most values."""
    return max(_SIZES, key=lambda name: len({_count(row, name) for row in rows}))


def _count(row: Row, name: str) -> int:
    """0 where the row has no such number."""
    value = row.shape.get(name)
    return value if isinstance(value, int) else 0


def _follows(name: str, size: str, rows: Sequence[Row]) -> bool:
    """Whether a number is the size, or changes with it alone, as that of adapters with that of rows."""
    values = {(row.shape.get(size), row.shape.get(name)) for row in rows}
    different = len({value for _, value in values}) > 1
    number = all(isinstance(value, int) for _, value in values)
    return name == size or (number and different and len({count for count, _ in values}) == len(values))


def _unit(ceilings: Ceilings, rows: Sequence[Row]) -> str:
    """Bytes for an op that memory limits at all of its sizes."""
    counted = all(row.flops for row in rows)
    return "TFLOP/s" if counted and any(ceilings.bound(row) != "memory" for row in rows) else "GB/s"


def _speed_of(row: Row, unit: str, us: float) -> float:
    return row.flops / us / 1e6 if unit == "TFLOP/s" else row.bytes / us / 1e3


def _roof(ceilings: Ceilings, row: Row, unit: str, spec: bool) -> float | None:
    """What the row could reach, by what was measured or by the data sheet."""
    gbs = ceilings.spec_gbs if spec else ceilings.read_gbs
    peak = ceilings.matmul_tflops.get(row.dtype)
    if spec:
        peak = ceilings.spec_tflops if row.dtype in ("bf16", "fp16") else None
    if unit == "GB/s":
        return gbs
    return None if gbs is None or peak is None else min(peak, gbs * row.intensity / 1e3)


def _speed(record: Record, panels: Sequence[_Panel]) -> Any:
    columns = len(panels) if len(panels) < 4 else min(_COLUMNS, math.ceil(len(panels) / 2))
    rows = math.ceil(len(panels) / columns)
    found = marks(row.provider for panel in panels for row in panel.rows)
    bars = max((len(panel.rows) for panel in panels if panel.what is None), default=0)
    least = 1.5 if all(panel.what is None for panel in panels) else 2.5
    width, height = max(6.5, 3.1 * columns), max(least, 0.9 + 0.2 * bars)
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(width, rows * height + 0.8), layout="constrained"
    )
    axes = [axis for line in figure.subplots(rows, columns, squeeze=False) for axis in line]
    for axis, panel in zip(axes, panels, strict=False):
        unit = _unit(record.ceilings, panel.rows)
        (_draw_bars if panel.what is None else _draw_lines)(axis, panel, unit, record.ceilings, found)
        axis.set_title("\n".join(textwrap.wrap(plain(panel.title), 38)))
    for axis in axes[len(panels) :]:
        axis.remove()
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in record.rows))
    figure.suptitle("\n".join(textwrap.wrap(f"{plain(str(record.machine['device']))}, {dtypes}: more is faster", 90)))
    entries = _legend(record.ceilings, panels, found)
    figure.legend(handles=entries, loc="outside lower center", ncols=max(1, int(width / 1.6)), frameon=False)
    return figure


def _legend(ceilings: Ceilings, panels: Sequence[_Panel], found: Mapping[str, Mark]) -> list[Any]:
    entries = [handle(plain(name), **_line(name, mark)) for name, mark in found.items()]
    if any(row.partial for panel in panels for row in panel.rows):
        entries.append(handle(PARTLY, color="black", linestyle="none", marker="o", markerfacecolor="white"))
    entries.append(handle("ceiling, measured", color="black", linestyle="--", linewidth=1))
    if ceilings.spec_gbs:
        entries.append(handle("ceiling, data sheet", color="black", linestyle=":", linewidth=1))
    return entries


def _line(provider: str, mark: Mark, *, partial: bool = False) -> dict[str, Any]:
    ours = provider in OURS
    return {
        "color": mark.colour,
        "linestyle": mark.dashes,
        "linewidth": 2.2 if ours else 1.1,
        "marker": mark.shape,
        "markersize": 11 if mark.shape == "*" else 6 if ours or partial else 4.5,
        "markerfacecolor": "white" if partial else mark.colour,
        "zorder": 5 if ours else 3,
    }


def _draw_lines(axis: Any, panel: _Panel, unit: str, ceilings: Ceilings, found: Mapping[str, Mark]) -> None:
    """A line a provider over the size, with the band of its 20th to 80th percentile."""
    at = panel.sizes
    values: list[float] = []
    for name, line in panel.lines().items():
        rows = sorted(line, key=lambda row: at[row.key])
        mark, places = found[name], [at[row.key] for row in rows]
        middle, least, most = ([_speed_of(row, unit, us) for row, us in each] for each in _quantiles(rows))
        axis.plot(places, middle, **_line(name, mark, partial=any(row.partial for row in rows)))
        axis.fill_between(places, least, most, color=mark.colour, alpha=0.2, linewidth=0)
        values += [*middle, *most]
    for spec, dashes in ((False, "--"), (True, ":")):
        roof = {at[row.key]: _roof(ceilings, row, unit, spec) for row in panel.rows if not row.partial}
        places = sorted(place for place, value in roof.items() if value is not None)
        heights = [roof[place] for place in places]
        axis.plot(places, heights, color="black", linestyle=dashes, linewidth=1, zorder=2)
        values += [height for height in heights if height is not None]
    _size_axis(axis, sorted(set(at.values())))
    _speed_axis(axis, values)
    axis.set(xlabel=panel.what, ylabel=unit)
    axis.grid(alpha=0.25, linewidth=0.6)


def _quantiles(rows: Sequence[Row]) -> Iterator[list[tuple[Row, float]]]:
    yield [(row, row.us) for row in rows]
    yield [(row, row.p80) for row in rows]
    yield [(row, row.p20) for row in rows]


def _size_axis(axis: Any, sizes: Sequence[int]) -> None:
    """A logarithmic one, with names for the sizes as far as they have room."""
    axis.set_xscale("log", base=2)
    room = 0.11 * math.log2(sizes[-1] / sizes[0])
    named: list[int] = []
    for size in sizes:
        if not named or math.log2(size / named[-1]) >= room:
            named.append(size)
    axis.set_xticks(named, [f"{size // 1024}k" if size >= 1024 and size % 1024 == 0 else str(size) for size in named])
    axis.set_xticks([], minor=True)


def _speed_axis(axis: Any, values: Sequence[float]) -> None:
    """From zero, or a logarithmic one where the values are far apart."""
    least, most = min(values), max(values)
    if most < 20 * least:
        axis.set_ylim(0, most * 1.08)
        return
    axis.set_yscale("log")
    axis.set_ylim(least / 1.4, most * 1.4)
    logarithmic(axis.yaxis)


def _draw_bars(axis: Any, panel: _Panel, unit: str, ceilings: Ceilings, found: Mapping[str, Mark]) -> None:
    """A bar a provider, hollow where it does a part only, with its 20th and 80th percentile."""
    rows = sorted(panel.rows, key=lambda row: list(found).index(row.provider))
    names = []
    for place, row in enumerate(rows):
        mark, speed = found[row.provider], _speed_of(row, unit, row.us)
        fill = "white" if row.partial else mark.colour
        axis.barh(place, speed, height=0.7, color=fill, edgecolor=mark.colour, linewidth=1.2)
        ends = [_speed_of(row, unit, row.p80), _speed_of(row, unit, row.p20)]
        axis.plot(ends, [place, place], color="black", linewidth=1, solid_capstyle="butt")
        names.append(f"{plain(row.provider)}  {digits(speed)}")
    limits = [_speed_of(row, unit, row.p20) for row in rows]
    whole = next((row for row in rows if not row.partial), rows[0])
    for spec, dashes in ((False, "--"), (True, ":")):
        roof = _roof(ceilings, whole, unit, spec)
        if roof is not None:
            axis.axvline(roof, color="black", linestyle=dashes, linewidth=1)
            limits.append(roof)
    axis.set_yticks(range(len(rows)), names)
    axis.set(xlabel=unit, xlim=(0, 1.06 * max(limits)), ylim=(max(len(rows), 3) - 0.4, -0.6))
    axis.locator_params(axis="x", nbins=4)


def _words(record: Record, panels: Sequence[_Panel]) -> str:
    """What the figure shows: of each panel the fastest at its largest size, and ours beside it."""
    found = []
    for panel in panels:
        largest = max(panel.sizes[row.key] for row in panel.rows)
        rows = [row for row in panel.rows if panel.sizes[row.key] == largest]
        unit = _unit(record.ceilings, panel.rows)
        best = min((row for row in rows if not row.partial), key=lambda row: row.us, default=rows[0])
        mine = [row for row in rows if row.provider in OURS and row is not best]
        place = f" at {largest} {panel.what}" if panel.what else ""
        said = [f"{row.provider} {digits(_speed_of(row, unit, row.us))} {unit}" for row in (best, *mine)]
        found.append(f"{panel.title}{place}: fastest {', '.join(said)}")
    return plain(f"Speed on {record.machine['device']}. " + "; ".join(found) + ".")
