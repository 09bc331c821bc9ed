"""Whether a candidate keeps results: two calls that share one, and other numbers after the timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter, process_time
from typing import Any

import torch

from mistral_nb_kernels.bench.candidate.check import check_timed, given, on_gpu, result_of, waiting
from mistral_nb_kernels.bench.candidate.failure import Failure, raised
from mistral_nb_kernels.bench.candidate.guard import poison
from mistral_nb_kernels.bench.candidate.hard import Hard
from mistral_nb_kernels.bench.case import Case, named_tensors

__all__ = ["check_again", "check_twice"]

FEWEST, ROUNDS, MOST = 5, 24, 0.65
"""Calls for numbers not seen before, each followed by one for the same, and the share of them that takes longer."""
MEMORY, SLACK = 1.1, 1e-5
"""Times as long, and seconds longer: more than that is a result that was kept."""


def check_twice(function: Callable[..., Any], hard: Hard) -> Failure | None:
    """Whether two calls write to one result: the first one's would be gone."""
    return _shared(f"{hard.case.op}, {hard.label}, {hard.dtype}", function, [hard.case.copied() for _ in range(2)])


def _shared(where: str, function: Callable[..., Any], cases: Sequence[Case]) -> Failure | None:
    results = [result_of(function, case, where) for case in cases]
    failed = next((result for result in results if isinstance(result, Failure)), None)
    if failed is not None:
        return failed
    first, second = ({x.untyped_storage().data_ptr() for _, x in named_tensors("", result)} for result in results)
    inputs = {x.untyped_storage().data_ptr() for case in cases for _, x in given(case)}
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
    numbers are those of before. By the numbers themselves it may keep them, too: then it takes longer on such as it has
    not seen. `replayed` gives the graph of a call, if that is what was timed, and it is held against the reference
    first.
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
    inputs = {x.untyped_storage().data_ptr() for _, x in given(case)}

    def replay(*own: Any, **keywords: Any) -> Any:
        refilled = [(x, x.clone()) for _, x in given(case)]
        for _, x in named_tensors("result", graph()):
            if x.untyped_storage().data_ptr() not in inputs:
                x.fill_(poison(x.dtype))
        for x, values in refilled:
            x.copy_(values)
        return graph()

    return replay


def _remembering(function: Callable[..., Any], timed: Case, other: Case, where: str) -> Failure | None:
    """Whether numbers that it has not seen take longer than those of its last call: the fastest call, and most calls.

    A machine with more to do slows down now these and now those, and may do so for longer than a round.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other where others want the cores
    own = timed.copied()
    rounds: list[list[float]] = []
    try:
        while len(rounds) < ROUNDS:
            for case, by in ((other, 0.8), (own, 0.9)):
                for _, x in given(case):
                    if x.is_floating_point():
                        x.data.mul_(by)
            _took(function, timed, (own, other))
            rounds.append([_took(function, timed, (other, own)) for _ in range(2)])
            unseen, seen = map(min, zip(*rounds, strict=True))
            if len(rounds) >= FEWEST and not _longer(unseen, seen):
                return None
        if sum(_longer(*each) for each in rounds) < MOST * ROUNDS:
            return None
    except (Exception, SystemExit) as error:  # somebody else's code
        return raised(error, f"{where} the buffers that were timed")
    finally:
        torch.set_num_threads(threads)
    longer, shorter = (f"{x * 1e6:.3g}" for x in (unseen, seen))
    words = f"It takes {longer} us for numbers that it has not seen, and {shorter} us for those of its last call: "
    return Failure(f"{where} the buffers that were timed", words + "it seems to keep results by what they are of.")


def _longer(unseen: float, seen: float) -> bool:
    return unseen > MEMORY * seen + SLACK


def _took(function: Callable[..., Any], case: Case, numbers: Sequence[Case]) -> float:
    """Seconds of a call of the case with the last of those numbers; on a CPU of this process alone, not of others.

    Each of them is written to its tensors, so that caches are the same before every call.
    """
    wait, clock = waiting(case), perf_counter if on_gpu(case) else process_time
    for each in numbers:
        _refill(case, each)
    wait()
    began = clock()
    function(*case.inputs, **case.keywords)
    wait()
    return clock() - began


def _refill(case: Case, other: Case) -> None:
    """The very tensors of `case` get the numbers of `other`; torch's count of changes does not see it."""
    for (_, into), (_, values) in zip(given(case), given(other), strict=True):
        into.data.copy_(values)
