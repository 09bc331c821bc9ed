"""The kernel bench's results in words: as a table for a terminal or in Markdown, with what was not timed below it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mistral_nb_kernels.bench.record import Key, Record, Row, Skipped

__all__ = ["conditions", "digits", "multiline", "plain", "render", "table"]

_MOST = 300
"""Characters of a reason."""


def digits(x: float) -> str:
    """Three significant digits, and no exponent: 0.0123, 1.23, 12.3, 123, 12345."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}" if x > 0 else "0"


def plain(text: str) -> str:
    """On one line, without what a terminal would obey."""
    words = " ".join(text.split())
    return "".join(each for each in words if each.isprintable())


def render(cells: Sequence[Sequence[str]], numbers: Collection[str], markdown: bool) -> str:
    """A table whose first line is its head, the columns of `numbers` to the right.

    A line of one cell is a heading among the lines.
    """
    lines = [[plain(cell) for cell in line] for line in cells]
    width = len(lines[0])
    rights = [name in numbers for name in lines[0]]
    if markdown:
        lines = [[_escaped(cell) for cell in line] for line in lines]
        lines = [[f"**{line[0]}**", *[""] * (width - 1)] if len(line) == 1 else line for line in lines]
        marks = ["---:" if right else ":---" for right in rights]
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], marks, *lines[1:]))
    widths = [max(len(line[at]) for line in lines if len(line) == width) for at in range(width)]
    return "\n".join(
        line[0]
        if len(line) == 1
        else "  ".join(
            f"{cell:>{size}}" if right else f"{cell:<{size}}"
            for cell, size, right in zip(line, widths, rights, strict=True)
        ).rstrip()
        for line in lines
    )


def multiline(lines: Iterable[str], markdown: bool) -> str:
    """Lines of words below a table: a list in Markdown."""
    return "\n".join(f"- {_escaped(plain(line))}" if markdown else plain(line) for line in lines)


def table(record: Record, markdown: bool = False) -> str:
    """Every row of the record by op and case, the fastest that does the whole op marked with a star.

    Below: what was not timed and why, each reason once; the device, the versions, and the ceilings.
    """
    parts = [render(_cells(record), _NUMBERS, markdown)] if record.rows else ["Nothing was timed."]
    marked = ["*: the fastest of those that do the whole op"] if _best(record) else []
    below = [*marked, *_skipped(record), *_timers(record)]
    if not record.complete:
        below.append("Interrupted: this is what was measured until then.")
    if below:
        parts.append(multiline(below, markdown))
    last = plain(conditions(record))
    parts.append(f"*{_escaped(last)}*" if markdown else last)
    return "\n\n".join(parts)


def conditions(record: Record) -> str:
    """The device, its ceilings, the versions, when and by which command."""
    machine, ceilings = record.machine, record.ceilings
    facts = [str(machine["device"])]
    if machine.get("kind") == "cpu" and machine.get("threads"):
        facts.append(f"{machine['threads']} threads")
    facts += [f"{name} {machine[name]}" for name in ("driver", "torch", "triton", "cuda") if machine.get(name)]
    products = [f"{dtype} {digits(value)}" for dtype, value in ceilings.matmul_tflops.items()]
    limits = f"reads {digits(ceilings.read_gbs)} GB/s, copies {digits(ceilings.copy_gbs)} GB/s"
    limits += f", multiplies {', '.join(products)} TFLOP/s" if products else ""
    sheet = []
    if ceilings.spec_gbs:
        sheet.append(f"{digits(ceilings.spec_gbs)} GB/s")
    if ceilings.spec_tflops:
        sheet.append(f"{digits(ceilings.spec_tflops)} TFLOP/s")
    limits += f" (data sheet: {', '.join(sheet)})" if sheet else ""
    made = [record.when, *([f"revision {record.revision}"] if record.revision else []), " ".join(record.command)]
    return f"{', '.join(facts)}. Measured ceilings: {limits}. {', '.join(each for each in made if each)}"


_NUMBERS = ("us", "p20", "p80", "TFLOP/s", "GB/s", "of the roof", "of the spec", "x ours")


def _cells(record: Record) -> list[list[str]]:
    """The head, and the lines below a heading for each op; without the columns that no row has a value for."""
    typed = len({row.dtype for row in record.rows}) > 1
    best = _best(record)
    columns = ["case", *(["dtype"] if typed else []), "provider", *_NUMBERS, "less work"]
    lines: dict[str, dict[tuple[str, ...], list[list[str]]]] = {}
    for row, values in zip(record.rows, record.tidy(), strict=True):
        points = lines.setdefault(row.op, {})
        cases = points.setdefault(row.point, [])
        names = [row.case, row.dtype] if typed else [row.case]
        name = f"{row.provider} *" if row.key in best else row.provider
        cases.append([*(names if not cases else [""] * len(names)), name, *_numbers(row, values), row.partial])
    whole = [line for points in lines.values() for cases in points.values() for line in cases]
    kept = [at for at, column in enumerate(columns) if column == "provider" or any(line[at] for line in whole)]
    found = [[columns[at] for at in kept]]
    for op, points in lines.items():
        found.append([op])
        found += [[line[at] for at in kept] for cases in points.values() for line in cases]
    return found


def _numbers(row: Row, values: Mapping[str, Any]) -> list[str]:
    """Of the columns `_NUMBERS`; empty where there is none."""
    share, spec, ours = values["share"], values["share_of_spec"], values["times_ours"]
    return [
        *(digits(x) for x in (row.us, row.p20, row.p80)),
        digits(row.tflops) if row.flops else "",
        digits(row.gbs),
        "" if share is None else f"{share:.0%} {values['bound']}",
        "" if spec is None else f"{spec:.0%}",
        "" if ours is None else f"{ours:.2f}",
    ]


def _best(record: Record) -> set[Key]:
    """The fastest of each case that two or more do whole, and that none waited in."""
    points: dict[tuple[str, ...], list[Row]] = {}
    waited = {row.point for row in record.rows if row.timer == "waited"}
    for row in record.rows:
        if not row.partial and row.point not in waited:
            points.setdefault(row.point, []).append(row)
    return {min(rows, key=lambda row: row.us).key for rows in points.values() if len(rows) > 1}


_WORDS = {"absent": "not here", "wrong": "WRONG, so not timed", "failed": "failed"}


def _skipped(record: Record) -> Iterator[str]:
    """Each reason once, with the cases that it is about unless it is about all that a provider was asked."""
    timed = {row.provider for row in record.rows}
    reasons: dict[tuple[str, str, str], list[Skipped]] = {}
    for each in record.skipped:
        reasons.setdefault((each.provider, each.kind, each.why), []).append(each)
    several = Counter(provider for provider, _, _ in reasons)
    for (provider, kind, why), places in reasons.items():
        first = places[0]
        if kind != "absent":
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            where = f" of {first.op}, {first.case}, {first.dtype}{more}"
        else:
            partly = provider in timed or several[provider] > 1
            where = f" of {', '.join(dict.fromkeys(each.op for each in places))}" if partly else ""
        yield f"{provider}{where}: {_WORDS[kind]}: {_cut(why)}"


def _timers(record: Record) -> Iterator[str]:
    """Who was timed with another timer than most, and who waited for a core."""
    timers = Counter(row.timer for row in record.rows if row.timer != "waited")
    usual = timers.most_common(1)[0][0] if timers else ""
    for timer in dict.fromkeys(row.timer for row in record.rows if row.timer != usual):
        names = ", ".join(dict.fromkeys(f"{row.provider} of {row.op}" for row in record.rows if row.timer == timer))
        said = "Waited for a core that others had" if timer == "waited" else f"Timed by {timer}, not {usual}"
        yield f"{said}: {names}"


def _cut(text: str) -> str:
    words = plain(text)
    return words if len(words) <= _MOST else f"{words[:_MOST]}..."


def _escaped(text: str) -> str:
    """Without the characters that Markdown would take for marks."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", text)
