"""A candidate's trial on the CPU: checked, timed beside the reference, and checked again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mistral_nb_kernels.bench import timing
from mistral_nb_kernels.bench.candidate import CandidateError, Failure, Note, hard_cases, judge, kept, load, named
from mistral_nb_kernels.bench.measure import Begin, Doing
from mistral_nb_kernels.bench.record import Row, Skipped
from mistral_nb_kernels.bench.registry import Asked, op_points
from tests.kernels.candidates import TORCH, TRITON

FP32 = Asked(dtypes=(torch.float32,), seq=(8,), batch=(1,), providers=("eager",))
ODD = Asked(dtypes=(torch.float32,), seq=(3,), batch=(1,), providers=("eager",))
"""What is timed is odd already."""


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a call takes longer than another is nobody's business here, and timing takes no longer than it has to."""
    monkeypatch.setattr(kept, "process_time", lambda: 0.0)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "RUNS", 3)


def trial(text: str, word: str, asked: Asked = FP32, *, timed: bool = True) -> list[Any]:
    return list(judge(load(text, word), word, asked, "cpu", timed=timed))


def failure_of(events: list[Any]) -> Failure:
    """Its last event, and the only one of its kind."""
    *before, last = events
    assert isinstance(last, Failure)
    assert not any(isinstance(event, Failure) for event in before)
    return last


def of(events: list[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def notes(events: list[Any]) -> str:
    return " ".join(note.text for note in of(events, Note))


def test_one_that_is_right_is_timed_beside_the_others() -> None:
    events = trial(TORCH["swiglu"], "swiglu")
    points, hards = op_points("swiglu", FP32, "cpu"), list(hard_cases("swiglu", torch.float32, "cpu"))
    assert len(points) >= 2
    (begin,) = of(events, Begin)
    assert events[0] is begin
    assert begin.total == len(hards) + 1 + 3 * len(points)
    assert not of(events, Failure)
    rows = of(events, Row)
    assert [(row.case, row.provider) for row in rows] == [
        (point.case, provider) for point in points for provider in ("candidate", "eager")
    ]
    assert all(row.us > 0 and row.dtype == "fp32" for row in rows)
    doing = of(events, Doing)
    assert [each.done for each in doing] == list(range(begin.total))
    assert {each.total for each in doing} == {begin.total}
    assert [each.provider for each in doing].count("candidate, on other numbers") == len(points)
    assert notes(events) == (
        f"Right on {len(hards)} hard cases in fp32. Right at odd sizes as large as the timed ones: 7 rows. Right again "
        f"on other numbers at {len(points)} timed shapes, in the same buffers and in new ones."
    )


def test_the_time_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that it moves."""
    now = [0]
    monkeypatch.setattr(timing, "now", now, raising=False)
    monkeypatch.setattr(timing, "perf_counter_ns", lambda: now[0])
    text = TORCH["swiglu"].replace("    g, u", "    timing.now[0] += 5_000_000\n    g, u")
    rows = of(trial(f"from mistral_nb_kernels.bench import timing\n{text}", "swiglu"), Row)
    assert {(row.provider, row.us) for row in rows} == {("candidate", 5000.0), ("eager", 0.0)}


def test_one_that_is_wrong_is_not_timed() -> None:
    events = trial(TORCH["swiglu"].replace("torch.exp(-g)", "torch.exp(g)"), "swiglu")
    failure = failure_of(events)
    assert failure.where == "swiglu, 3 rows of 2 x 1, fp32"
    assert failure.index == (0, 0)
    assert not of(events, Row)
    assert not of(events, Note)


@pytest.mark.parametrize("key", ["tuple(x.shape)", "x.data_ptr()", "id(x)", "(x.data_ptr(), x._version)"])
@pytest.mark.parametrize("seed", [0, None])
def test_one_that_keeps_results_is_caught_after_the_timing(key: str, seed: int | None) -> None:
    """Also where the process draws the numbers that the timing drew. `x` is kept, or its address would be another's."""
    kept = TORCH["swiglu"].replace("def swiglu", "def _swiglu") + "kept = {}\ndef swiglu(x):\n"
    kept += f"    if x.shape[1] < 10000:\n        return _swiglu(x)\n    key = {key}\n    if key not in kept:\n"
    if seed is not None:
        torch.manual_seed(seed)
    events = trial(kept + "        kept[key] = _swiglu(x), x\n    return kept[key][0]\n", "swiglu")
    failure = failure_of(events)
    assert "with other numbers in the buffers that were timed" in failure.where or "new buffers" in failure.where
    assert "seems to keep results" in failure.hint
    assert not of(events, Row)


def test_one_that_ends_with_an_error_at_a_timed_shape() -> None:
    text = TORCH["swiglu"].replace("    g, u", "    assert gate_up.shape[1] < 10000, 'too wide'\n    g, u")
    failure = failure_of(trial(text, "swiglu", ODD))
    assert failure.where.startswith("swiglu, ")
    assert failure.where.endswith(", fp32, to be timed")
    assert failure.words == "It ends with AssertionError: too wide"
    assert "in swiglu\n    assert gate_up" in failure.trace


def test_one_that_leaves_at_a_timed_shape() -> None:
    text = TORCH["swiglu"].replace("    g, u", "    gate_up.shape[1] < 10000 or exit(3)\n    g, u")
    failure = failure_of(trial(text, "swiglu", ODD))
    assert failure.words.startswith("It ends with SystemExit: 3")


def test_one_that_is_wrong_at_a_timed_shape_alone() -> None:
    text = TORCH["swiglu"].replace("return ", "y = ") + "    y[:, 9000:] += 100\n    return y\n"
    failure = failure_of(trial(text, "swiglu", ODD))
    assert failure.tensor == "result"
    assert failure.index == (0, 9000)
    assert failure.where.endswith("to be timed")


@pytest.mark.parametrize(("op", "width"), [("swiglu", 2 * 14336), ("add_rms_norm", 4096), ("rms_norm", 4096)])
def test_one_that_is_for_whole_tiles_where_rows_are_wide(op: str, width: int) -> None:
    """No hard case is as wide, and every timed one has 1 row or 8."""
    text = f"from mistral_nb_kernels.reference import {op} as _right\nimport torch\n"
    text += f"def {op}(x, *more):\n    out = _right(x, *more)\n    if x.shape[1] == {width} and len(x) > 1:\n"
    text += "        for y in out if isinstance(out, tuple) else (out,):\n            y[len(x) // 4 * 4 :] = 0\n"
    events = trial(text + "    return out\n", op)
    failure = failure_of(events)
    assert failure.where == f"{op}, 7 rows, fp32"
    assert failure.index is not None
    assert failure.index[0] == 4
    assert not of(events, Row)
    assert len(of(events, Begin)) == 1


def test_odd_sizes_that_it_declines_are_not_held_against_it() -> None:
    text = TORCH["swiglu"].replace("    g, u", "    if len(gate_up) == 7:\n        {}\n    g, u")
    events = trial(text.format("raise NotImplementedError('whole tiles only')"), "swiglu")
    assert not of(events, Failure)
    assert "Not taken by the candidate at odd sizes as large as the timed ones: " in notes(events)
    assert "Right at odd sizes" not in notes(events)
    assert {row.case for row in of(events, Row) if row.provider == "candidate"} == {"1 row", "8 rows"}


def test_one_may_decline_cases() -> None:
    text = TORCH["swiglu"].replace("    g, u", "    if gate_up.dtype != torch.float32:\n        {}\n    g, u")
    text = text.format("raise NotImplementedError('fp32 only')")
    asked = Asked(dtypes=(torch.float16, torch.float32), seq=(8,), batch=(1,), providers=("eager",))
    events = trial(text, "swiglu", asked)
    hards = len(list(hard_cases("swiglu", torch.float32, "cpu")))
    assert f"Right on {hards} hard cases" in notes(events)
    assert f"Not taken by the candidate: {hards} cases: NotImplementedError: fp32 only." in notes(events)
    skipped = of(events, Skipped)
    assert {(each.dtype, each.kind, each.why) for each in skipped} == {
        ("fp16", "absent", "not taken: NotImplementedError: fp32 only")
    }
    assert {row.dtype for row in of(events, Row) if row.provider == "candidate"} == {"fp32"}


def test_one_that_takes_nothing_is_no_candidate() -> None:
    with pytest.raises(CandidateError, match=r"takes none of the hard cases .*: NotImplementedError: not yet"):
        trial("def swiglu(x):\n    raise NotImplementedError('not yet')", "swiglu")


def test_without_timing_it_is_checked_in_every_type() -> None:
    events = trial(TORCH["swiglu"], "swiglu", Asked(), timed=False)
    assert of(events, Begin)[0].total == 3 * len(list(hard_cases("swiglu", torch.float32, "cpu")))
    assert "hard cases in bf16, fp16, fp32." in notes(events)
    assert not of(events, Row)


def test_kernels_are_checked_under_the_interpreter_and_not_timed() -> None:
    pytest.importorskip("triton")
    events = trial(TRITON["swiglu"], "swiglu", Asked())
    assert "in fp16, fp32." in notes(events)
    assert "and not timed: there is no NVIDIA GPU with Triton." in notes(events)
    assert not of(events, Row)
    assert not of(events, Failure)
    with pytest.raises(CandidateError, match="wrong in bf16: ask for --dtype fp16 or fp32"):
        trial(TRITON["swiglu"], "swiglu", Asked(dtypes=(torch.bfloat16,)))


@pytest.mark.parametrize("word", ["norm", "rope", "attention"])
def test_a_word_for_an_op_is_taken(word: str) -> None:
    events = trial(TORCH[named(word)], word, timed=False)
    assert {each.op for each in of(events, Doing)} == {named(word)}
    assert not of(events, Failure)


@pytest.mark.parametrize("op", ["decode_attention", "rms_norm", "lora_expand", "rope_write", "sample"])
def test_ops_that_write_in_place_and_ops_that_no_sweep_has_by_default(op: str) -> None:
    """What the timing has written over is not held against them."""
    asked = Asked(dtypes=(torch.float32,), seq=(16,), batch=(1,), providers=())
    events = trial(TORCH[op], op, asked)
    assert not of(events, Failure), str(failure_of(events))
    assert of(events, Row)
    assert "Right again on other numbers" in notes(events)


def test_one_that_torch_compiles_is_compiled_for_what_is_timed() -> None:
    text = "import torch\nshapes = []\ndef backend(graph, inputs):\n    shapes.append(inputs[0].shape[-1])\n"
    text += "    return graph.forward\n@torch.compile(backend=backend, dynamic=False)\n"
    text += TORCH["swiglu"].replace("import torch\n", "") + "swiglu.shapes = shapes\n"
    text = text.replace("dynamic=False)\n\n\ndef", "dynamic=False)\ndef")
    asked = Asked(dtypes=(torch.float16, torch.float32), seq=(8,), batch=(1,), providers=())
    candidate = load(text, "swiglu")
    events = list(judge(candidate, "swiglu", asked, "cpu", timed=True))
    assert not of(events, Failure)
    wide = op_points("swiglu", asked, "cpu")[0].make("cpu").inputs[0].shape[1]
    assert candidate.function.shapes.count(wide) >= len(of(events, Row)) >= 4  # type: ignore[attr-defined]


def test_a_trial_may_be_left() -> None:
    events: Iterator[Any] = judge(load(TORCH["swiglu"], "swiglu"), "swiglu", FP32, "cpu", timed=True)
    assert next(event for event in events if isinstance(event, Row)).provider == "candidate"
    events.close()  # type: ignore[attr-defined]


def test_one_that_replaces_what_it_is_judged_by_as_it_runs() -> None:
    text = TORCH["swiglu"].replace("    g, u", "    torch.nn.functional.silu = torch.relu\n    g, u")
    before = torch.nn.functional.silu
    failure = failure_of(trial(text, "swiglu", timed=False))
    assert torch.nn.functional.silu is before
    assert failure.words == "It replaces torch.nn.functional.silu, which it is judged by."


def test_its_notes_are_told() -> None:
    threads = torch.get_num_threads()
    text = TORCH["swiglu"].replace("    g, u", f"    torch.set_num_threads({threads + 2})\n    g, u")
    events = trial(f"import torch\ntorch.set_num_threads({threads + 1})\n{text}", "swiglu", timed=False)
    assert "torch.set_num_threads, for everybody: that was put back" in notes(events)
    assert torch.get_num_threads() == threads
