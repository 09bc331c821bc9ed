"""Holding a candidate against the reference, on a hard case and on one as large as those that are timed."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.candidate.failure import Failure, Near, apart, place, raised
from mistral_nb_kernels.bench.candidate.guard import Guard, bits
from mistral_nb_kernels.bench.candidate.hard import Hard
from mistral_nb_kernels.bench.case import Case, allowed, named_tensors
from mistral_nb_kernels.bench.record import dtype_name

__all__ = ["check", "check_timed", "given", "on_gpu", "result_of", "waiting"]

SIDE = 3
"""Elements shown on each side of the first wrong one."""
UNITS = 16
"""In the last place, of a row's largest: what a sum in fp32 may always be off. Torch's own are made in pairs, which is
more exact than most orders.
"""
TF32 = 5e-3
"""Of a row's largest: products of TF32 are off by less."""
BARE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def check(function: Callable[..., Any], hard: Hard) -> Failure | None:
    """What `function` does wrongly on a hard case: its result, or its inputs as it leaves them; None if nothing.

    A result's error against fp64 may be twice that of the reference in the same type, plus one unit in the last place,
    by rows, as `exactness.exact` has it; in fp32 at least `UNITS`. Integers are equal. `NotImplementedError` is handed
    on: the candidate does not take the case.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of such small tensors starting others takes most of the time
    try:
        return _checked(function, hard)
    finally:
        torch.set_num_threads(threads)


def _checked(function: Callable[..., Any], hard: Hard) -> Failure | None:
    case, where = hard.case, f"{hard.case.op}, {hard.label}, {hard.dtype}"
    mine, theirs, truth = case.copied(), case.copied(), hard.doubled().copied()
    guard = Guard()
    got = result_of(function, mine, where, guard)
    if isinstance(got, Failure):
        return got
    expected, true = (each.call(each.reference)() for each in (theirs, truth))
    judged = _Judged(where, hard.rows, hard.undefined)
    failure = judged.result(got, expected, true) or judged.inputs(case, mine, theirs, truth)
    failure = failure or judged.outside(case, mine)
    if failure is None and (words := guard.broken()):
        return Failure(where, words)
    return failure


def check_timed(function: Callable[..., Any], case: Case, where: str) -> Failure | None:
    """What it does wrongly on a case as large as those that are timed, in the very tensors of the case.

    Its numbers may be off by what the bench's gate allows: how exact it is was seen on the hard cases. Nothing tells it
    that it is checked: its new tensors are not poisoned.
    """
    was, theirs = case.copied(), case.copied()
    expected = theirs.call(theirs.reference)()
    got = result_of(function, case, where)
    if isinstance(got, Failure):
        return got
    judged = _Judged(where, loose=True)
    return judged.result(got, expected, expected) or judged.inputs(was, case, theirs, theirs)


def result_of(
    function: Callable[..., Any], case: Case, where: str, guard: contextlib.AbstractContextManager[Any] = BARE
) -> Any:
    """Its result, or how it failed."""
    try:
        with guard, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of which the interpreter is made
            got = function(*case.inputs, **case.keywords)
            waiting(case)()
    except NotImplementedError:
        raise
    except (Exception, SystemExit) as error:  # somebody else's code
        return raised(error, where)
    return got


def on_gpu(case: Case) -> bool:
    return any(x.device.type == "cuda" for _, x in given(case))


def waiting(case: Case) -> Callable[[], None]:
    """What waits until a call of it is done."""
    return torch.cuda.synchronize if on_gpu(case) else lambda: None


def given(case: Case) -> Iterator[tuple[str, Tensor]]:
    """A case's inputs, by the names of the op's arguments."""
    names = inspect.signature(getattr(reference, case.op)).parameters
    for name, x in zip(names, case.inputs, strict=False):
        yield from named_tensors(name, x)
    yield from named_tensors("", case.keywords)


def _unlike(got: Any, expected: Any, name: str = "result") -> tuple[str, str] | None:
    """A result of another kind, type or shape, in words, and which it is."""
    if isinstance(expected, tuple):
        if not isinstance(got, tuple):
            return f"The {name} is {_kind(got)}, not a tuple of {len(expected)} tensors.", name
        if len(got) != len(expected):
            return f"The {name} is a tuple of {len(got)}, not of {len(expected)} tensors.", name
        parts = enumerate(zip(got, expected, strict=True))
        return next(filter(None, (_unlike(*pair, f"{name}[{at}]") for at, pair in parts)), None)
    if type(got) is not Tensor:
        kind = "a plain tensor" if isinstance(got, Tensor) else "a tensor"
        return f"The {name} is {_kind(got)}, not {kind}.", name
    for what, found, right in (
        ("type", dtype_name(got.dtype), dtype_name(expected.dtype)),
        ("shape", list(got.shape), list(expected.shape)),
        ("device", got.device, expected.device),
    ):
        if found != right:
            return f"The {what} of the {name} is {found}, not {right}.", name
    return None


def _kind(x: Any) -> str:
    return "None" if x is None else f"of the type {type(x).__name__}"


@dataclass(frozen=True, slots=True)
class _Judged:
    """Where, and by what: rows, undefined of `Hard`; loose: by the bench's gate for numbers in place of the rule."""

    where: str
    rows: tuple[str, ...] = ()
    undefined: tuple[int, ...] = ()
    loose: bool = False

    def result(self, got: Any, expected: Any, truth: Any) -> Failure | None:
        """What is wrong in the result."""
        unlike = _unlike(got, expected)
        if unlike is not None:
            return Failure(self.where, *unlike)
        for (name, mine), (_, theirs), (_, true) in zip(
            *(named_tensors("result", x) for x in (got, expected, truth)), strict=True
        ):
            counts = torch.ones_like(mine, dtype=torch.bool)
            counts[list(self.undefined)] = False
            failure = self.off(name, mine, theirs, true, counts, self.rows)
            if failure is not None:
                return failure
        return None

    def off(
        self, name: str, got: Tensor, expected: Tensor, truth: Tensor, counts: Tensor, rows: Sequence[str] = ()
    ) -> Failure | None:
        """What is wrong among the numbers that count."""
        errors, limit = _errors(got, expected, truth, counts, loose=self.loose)
        wrong = ~(errors <= limit)
        if not wrong.any():
            return None
        places = wrong.nonzero()
        first, worst = (_near(got, expected, errors, wrong, index) for index in _first_and_worst(errors, wrong))
        most = float(limit[first.index])
        numeric = got.is_floating_point()
        words = self._is(name, first, rows)
        if numeric and math.isfinite(first.error):
            off, most_said = apart(first.error, most, 2)
            words += f": off by {off} of its row's largest, of which {most_said} are allowed"
        words += f". {len(places)} of {got.numel()} numbers are wrong{_within(places)}"
        if worst.index != first.index:
            words += f"; the worst: {self._is(name, worst, rows)}"
            words += f", off by {worst.error:.2g}" * (numeric and math.isfinite(worst.error))
        return Failure(
            *(self.where, words + ".", name, first.index, first.got, first.expected, len(places), got.numel()),
            *(first.error, most),
            around=tuple(_around(got, expected, errors, wrong, first.index)),
            worst=None if worst.index == first.index else worst,
            hint=_hint(got, first.got, first.error),
        )

    def _is(self, name: str, near: Near, rows: Sequence[str]) -> str:
        """A wrong number beside the right one; rows: what each row is."""
        what = f" ({rows[near.index[0]]})" if rows else ""
        got, expected = apart(near.got, near.expected)
        return f"{place(name, near.index)}{what} is {got}, not {expected}"

    def inputs(self, before: Case, mine: Case, theirs: Case, truth: Case) -> Failure | None:
        """Inputs that are left otherwise than by the reference; rows that it writes are held as a result's are."""
        true = dict(given(truth))
        for (name, was), (_, got), (_, expected) in zip(*map(given, (before, mine, theirs)), strict=True):
            written = bits(expected) != bits(was)
            touched = written.any(-1, keepdim=True).expand_as(written)
            foreign = (bits(got) != bits(was)) & ~touched
            if foreign.any():
                return self._foreign(name, foreign, got, was, "rows that are not its own in" * bool(written.any()))
            failure = self.off(name, got, expected, true[name], touched) if written.any() else None
            if failure is not None:
                return failure
        return None

    def _foreign(self, name: str, foreign: Tensor, got: Tensor, was: Tensor, what: str) -> Failure:
        index = tuple(foreign.nonzero()[0].tolist())
        mine, before = got[index].item(), was[index].item()
        words = f"It changes {what or 'its input'} {name}: {place(name, index)} was {{}} and is {{}}."
        words = words.format(*apart(before, mine))
        return Failure(self.where, words, name, index, mine, before, int(foreign.sum()), foreign.numel())

    def outside(self, before: Case, mine: Case) -> Failure | None:
        """What is written beside the inputs, in the storage that they are views of."""
        shared: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        for (name, was), (_, got) in zip(given(before), given(mine), strict=True):
            if got.numel():
                shared.setdefault(got.untyped_storage().data_ptr(), []).append((name, was, got))
        for views in shared.values():
            if len({got.dtype for _, _, got in views}) > 1:
                continue
            _, *ends = views[0]
            clean, whole = (_storage(x).clone() for x in ends)
            for _, was, got in views:
                whole.as_strided(got.shape, got.stride(), got.storage_offset()).copy_(was)
            if not torch.equal(bits(whole), bits(clean)):
                names = ", ".join(name for name, _, _ in views)
                words = f"It writes beside its input {names}, in memory that is not part of it."
                return Failure(self.where, words, names)
        return None


def _storage(x: Tensor) -> Tensor:
    """All of the storage that x is a view of."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


def _errors(got: Tensor, expected: Tensor, truth: Tensor, counts: Tensor, *, loose: bool) -> tuple[Tensor, Tensor]:
    """Of every number, of its row's largest, and what is allowed; of integers 0 where they are equal, else 1."""
    if not got.is_floating_point():
        errors = ((got != expected) & counts).double()
        return errors, torch.zeros_like(errors)
    true = truth.double()
    size = true.abs().amax(-1, keepdim=True)
    nonzero = torch.where(size > 0, size, 1.0)
    mine, theirs = (torch.where(counts, (x.double() - true).abs() / nonzero, 0.0) for x in (got, expected))
    if loose:
        return mine, allowed(true) / nonzero
    mine = torch.where((size == 0) & (mine > 0), torch.inf, mine)
    eps = torch.finfo(got.dtype).eps
    rule = max(float(2 * theirs.max()) + eps, UNITS * eps if got.dtype == torch.float32 else 0.0)
    return mine, torch.full_like(mine, rule)


def _first_and_worst(errors: Tensor, wrong: Tensor) -> Iterator[tuple[int, ...]]:
    """Where: of several that are as bad as any, such as NaN, the worst is the first."""
    yield tuple(wrong.nonzero()[0].tolist())
    bad = torch.where(wrong, errors.nan_to_num(nan=torch.inf, posinf=torch.inf), -1.0)
    yield tuple((bad == bad.max()).nonzero()[0].tolist())


def _within(places: Tensor) -> str:
    """The least block that holds all of them."""
    if len(places) == 1:
        return ""
    ends = zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True)
    return f", all within [{', '.join(str(low) if low == high else f'{low}..{high}' for low, high in ends)}]"


def _near(got: Tensor, expected: Tensor, errors: Tensor, wrong: Tensor, index: tuple[int, ...]) -> Near:
    return Near(index, expected[index].item(), got[index].item(), bool(wrong[index]), float(errors[index]))


def _around(got: Tensor, expected: Tensor, errors: Tensor, wrong: Tensor, index: tuple[int, ...]) -> Iterator[Near]:
    *row, at = index
    for column in range(max(0, at - SIDE), min(got.shape[-1], at + SIDE + 1)):
        yield _near(got, expected, errors, wrong, (*row, column))


def _hint(got: Tensor, mine: float, error: float) -> str:
    if mine != mine:
        return (
            "NaN is in the memory around inputs and in new tensors: unless it was computed, it was read or left there."
        )
    if got.dtype == torch.float32 and got.device.type == "cuda" and error < TF32:
        return 'A tl.dot of fp32 is in TF32 unless it has input_precision="ieee".'
    return ""
