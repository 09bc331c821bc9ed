"""Two results of the kernel bench side by side: what became slower or faster beyond the noise of its own timing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from mistral_nb_kernels.bench.record import Key, Record, Row
from mistral_nb_kernels.bench.table import digits, multiline, render

__all__ = ["Change", "Comparison", "Overall", "compare"]

Verdict = Literal["slower", "faster", "unclear", "no change"]
_ERRORS = 3
"""Standard errors that a difference has to be beyond; where rows are many more, so that in 100 comparisons of the same
thing one has a row that differs.
"""
_CHANCE = 0.01
_MANY = 8
"""Rows from which on they tell how far apart two measurements of the same are."""
_HALF = 1.349
"""Standard deviations in the shortest interval that has half of a normal distribution."""
_QUANTILES = 1.683
"""Standard deviations between the 20th and the 80th percentile of a normal distribution."""
_MEDIAN = 1.2533
"""sqrt(pi / 2): the standard error of a median over that of a mean."""
_INDEPENDENT = 20
"""Runs that count at most: thousands within a second have the clock and the load of that second in common."""
_CHECKED = ("ours", "candidate")
"""The providers that a comparison is about; others tell whether the machine changed."""
_SAME = ("shape", "flops", "bytes", "partial")
_VERSIONS = ("driver", "torch", "triton", "cuda", "python", "cpu", "cores", "threads")


@dataclass(frozen=True, slots=True)
class Change:
    """One row of both files. log: of the new median over the old one; error: its standard error."""

    old: Row
    new: Row
    log: float
    error: float
    verdict: Verdict

    @property
    def times(self) -> float:
        """The new time over the old one."""
        return math.exp(self.log)


@dataclass(frozen=True, slots=True)
class Overall:
    """`count` rows together: the mean of the logs of their ratios, its standard error, and whose rows they are."""

    log: float
    error: float
    count: int
    whose: str
    verdict: Verdict

    @property
    def times(self) -> float:
        return math.exp(self.log)


@dataclass(frozen=True, slots=True)
class Comparison:
    """rows: of both files; lost: rows of the old one that are wrong or failed in the new one; only_old, only_new: the
    other rows that one of the files lacks; notes: what else is not as it was; errors: standard errors of a row beyond
    which it counts.
    """

    rows: tuple[Change, ...]
    overall: Overall
    lost: tuple[Key, ...]
    only_old: tuple[Key, ...]
    only_new: tuple[Key, ...]
    notes: tuple[str, ...]
    tolerance: float
    errors: float

    @property
    def regressed(self) -> bool:
        """Whether a row is slower, or all together are, or a row that was timed is wrong or fails now.

        Of ours and the candidate's where there are any: a peer that is slower is no regression of a kernel.
        """
        slower = [row.new.key for row in self.rows if row.verdict == "slower"]
        checked = _checked([*(row.new.key for row in self.rows), *self.lost])
        return self.overall.verdict == "slower" or any(key in checked for key in (*slower, *self.lost))

    def table(self, markdown: bool = False) -> str:
        """The verdict, the rows that changed or are unclear, the slowest first, and what could not be compared."""
        verdict = self._verdict()
        parts = [f"**{verdict}**" if markdown else verdict]
        changed = sorted((row for row in self.rows if row.verdict != "no change"), key=lambda row: -row.log)
        if changed:
            head = ["op", "case", "dtype", "provider", *_NUMBERS, "verdict"]
            parts.append(render([head, *map(_line, changed)], _NUMBERS, markdown))
        below = [f"{', '.join(key)}: was timed, and is wrong or fails now" for key in self.lost]
        below += [*_missing(self.only_old, "the old"), *_missing(self.only_new, "the new"), *self.notes]
        if below:
            parts.append(multiline(below, markdown))
        return "\n\n".join(parts)

    def _verdict(self) -> str:
        count = {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in _ORDER}
        rows = ", ".join(f"{count[verdict]} {verdict}" for verdict in _ORDER if count[verdict])
        of = f"{len(self.rows)} row{'' if len(self.rows) == 1 else 's'}: {rows}"
        both = self.overall
        together = f"all of {both.whose} together took {both.times:.3f} x the time, +- {both.error:.3f}: {both.verdict}"
        said = "Regression" if self.regressed else "No regression"
        return f"{said}. {of}; {together} (tolerance {self.tolerance:.1%}, {self.errors:.2g} standard errors)."


_ORDER: tuple[Verdict, ...] = ("slower", "faster", "unclear", "no change")
_NUMBERS = ("old us", "new us", "x", "+-")
_SHOWN = 5


def compare(old: Record, new: Record, tolerance: float = 0.03) -> Comparison:
    """Every row of `new` against that of the same op, case, dtype and provider in `old`.

    A median of n runs, of which 20 count at most, has the standard error 1.2533 s / sqrt(n), with s from the
    percentiles; to that of a ratio comes what the middle half of all ratios differ by. A row is slower or faster where
    its ratio is beyond `tolerance` and 3 standard errors (more where there are many rows), unclear beyond the tolerance
    alone. All together are judged by the mean of the logs of the ratios of ours and the candidate's, or of all where
    there is neither. `ValueError` for other devices, and where no row is in both.
    """
    devices = [record.machine["device"] for record in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(
            f"the old results are of {devices[0]}, the new ones of {devices[1]}: measure both on one device"
        )
    before = {row.key: row for row in old.rows}
    after = {row.key: row for row in new.rows}
    both = [key for key in after if key in before]
    other = [key for key in both if _differ(before[key], after[key])]
    pairs = [(before[key], after[key]) for key in both if key not in other]
    errors = max(_ERRORS, statistics.NormalDist().inv_cdf(1 - _CHANCE / 2 / max(1, len(pairs))))
    drift = _drift([math.log(new.us / old.us) for old, new in pairs])
    rows = tuple(_change(old, new, drift, tolerance, errors) for old, new in pairs)
    if not rows:
        raise ValueError("the two results have no row in common: measure the same ops, shapes, types and providers")
    broken = {(each.op, each.case, each.dtype, each.provider) for each in new.skipped if each.kind != "absent"}
    lost = tuple(key for key in before if key not in after and key in broken)
    notes = [*_differences(old, new), *_machine(rows, tolerance)]
    if other:
        notes.append(f"Of other sizes or timed otherwise, so not compared: {_some(other)}")
    return Comparison(
        rows=rows,
        overall=_overall(rows, tolerance),
        lost=lost,
        only_old=tuple(key for key in before if key not in after and key not in lost),
        only_new=tuple(key for key in after if key not in before),
        notes=tuple(notes),
        tolerance=tolerance,
        errors=errors,
    )


def _differ(old: Row, new: Row) -> bool:
    """Whether they are not of the same work, or not timed alike; a clock that waited is a clock."""
    timers = {"wall" if row.timer == "waited" else row.timer for row in (old, new)}
    return len(timers) > 1 or any(getattr(old, name) != getattr(new, name) for name in _SAME)


def _drift(logs: Sequence[float]) -> float:
    """The standard deviation of the ratios from one measurement to the next, by the half that is nearest together.

    So rows of which up to half are slower alike say nothing of it. Taken for more by 3 / sqrt(n), as the shortest of
    several intervals is too short, and for 0 of a few rows.
    """
    if len(logs) < _MANY:
        return 0.0
    ordered, half = sorted(logs), math.ceil(len(logs) / 2)
    spans = [last - first for first, last in zip(ordered, ordered[half - 1 :], strict=False)]
    return min(spans) / _HALF * (1 + 3 / math.sqrt(len(logs)))


def _change(old: Row, new: Row, drift: float, tolerance: float, errors: float) -> Change:
    log, error = math.log(new.us / old.us), math.hypot(_error(old), _error(new), drift)
    verdict = _judged(log, error, tolerance, errors)
    waited = "waited" in (old.timer, new.timer)
    return Change(old, new, log, error, "unclear" if waited and verdict != "no change" else verdict)


def _checked(keys: Collection[Key]) -> set[Key]:
    """Those that a comparison is about."""
    return {key for key in keys if key[3] in _CHECKED} or set(keys)


def _error(row: Row) -> float:
    """The standard error of the log of its median."""
    return _MEDIAN * abs(row.p80 - row.p20) / _QUANTILES / math.sqrt(min(row.runs, _INDEPENDENT)) / row.us


def _judged(log: float, error: float, tolerance: float, errors: float = _ERRORS) -> Verdict:
    if abs(log) <= math.log1p(tolerance):
        return "no change"
    if abs(log) <= errors * error:
        return "unclear"
    return "slower" if log > 0 else "faster"


def _overall(rows: Sequence[Change], tolerance: float) -> Overall:
    """Without those that waited for a core, unless all did."""
    checked = _checked([row.new.key for row in rows])
    mine = [row for row in rows if row.new.key in checked]
    quiet = [row for row in mine if "waited" not in (row.old.timer, row.new.timer)]
    names = dict.fromkeys(row.new.provider for row in mine if row.new.provider in _CHECKED)
    mean, error = _mean(quiet or mine)
    verdict = _judged(mean, error, tolerance)
    if not quiet and verdict != "no change":
        verdict = "unclear"
    return Overall(mean, error, len(quiet or mine), " and ".join(names) if names else "them", verdict)


def _mean(rows: Sequence[Change]) -> tuple[float, float]:
    """Of the logs, and its standard error: that of the rows' own, or that of their spread where it is larger."""
    logs = [row.log for row in rows]
    own = math.hypot(*(row.error for row in rows)) / len(rows)
    spread = statistics.stdev(logs) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return statistics.fmean(logs), max(own, spread)


def _machine(rows: Sequence[Change], tolerance: float) -> list[str]:
    """Whether what a change of ours cannot touch changed, too."""
    others = [row for row in rows if row.new.provider not in _CHECKED]
    if not others or len(others) == len(rows):
        return []
    mean, error = _mean(others)
    verdict = _judged(mean, error, tolerance)
    if verdict not in ("slower", "faster"):
        return []
    took = f"took {math.exp(mean):.3f} x the time"
    return [f"The other providers are {verdict}, too ({took}): the machine or its load is not what it was"]


def _differences(old: Record, new: Record) -> list[str]:
    found = [
        f"{name}: {old.machine.get(name)} before, {new.machine.get(name)} now"
        for name in _VERSIONS
        if old.machine.get(name) != new.machine.get(name)
    ]
    if old.revision != new.revision:
        found.append(f"revision: {old.revision} before, {new.revision} now")
    named = (("The old", old), ("The new", new))
    return [*found, *(f"{name} results are of a run that was interrupted" for name, each in named if not each.complete)]


def _line(change: Change) -> list[str]:
    times = f"{change.times:.3f}"
    return [*change.new.key, digits(change.old.us), digits(change.new.us), times, f"{change.error:.3f}", change.verdict]


def _missing(keys: Sequence[Key], which: str) -> list[str]:
    return [f"Only in {which} results: {_some(keys)}"] if keys else []


def _some(keys: Sequence[Key]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return "; ".join(", ".join(key) for key in keys[:_SHOWN]) + more
