"""Candidates that keep results: by shape, address, object or numbers, in a graph, and in one tensor for two calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.candidate import Failure, check, hard_cases, kept, load
from mistral_nb_kernels.bench.candidate.kept import check_again, check_twice
from mistral_nb_kernels.bench.case import Case
from tests.kernels.candidates import TORCH

FP16, FP32 = torch.float16, torch.float32


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a test lets pass: what else the machine does is nobody's business here."""
    now = [0.0]
    monkeypatch.setattr(kept, "process_time", lambda: now[0])
    return now


def timed(make: Callable[[], Case], function: Callable[..., Any]) -> Case:
    case = make()
    for _ in range(3):
        case.call(function)()
    return case


def gates() -> Case:
    x = torch.randn(4, 16)
    return Case("swiglu", (x,), reference.swiglu, 0, x.nbytes)


KEYS = {
    "the shape": "tuple(x.shape)",
    "the address": "x.data_ptr()",
    "the address and torch's count of changes": "(x.data_ptr(), x._version)",
    "the object": "id(x)",
    "nothing": "0",
}


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_a_candidate_that_keeps_results_is_found_out(key: str) -> None:
    kept = TORCH["swiglu"].replace("def swiglu", "def _swiglu")
    kept += f"kept = {{}}\ndef swiglu(x):\n    key = {key}\n    if key not in kept:\n        kept[key] = _swiglu(x)\n"
    function = load(kept + "    return kept[key]\n", "swiglu").function
    failure = check_again(function, timed(gates, function), gates, "4 rows, fp32")
    assert failure is not None
    assert failure.where == "swiglu, 4 rows, fp32, with other numbers in the buffers that were timed"
    assert failure.index == (0, 0)
    assert failure.hint.startswith("It was right before it was timed: it seems to keep results")


def test_a_candidate_that_keeps_none_is_right_again() -> None:
    for op, make in (("swiglu", gates), ("lora_expand", lambda: next(hard_cases("lora_expand", FP32, "cpu")).case)):
        function = load(TORCH[op], op).function
        assert check_again(function, timed(make, function), make, "") is None


def test_an_error_after_the_timing_is_told() -> None:
    text = "calls = []\ndef swiglu(x):\n    calls.append(x)\n    assert len(calls) < 4\n    return x[:, :8]"
    function = load(text, "swiglu").function
    failure = check_again(function, timed(gates, function), gates, "")
    assert failure is not None
    assert failure.words == "It ends with AssertionError"


SHARED = TORCH["swiglu"].replace("def swiglu", "def _swiglu") + "out = {}\ndef swiglu(x):\n    y = _swiglu(x)\n"
SHARED += "    return out.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)\n"


def test_two_calls_may_not_share_a_result() -> None:
    function = load(SHARED, "swiglu").function
    hard = next(hard_cases("swiglu", FP16, "cpu"))
    assert check(function, hard) is None
    failure = check_twice(function, hard)
    assert failure is not None
    assert failure.words.startswith("Two calls give one tensor: ")
    after = check_again(function, timed(gates, function), gates, "4 rows, fp32")
    assert after is not None
    assert after.words == failure.words
    for op in ("swiglu", "lora_expand", "rope_write", "add_rms_norm"):
        assert check_twice(load(TORCH[op], op).function, next(hard_cases(op, FP16, "cpu"))) is None


Took = Callable[[bool, int], float]
"""Microseconds of a call, from whether it is for the numbers of the last one, and how many such there were."""
KEEPS: dict[str, Took] = {
    "more is kept than not": lambda seen, n: 1 if seen else 1e4,
    "half is kept": lambda seen, n: 100 if seen else 180,
    "less is kept than looking takes": lambda seen, n: 108 if seen else 145,
    "others slow down the first": lambda seen, n: (100 + 5000 * (n < 6)) if seen else 180,
    "others slow down every third": lambda seen, n: (100 + 900 * (n % 3 == 0)) if seen else 180,
}
KEEPS_NONE: dict[str, Took] = {
    "all take the same": lambda seen, n: 100,
    "others slow down all but a few": lambda seen, n: 100 if seen or n % 7 == 0 else 1100,
    "others spare one": lambda seen, n: 20 if seen and n == 6 else 100,
    "others spare some": lambda seen, n: (100 if n % 2 else 50) if seen else 100,
    "numbers not seen take a little longer": lambda seen, n: 100 if seen else 115,
    "a long one": lambda seen, n: 100_000 if seen else 108_000,
}


def measured(clock: list[float], took: Took) -> Failure | None:
    """What is found of one that takes that long, by the clock that it moves."""
    counts, last = {True: 0, False: 0}, [(0.0, 0.0)]

    def function(x: torch.Tensor) -> torch.Tensor:
        key = float(x[0, 0]), float(x[-1, -1])
        seen, last[0] = key == last[0], key
        clock[0] += took(seen, counts[seen]) * 1e-6
        counts[seen] += 1
        return reference.swiglu(x)

    return check_again(function, timed(gates, function), gates, "4 rows, fp32")


@pytest.mark.parametrize("how", KEEPS)
def test_one_that_remembers_by_the_numbers_is_found_out(how: str, clock: list[float]) -> None:
    failure = measured(clock, KEEPS[how])
    assert failure is not None
    assert failure.where == "swiglu, 4 rows, fp32, with other numbers in the buffers that were timed"
    assert failure.words.endswith("for those of its last call: it seems to keep results by what they are of.")
    if how == "more is kept than not":
        assert failure.words.startswith("It takes 1e+04 us for numbers that it has not seen, and 1 us for those ")


@pytest.mark.parametrize("how", KEEPS_NONE)
def test_one_that_remembers_nothing_is_not(how: str, clock: list[float]) -> None:
    assert measured(clock, KEEPS_NONE[how]) is None


def test_one_that_ends_while_it_is_asked_again() -> None:
    text = "calls = []\ndef swiglu(x):\n    calls.append(x)\n    assert len(calls) < 9, 'worn out'\n"
    text += "    gate, up = x.chunk(2, -1)\n    return gate * gate.sigmoid() * up\n"
    function = load(text, "swiglu").function
    failure = check_again(function, timed(gates, function), gates, "4 rows, fp32")
    assert failure is not None
    assert failure.words == "It ends with AssertionError: worn out"
    assert "in swiglu" in failure.trace


def test_what_is_checked_after_the_timing_is_the_graph_that_was_timed() -> None:
    """One that launches nothing while it is captured leaves its result as it was."""
    cases = []

    def make() -> Case:
        cases.append(gates())
        return cases[-1]

    function = load(TORCH["swiglu"], "swiglu").function
    for empty in (False, True):
        case = timed(make, function)
        result = function(*case.inputs)

        def replay(result: torch.Tensor = result, case: Case = case, empty: bool = empty) -> torch.Tensor:
            return result if empty else result.copy_(function(*case.inputs))

        failure = check_again(function, case, make, "4 rows, fp32", lambda call, replay=replay: replay)
        assert (failure is None) != empty, str(failure)
    assert failure is not None
    assert failure.where.endswith("with other numbers in the graph that was timed")
    assert "is nan, not " in failure.words
