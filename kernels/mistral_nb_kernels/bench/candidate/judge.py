"""A candidate's trial: right on the hard cases, timed beside the others, right again on other numbers."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mistral_nb_kernels.bench import timing
from mistral_nb_kernels.bench.candidate.check import check, check_timed
from mistral_nb_kernels.bench.candidate.failure import Failure, raised
from mistral_nb_kernels.bench.candidate.hard import Hard, hard_cases
from mistral_nb_kernels.bench.candidate.kept import check_again, check_twice
from mistral_nb_kernels.bench.candidate.source import Candidate, CandidateError, named, said
from mistral_nb_kernels.bench.candidate.tuned import turns
from mistral_nb_kernels.bench.case import Case, Device
from mistral_nb_kernels.bench.measure import Begin, Doing, Event, measure
from mistral_nb_kernels.bench.providers import Provider
from mistral_nb_kernels.bench.record import Row, Skipped, dtype_name
from mistral_nb_kernels.bench.registry import Asked, Point, op_points

__all__ = ["CANDIDATE", "Note", "judge"]

CANDIDATE = "candidate"
"""Its name among the providers."""
AGAIN = "candidate, on other numbers"


@dataclass(frozen=True, slots=True)
class Note:
    """What the user is told beside the numbers."""

    text: str


Told = Event | Note | Failure


def judge(candidate: Candidate, op: str, asked: Asked, device: Device, *, timed: bool) -> Iterator[Told]:
    """The events of a trial, with one `Begin`. A `Failure` is the last of them: without one the candidate is right.

    Each of the asked dtypes (None: all that are right here) is checked on the op's hard cases, and at odd sizes that
    are as large as those that are timed; then the candidate is timed at the points of the op's subject beside the
    others, and at each checked again as soon as it was timed. Under Triton's interpreter it is only checked on the hard
    cases, and not in bf16, whose `tl.dot` is wrong there. Raises `CandidateError` where nothing can be checked.
    """
    op, device = named(op), torch.device(device)
    interpreted = candidate.triton and device.type == "cpu"
    hards = [hard for dtype in _dtypes(asked, device, interpreted) for hard in hard_cases(op, dtype, device)]
    points = op_points(op, asked, device) if timed and not interpreted else []
    uneven, trial = _uneven(points, op, asked, device), _Timed(candidate, points, device, asked)
    total = len(hards) + len(uneven) + trial.total
    yield Begin(total)
    yield from map(Note, candidate.notes)
    failed = yield from _checked(candidate, hards, total, twice=not trial.total)
    if not failed:
        failed = yield from _checked_uneven(candidate, uneven, device, len(hards), total)
    if not failed:
        failed = yield from trial.run(len(hards) + len(uneven), total)
    if interpreted and not failed:
        yield Note(
            "Checked under Triton's interpreter in fp16 and fp32, where tl.dot is wrong in bf16, and not timed: there "
            "is no NVIDIA GPU with Triton."
        )


def _dtypes(asked: Asked, device: torch.device, interpreted: bool) -> tuple[torch.dtype, ...]:
    dtypes = asked.dtypes or (torch.bfloat16, torch.float16, torch.float32)
    if device.type == "cuda" and asked.dtypes is None and torch.cuda.get_device_capability(device) < (8, 0):
        dtypes = dtypes[1:]
    if interpreted:
        dtypes = tuple(dtype for dtype in dtypes if dtype != torch.bfloat16)
        if not dtypes:
            raise CandidateError(
                "Without an NVIDIA GPU a kernel is checked under Triton's interpreter, whose tl.dot is wrong in bf16: "
                "ask for --dtype fp16 or fp32"
            )
    return dtypes


def _checked(candidate: Candidate, hards: list[Hard], total: int, *, twice: bool) -> Generator[Told, None, bool]:
    """The hard cases, up to the first that fails; `twice`: one of them in two calls. Returns whether one failed."""
    declined: Counter[str] = Counter()
    for done, hard in enumerate(hards):
        yield Doing(done, total, hard.case.op, hard.label, hard.dtype, CANDIDATE)
        try:
            failure = check(candidate.function, hard)
            if failure is None and twice:
                failure, twice = check_twice(candidate.function, hard), False
        except NotImplementedError as error:
            declined[said(error)] += 1
            continue
        failure = _left(candidate, f"{hard.case.op}, {hard.label}, {hard.dtype}") or failure
        if failure is not None:
            yield from map(Note, turns())
            yield failure
            return True
    taken = len(hards) - declined.total()
    reasons = "; ".join(f"{count} cases: {why}" for why, count in declined.items())
    if not taken:
        raise CandidateError(f"The candidate takes none of the hard cases ({reasons})")
    yield Note(f"Right on {taken} hard cases in {', '.join(dict.fromkeys(hard.dtype for hard in hards))}.")
    yield from map(Note, turns())
    if declined:
        yield Note(f"Not taken by the candidate: {reasons}.")
    return False


def _uneven(points: list[Point], op: str, asked: Asked, device: torch.device) -> list[Point]:
    """The largest of the timed points less one: what a candidate does with large sizes alone may be for whole tiles."""
    if not points:
        return []

    def odd(*names: str) -> tuple[int, ...]:
        most = max(int(point.shape.get(name, 1)) for point in points for name in names)
        return (most - 1 + most % 2,)

    tokens = any("tokens" in point.shape for point in points)
    seq, batch = odd("tokens") if tokens else None, odd("batch", "rows")
    sizes = {tuple(point.shape.items()) for point in points}
    every = op_points(op, replace(asked, seq=seq, batch=batch), device)
    return [point for point in every if tuple(point.shape.items()) not in sizes]


def _checked_uneven(
    candidate: Candidate, points: list[Point], device: torch.device, done: int, total: int
) -> Generator[Told, None, bool]:
    """Those sizes, which nobody times. Returns whether one failed."""
    right: list[str] = []
    declined: list[str] = []
    for at, point in enumerate(points):
        dtype = dtype_name(point.dtype)
        where = f"{point.op}, {point.case}, {dtype}"
        yield Doing(done + at, total, point.op, point.case, dtype, CANDIDATE)
        try:
            failure = check_timed(candidate.function, _drawn(point, device), where)
        except NotImplementedError:
            declined.append(point.case)
            continue
        failure = _left(candidate, where) or failure
        if failure is not None:
            yield failure
            return True
        right.append(point.case)
    for words, cases in (("Right", right), ("Not taken by the candidate", declined)):
        if cases:
            others = f" and {len(cases) - 1} more" * (len(cases) > 1)
            yield Note(f"{words} at odd sizes as large as the timed ones: {cases[0]}{others}.")
    return False


def _drawn(point: Point, device: torch.device) -> Case:
    """A point's case of numbers that nobody has seen."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.seed()
        return point.make(device)


def _left(candidate: Candidate, where: str) -> Failure | None:
    """Whether it has replaced what it is judged by; torch's settings are put back."""
    candidate.around.reset()
    replaced = ", ".join(candidate.around.replaced())
    return Failure(where, f"It replaces {replaced}, which it is judged by.") if replaced else None


class _Timed:
    """The candidate among the providers of its op's points; what was timed, and how it ended, is kept for a look."""

    def __init__(self, candidate: Candidate, points: list[Point], device: torch.device, asked: Asked) -> None:
        self._candidate, self._function = candidate, candidate.function
        self._points = {(point.op, point.case, dtype_name(point.dtype)): point for point in points}
        self._device = device
        self._case: Case | None = None
        self._error: BaseException | None = None
        self._events: Iterator[Event] = iter(())
        self.total = 0
        if points:
            self._events = measure(points, device, asked.providers, extra=(Provider(CANDIDATE, self._bind),))
            begin = next(self._events)
            assert isinstance(begin, Begin)
            self.total = begin.total + len(points)

    def _bind(self, case: Case) -> Callable[[], Any]:
        """The first that is bound at a point is among those that are timed."""
        if self._case is None:
            self._case = case
            _compile_anew()
        call = case.call(self._function)

        def watched() -> Any:
            try:
                return call()
            except (Exception, SystemExit) as error:  # somebody else's code
                self._error = error
                raise RuntimeError(said(error)) from error

        return watched

    def run(self, done: int, total: int) -> Generator[Told, None, bool]:
        """What `measure` tells, and what is found on other numbers. Returns whether the candidate failed."""
        right = now = 0
        for event in self._events:
            if isinstance(event, Doing):
                self._case = self._error = None
                now = done + event.done
                yield replace(event, done=now, total=total)
                continue
            failure = None
            if isinstance(event, Row) and event.provider == CANDIDATE:
                yield Doing(now + 1, total, event.op, event.case, event.dtype, AGAIN)
                failure = self._again(event)
                right, done = right + 1, done + 1
            elif isinstance(event, Skipped) and event.provider == CANDIDATE:
                event, failure = self._skipped(event)
                done += 1
            if isinstance(event, Row | Skipped) and event.provider == CANDIDATE:
                failure = _left(self._candidate, f"{event.op}, {event.case}, {event.dtype}") or failure
            yield event if failure is None else failure
            if failure is not None:
                return True
        if right:
            shapes = f"{right} timed shape{'s' * (right > 1)}"
            yield Note(f"Right again on other numbers at {shapes}, in the same buffers and in new ones.")
        return False

    def _again(self, row: Row) -> Failure | None:
        assert self._case is not None
        replayed = timing.replayed if row.timer == "graph" else lambda call: None
        label = f"{row.case}, {row.dtype}"
        return check_again(self._function, self._case, lambda: self._fresh(row), label, replayed)

    def _fresh(self, event: Row | Skipped) -> Case:
        return _drawn(self._points[event.op, event.case, event.dtype], self._device)

    def _skipped(self, skipped: Skipped) -> tuple[Skipped, Failure | None]:
        """Why the candidate was not timed: its own failure, or none of its."""
        where = f"{skipped.op}, {skipped.case}, {skipped.dtype}, to be timed"
        if skipped.kind == "wrong":
            failure = check_timed(self._function, self._fresh(skipped), where)
            return skipped, failure or Failure(where, skipped.why)
        if isinstance(self._error, NotImplementedError):
            return replace(skipped, kind="absent", why=f"not taken: {said(self._error)}"), None
        return skipped, None if self._error is None else raised(self._error, where)


def _compile_anew() -> None:
    """torch.compile gives a function up that it has compiled for too many shapes, as the hard cases have."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
