"""Holding a candidate against the reference on a hard case, and telling where it goes wrong."""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.candidate.guard import Guard, bits, poison
from mistral_nb_kernels.bench.candidate.hard import Hard
from mistral_nb_kernels.bench.candidate.source import own_lines, said
from mistral_nb_kernels.bench.case import Case, named_tensors
from mistral_nb_kernels.bench.record import dtype_name

__all__ = ["Failure", "Near", "check", "check_again", "check_timed", "check_twice", "raised"]

LOOSE = 2e-2
"""Of a row's largest: where a candidate was right in fp64's measure, and now has to be itself."""
SIDE = 3
"""Elements shown on each side of the first wrong one."""
UNITS = 16
"""In the last place, of a row's largest: what a sum in fp32 may always be off. Torch's own are made in pairs, which is
more exact than most orders.
"""
ROUNDS = 8
MEMORY, SOON = 4.0, 3e-5
"""Times as long, and seconds longer: numbers not seen before take that in no round but where results are kept."""
BARE: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
TF32 = 5e-3
"""Of a row's largest: products of TF32 are off by less."""


@dataclass(frozen=True, slots=True)
class Near:
    """An element at or beside the first wrong one."""

    index: tuple[int, ...]
    expected: float
    got: float
    wrong: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """What a candidate does otherwise than the reference, at the first case where it does.

    words: it in a sentence; where: of the case, op, shape and type. Where numbers are wrong: the tensor ("result",
    "result[1]", an input such as "kv.k"), the first wrong one's index, what it is and should be; off of its `of`
    numbers are wrong. error and allowed are of the largest of the row (the last axis), 0 where numbers are equal or
    wrong. around: its neighbours. trace: the candidate's own lines, where it ended with an error.
    """

    where: str
    words: str
    tensor: str = ""
    index: tuple[int, ...] | None = None
    got: float | None = None
    expected: float | None = None
    off: int = 0
    of: int = 0
    error: float = 0.0
    allowed: float = 0.0
    around: tuple[Near, ...] = ()
    trace: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}\n{self.words}", self.trace, "\n".join(self._lines()), self.hint]
        return "\n".join(part for part in parts if part)

    def markdown(self) -> str:
        """The same with the numbers and the lines as blocks of code."""
        block = "\n".join(part for part in (self.trace, "\n".join(self._lines())) if part)
        parts = [f"**{_plain(self.where)}**", _plain(self.words), block and f"```text\n{block}\n```", _plain(self.hint)]
        return "\n\n".join(part for part in parts if part)

    def _lines(self) -> Iterator[str]:
        if not self.around:
            return
        rows = [("", "index", "expected", "got")]
        for near in self.around:
            index = f"[{', '.join(map(str, near.index))}]"
            rows.append((">" if near.index == self.index else "", index, _number(near.expected), _number(near.got)))
            if near.wrong:
                rows[-1] = (*rows[-1][:3], f"{rows[-1][3]}  wrong")
        wide = [max(len(row[column]) for row in rows) for column in range(3)]
        for mark, index, expected, got in rows:
            yield f"{mark:<2}{index:<{wide[1]}}  {expected:>{wide[2]}}  {got}".rstrip()


def _plain(words: str) -> str:
    """Words in which Markdown finds nothing of its own."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~$&" else c for c in words)


def _number(x: float) -> str:
    return str(x) if isinstance(x, int) else f"{x:.6g}"


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
    got = _run(function, mine, where, guard)
    if isinstance(got, Failure):
        return got
    expected, true = (each.call(each.reference)() for each in (theirs, truth))
    judged = _Judged(where, hard.rows, hard.undefined)
    failure = judged.result(got, expected, true) or judged.inputs(case, mine, theirs, truth)
    failure = failure or judged.outside(case, mine)
    if failure is None and (words := guard.broken()):
        return Failure(where, words)
    return failure


def check_twice(function: Callable[..., Any], hard: Hard) -> Failure | None:
    """Whether two calls write to one result: the first one's would be gone."""
    return _shared(f"{hard.case.op}, {hard.label}, {hard.dtype}", function, [hard.case.copied() for _ in range(2)])


def _shared(where: str, function: Callable[..., Any], cases: Sequence[Case]) -> Failure | None:
    results = [_run(function, case, where) for case in cases]
    failed = next((result for result in results if isinstance(result, Failure)), None)
    if failed is not None:
        return failed
    first, second = ({x.untyped_storage().data_ptr() for _, x in named_tensors("", result)} for result in results)
    inputs = {x.untyped_storage().data_ptr() for case in cases for _, x in _given(case)}
    if (first & second) - inputs:
        words = "Two calls give one tensor: it keeps results, or writes the second over the first. Make a new one."
        return Failure(where, words, "result")
    return None


Replayed = Callable[[Callable[[], Any]], Callable[[], Any] | None]


def check_again(
    function: Callable[..., Any],
    timed: Case,
    make: Callable[[], Case],
    label: str,
    replayed: Replayed = lambda call: None,
) -> Failure | None:
    """The same of a case that was timed, with other numbers: in the buffers that were timed, then in new ones.

    So a candidate that keeps a result by the shape, the address or the identity of what it is given is found out: its
    numbers are those of before. They may be off by `LOOSE` of a row's largest. By the numbers themselves it may keep
    them, too: then it takes several times as long on such as it has not seen. `replayed` gives the graph of a call, if
    that is what was timed, and it is held against the reference first.
    """
    where = f"{timed.op}, {label}, with other numbers in"
    graph, other, new = replayed(timed.call(function)), make(), make()
    calls = [(function, timed, "the buffers that were timed"), (function, new, "new buffers")]
    if graph is not None:
        calls.insert(0, (_poisoning(graph, timed), timed, "the graph that was timed"))
    for call, case, buffers in calls:
        if case is timed:
            _refill(timed, other)
        failure = check_timed(call, case, f"{where} {buffers}")
        if failure is not None:
            hint = "It was right before it was timed: it seems to keep results, so that what was timed is no work."
            return replace(failure, hint=hint)
    return _shared(f"{where} new buffers", function, [other, new]) or _remembering(function, timed, other, where)


def _poisoning(graph: Callable[[], Any], case: Case) -> Callable[..., Any]:
    """The replay of a graph as a function of what it was captured with; what it does not write is poison."""
    inputs = {x.untyped_storage().data_ptr() for _, x in _given(case)}

    def replay(*given: Any, **keywords: Any) -> Any:
        refilled = [(x, x.clone()) for _, x in _given(case)]
        for _, x in named_tensors("result", graph()):
            if x.untyped_storage().data_ptr() not in inputs:
                x.fill_(poison(x.dtype))
        for x, values in refilled:
            x.copy_(values)
        return graph()

    return replay


def _remembering(function: Callable[..., Any], timed: Case, other: Case, where: str) -> Failure | None:
    """Whether numbers that it has not seen take much longer than those of its last call, however often one tries."""
    times = []
    for _ in range(ROUNDS):
        for case, by in ((other, 0.8), (timed, 0.9)):
            for _, x in _given(case):
                if x.is_floating_point():
                    x.data.mul_(by)
        start = timed.copied()
        _took(function, other)
        times.append((_took(function, _refill(timed, start)), _took(function, _refill(timed, start))))
        if times[-1][0] < MEMORY * times[-1][1] + SOON:
            return None
    unseen, seen = (min(each) * 1e6 for each in zip(*times, strict=True))
    words = f"It takes {unseen:.3g} us for numbers that it has not seen, and {seen:.3g} us for those of its last call: "
    return Failure(f"{where} the buffers that were timed", words + "it seems to keep results by what they are of.")


def _took(function: Callable[..., Any], case: Case) -> float:
    """Seconds."""
    wait = _waiting(case)
    began = perf_counter()
    function(*case.inputs, **case.keywords)
    wait()
    return perf_counter() - began


def _waiting(case: Case) -> Callable[[], None]:
    """What waits until a call of it is done."""
    on_gpu = any(x.device.type == "cuda" for _, x in _given(case))
    return torch.cuda.synchronize if on_gpu else lambda: None


def check_timed(function: Callable[..., Any], case: Case, where: str) -> Failure | None:
    """What it does wrongly on a case as large as those that are timed, in the very tensors of the case.

    Nothing tells it that it is checked: its new tensors are not poisoned.
    """
    was, theirs = case.copied(), case.copied()
    expected = theirs.call(theirs.reference)()
    got = _run(function, case, where)
    if isinstance(got, Failure):
        return got
    judged = _Judged(where, loose=LOOSE)
    return judged.result(got, expected, expected) or judged.inputs(was, case, theirs, theirs)


def _run(
    function: Callable[..., Any], case: Case, where: str, guard: contextlib.AbstractContextManager[Any] = BARE
) -> Any:
    """Its result, or how it failed."""
    try:
        with guard, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of which the interpreter is made
            got = function(*case.inputs, **case.keywords)
            _waiting(case)()
    except NotImplementedError:
        raise
    except (Exception, SystemExit) as error:  # somebody else's code
        return raised(error, where)
    return got


def raised(error: BaseException, where: str) -> Failure:
    """A candidate that ended with an error."""
    return Failure(where, f"It ends with {said(error)}", trace=own_lines(error))


def _refill(case: Case, other: Case) -> Case:
    """The very tensors of `case` with the numbers of `other`; torch's count of changes does not see it."""
    for (_, into), (_, values) in zip(_given(case), _given(other), strict=True):
        into.data.copy_(values)
    return case


def _given(case: Case) -> Iterator[tuple[str, Tensor]]:
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
    """Where, and by what: rows, undefined of `Hard`; loose: what numbers may be off in place of the rule's."""

    where: str
    rows: tuple[str, ...] = ()
    undefined: tuple[int, ...] = ()
    loose: float | None = None

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
        errors, allowed = _errors(got, expected, truth, counts, self.loose)
        wrong = ~(errors <= allowed)
        if not wrong.any():
            return None
        places = wrong.nonzero()
        index = tuple(places[0].tolist())
        mine, right, error = got[index].item(), expected[index].item(), float(errors[index])
        words = f"{_at(name, index)}{f' ({rows[index[0]]})' if rows else ''} is {_number(mine)}, not {_number(right)}"
        if got.is_floating_point() and math.isfinite(error):
            words += f": off by {error:.2g} of its row's largest, of which {allowed:.2g} are allowed"
        words += f". {len(places)} of {got.numel()} numbers are wrong{_within(places)}."
        return Failure(
            *(self.where, words, name, index, mine, right, len(places), got.numel(), error, allowed),
            around=tuple(_around(got, expected, wrong, index)),
            hint=_hint(got, mine, error),
        )

    def inputs(self, before: Case, mine: Case, theirs: Case, truth: Case) -> Failure | None:
        """Inputs that are left otherwise than by the reference; rows that it writes are held as a result's are."""
        true = dict(_given(truth))
        for (name, was), (_, got), (_, expected) in zip(*map(_given, (before, mine, theirs)), strict=True):
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
        was_is = f"was {_number(before)} and is {_number(mine)}"
        words = f"It changes {what or 'its input'} {name}: {_at(name, index)} {was_is}."
        return Failure(self.where, words, name, index, mine, before, int(foreign.sum()), foreign.numel())

    def outside(self, before: Case, mine: Case) -> Failure | None:
        """What is written beside the inputs, in the storage that they are views of."""
        shared: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        for (name, was), (_, got) in zip(_given(before), _given(mine), strict=True):
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


def _at(name: str, index: Sequence[int]) -> str:
    return f"{name}[{', '.join(map(str, index))}]"


def _errors(got: Tensor, expected: Tensor, truth: Tensor, counts: Tensor, loose: float | None) -> tuple[Tensor, float]:
    """Of every number, of its row's largest, and what is allowed; of integers 0 where they are equal, else 1."""
    if not got.is_floating_point():
        return ((got != expected) & counts).double(), 0.0
    true = truth.double()
    size = true.abs().amax(-1, keepdim=True)
    nonzero = torch.where(size > 0, size, 1.0)
    mine, theirs = (torch.where(counts, (x.double() - true).abs() / nonzero, 0.0) for x in (got, expected))
    if loose is not None:
        return mine, loose
    mine = torch.where((size == 0) & (mine > 0), torch.inf, mine)
    eps = torch.finfo(got.dtype).eps
    return mine, max(float(2 * theirs.max()) + eps, UNITS * eps if got.dtype == torch.float32 else 0.0)


def _within(places: Tensor) -> str:
    """The least block that holds all of them."""
    if len(places) == 1:
        return ""
    ends = zip(places.amin(0).tolist(), places.amax(0).tolist(), strict=True)
    return f", all within [{', '.join(str(low) if low == high else f'{low}..{high}' for low, high in ends)}]"


def _around(got: Tensor, expected: Tensor, wrong: Tensor, index: tuple[int, ...]) -> Iterator[Near]:
    *row, at = index
    for column in range(max(0, at - SIDE), min(got.shape[-1], at + SIDE + 1)):
        place = (*row, column)
        yield Near(place, expected[place].item(), got[place].item(), bool(wrong[place]))


def _hint(got: Tensor, mine: float, error: float) -> str:
    if mine != mine:
        return (
            "NaN is in the memory around inputs and in new tensors: unless it was computed, it was read or left there."
        )
    if got.dtype == torch.float32 and got.device.type == "cuda" and error < TF32:
        return 'A tl.dot of fp32 is in TF32 unless it has input_precision="ieee".'
    return ""
