"""The roofline of a record of the kernel bench: each kernel by its FLOPs a byte, under what the machine gives."""

from __future__ import annotations

import importlib
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_nb_kernels.bench.marks import OURS, PARTLY, Mark, handle, logarithmic, marks
from mistral_nb_kernels.bench.record import Record, Row
from mistral_nb_kernels.bench.table import digits, plain

__all__ = ["roofline"]

_WIDTH, _HEIGHT = 8.6, 4.4
"""Of the axes, in inches."""
_GAP = 0.165
"""Inches between two names above the axes."""
_BAND = 0.35
"""Inches above the axes in which the lines go from the kernels to their names."""
_LONGEST = 46
_DASHES = ("-", "--", "-.")


@dataclass(frozen=True, slots=True)
class _Roof:
    """GB/s of memory, and TFLOP/s of products where they are known."""

    name: str
    gbs: float
    peak: float | None
    style: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"{self.name}: {digits(self.gbs)} GB/s" + (f", {digits(self.peak)} TFLOP/s" if self.peak else "")


@dataclass(frozen=True, slots=True)
class _Column:
    """Cases of an op whose intensities are as good as the same, below one name. x: log10 of FLOPs a byte."""

    x: float
    rows: tuple[Row, ...]
    name: str

    @property
    def named(self) -> Iterator[Row]:
        """The rows that stand out, with its number: ours and the candidate's, else the fastest of each case."""
        cases: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            cases.setdefault(row.point, []).append(row)
        for rows in cases.values():
            mine = [row for row in rows if row.provider in OURS]
            yield from mine or sorted((row for row in rows if not row.partial), key=lambda row: row.us)[:1]


def roofline(record: Record) -> tuple[Any, str] | None:
    """matplotlib's figure and what it shows in words; None if no row has FLOPs."""
    rows = [row for row in record.rows if row.flops]
    if not rows:
        return None
    columns = _columns(rows, int(_WIDTH / _GAP))
    found = marks(row.provider for row in rows)
    partial = any(row.partial for row in rows)
    roofs = _roofs(record, rows)
    below = 0.55 + 0.19 * (math.ceil((len(found) + partial) / 7) + len(roofs))
    above = _BAND + 0.047 * max(len(column.name) for column in columns) + 0.45
    height = below + _HEIGHT + above
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(_WIDTH + 1.4, height))
    axis = figure.add_axes((0.8 / (_WIDTH + 1.4), below / height, _WIDTH / (_WIDTH + 1.4), _HEIGHT / height))
    _axes(axis, rows, roofs)
    numbers = {row.key: str(at) for at, column in enumerate(columns, 1) for row in column.named}
    for at, row in enumerate(sorted(rows, key=lambda row: row.key in numbers)):
        _point(axis, row, found[row.provider], numbers.get(row.key), 4 + at / len(rows))
    _named(axis, columns)
    points = [
        handle(plain(name), color=mark.colour, marker=mark.shape, linestyle="none") for name, mark in found.items()
    ]
    if partial:
        points.append(handle(PARTLY, color="black", marker="o", linestyle="none", markerfacecolor="white"))
    lines = [handle(roof.label, **roof.style) for roof in roofs]
    figure.legend(handles=lines, loc="lower center", bbox_to_anchor=(0.5, 0.0), ncols=1, frameon=False)
    middle = (0.5, 0.19 * len(roofs) / height)
    figure.legend(handles=points, loc="lower center", bbox_to_anchor=middle, ncols=7, frameon=False)
    title = f"{plain(str(record.machine['device']))}: each kernel by its FLOPs a byte, and the roof{_left_out(record)}"
    figure.text(0.5, 1 - 0.1 / height, "\n".join(textwrap.wrap(title, 100)), ha="center", va="bottom", fontsize=10)
    return figure, _words(record, rows)


def _roofs(record: Record, rows: Sequence[Row]) -> list[_Roof]:
    """Measured, one for each type of the rows, and of the data sheet."""
    ceilings = record.ceilings
    found = []
    for at, dtype in enumerate(dict.fromkeys(row.dtype for row in rows)):
        style = {"color": "black", "linewidth": 1.4, "linestyle": _DASHES[at % len(_DASHES)]}
        found.append(_Roof(f"measured, {dtype}", ceilings.read_gbs, ceilings.matmul_tflops.get(dtype), style))
    if ceilings.spec_gbs:
        style = {"color": "black", "linewidth": 1, "linestyle": ":"}
        found.append(_Roof("data sheet, 16 bits", ceilings.spec_gbs, ceilings.spec_tflops, style))
    return found


def _point(axis: Any, row: Row, mark: Mark, number: str | None, order: float) -> None:
    """A mark, a large one with the number of its name where it has one."""
    axis.plot(
        row.intensity,
        row.tflops,
        marker=mark.shape,
        color=mark.colour,
        markersize=(20 if mark.shape == "*" else 11) if number else 5,
        markerfacecolor="white" if row.partial else mark.colour,
        markeredgecolor="black" if number else mark.colour,
        markeredgewidth=0.8,
        zorder=order,
    )
    if number:
        ink = "black" if row.partial else mark.ink
        middle = {"ha": "center", "va": "center_baseline", "zorder": order}
        axis.text(row.intensity, row.tflops, number, color=ink, fontsize=6, **middle)


def _axes(axis: Any, rows: Sequence[Row], roofs: Sequence[_Roof]) -> None:
    """Logarithmic ones that show every row and both parts of each roof; the roofs on them."""
    ridges = [1e3 * roof.peak / roof.gbs for roof in roofs if roof.peak]
    intensities = [*(row.intensity for row in rows), *ridges]
    left, right = min(intensities) / 2, max(intensities) * 2.5
    tops = [*(row.tflops for row in rows), *(roof.peak or roof.gbs * right / 1e3 for roof in roofs)]
    bottom = min(*(row.tflops for row in rows), *(roof.gbs * left / 1e3 for roof in roofs)) / 1.6
    axis.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 1.7 * max(tops)))
    for roof in roofs:
        ends = [left, right] if roof.peak is None else [left, 1e3 * roof.peak / roof.gbs, right]
        heights = [min(roof.gbs * end / 1e3, roof.peak or math.inf) for end in ends]
        axis.plot(ends, heights, zorder=3, **roof.style)
    axis.set(xlabel="FLOPs a byte", ylabel="TFLOP/s")
    for side in (axis.xaxis, axis.yaxis):
        logarithmic(side)
    axis.grid(alpha=0.25, linewidth=0.6)


def _columns(rows: Sequence[Row], most: int) -> list[_Column]:
    """The rows by op and intensity, as finely as there is room for `most` names."""
    within = 0.03
    while len(found := _merged(rows, within)) > most:
        within *= 1.5
    return found


def _merged(rows: Sequence[Row], within: float) -> list[_Column]:
    """Cases of one op in one type that are within so much of each other, in log10."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(row.point, []).append(row)
    places = [(math.log10(min(same, key=lambda row: bool(row.partial)).intensity), same) for same in cases.values()]
    groups: dict[tuple[str, str], list[list[tuple[float, list[Row]]]]] = {}
    for place in sorted(places, key=lambda place: place[0]):
        of_op = groups.setdefault((place[1][0].op, place[1][0].dtype), [])
        if of_op and place[0] - of_op[-1][0][0] <= within:
            of_op[-1].append(place)
        else:
            of_op.append([place])
    typed = len({row.dtype for row in rows}) > 1
    return sorted((_column(group, typed) for of_op in groups.values() for group in of_op), key=lambda column: column.x)


def _column(group: Sequence[tuple[float, list[Row]]], typed: bool) -> _Column:
    rows = tuple(row for _, same in group for row in same)
    cases = list(dict.fromkeys(row.case for row in rows))
    words = [word for word in cases[0].split(", ") if all(word in case.split(", ") for case in cases)]
    if len(cases) > 1:
        words.append(f"{len(cases)} cases")
    if typed:
        words.append(rows[0].dtype)
    name = plain(f"{rows[0].op}: {', '.join(words)}")
    x = sum(x for x, _ in group) / len(group)
    return _Column(x, rows, name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}...")


def _named(axis: Any, columns: Sequence[_Column]) -> None:
    """The names above the axes, apart from each other, and a thin line from each down to its kernels."""
    left, right = (math.log10(limit) for limit in axis.get_xlim())
    bottom, top = (math.log10(limit) for limit in axis.get_ylim())
    shares = [(column.x - left) / (right - left) for column in columns]
    places = _apart(shares, _GAP / _WIDTH)
    for number, (column, share, place) in enumerate(zip(columns, shares, places, strict=True), 1):
        lowest = min(math.log10(row.tflops) for row in column.rows)
        axis.plot(
            [share, share, place],
            [(lowest - bottom) / (top - bottom), 1, 1 + _BAND / _HEIGHT],
            color="#999999",
            linewidth=0.6,
            transform=axis.transAxes,
            clip_on=False,
            zorder=1,
        )
        axis.text(
            place,
            1 + (_BAND + 0.04) / _HEIGHT,
            f"{number}  {column.name}",
            transform=axis.transAxes,
            rotation=60,
            rotation_mode="anchor",
            fontsize=7.5,
            va="center",
        )


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """As near to `places`, which ascend, as they can be between 0 and 1 with `gap` between any two."""
    blocks: list[tuple[float, int]] = []
    for at, place in enumerate(places):
        total, count = place - at * gap, 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / count:
            before = blocks.pop()
            total, count = total + before[0], count + before[1]
        blocks.append((total, count))
    slack = max(0.0, 1 - gap * (len(places) - 1))
    means = [total / count for total, count in blocks for _ in range(count)]
    return [min(max(mean, 0.0), slack) + at * gap for at, mean in enumerate(means)]


def _words(record: Record, rows: Sequence[Row]) -> str:
    """Of each op the kernel that comes nearest to the roof, and ours beside it."""
    said = []
    for op in dict.fromkeys(row.op for row in rows):
        shares = [(record.ceilings.share(row) or 0, row) for row in rows if row.op == op and not row.partial]
        named = {id(row): (share, row) for share, row in sorted(shares, key=lambda pair: -pair[0])[:1]}
        for provider in OURS:
            mine = [pair for pair in shares if pair[1].provider == provider]
            if mine:
                share, row = max(mine, key=lambda pair: pair[0])
                named[id(row)] = (share, row)
        each = ", ".join(f"{row.provider} {share:.0%} ({row.case})" for share, row in named.values())
        said.append(f"{op}: at most {each}" if each else op)
    return plain(f"Roofline of {record.machine['device']}; of the measured roof {'; '.join(said)}{_left_out(record)}.")


def _left_out(record: Record) -> str:
    """The ops that a roofline says nothing about."""
    drawn = {row.op for row in record.rows if row.flops}
    others = dict.fromkeys(row.op for row in record.rows if row.op not in drawn)
    return f" (without FLOPs, so not here: {', '.join(others)})" if others else ""
