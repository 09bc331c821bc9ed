"""A whole run of `bench engine` beside a peer: the GPU part of the engine's tests, on the CPU with a tiny model.

A GPU's time is not for its slips.
"""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import tiny_bench
from tests.gpu import test_engine as gpu

CAPTURE = {"places": 1, "seconds": 0.5, "megabytes": 20.0}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the part's own run finds, and the file that it writes; a CPU captures nothing and keeps nothing."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        for name, value in {
            **{"DEVICE": "cpu", "SHAPE": gpu.TINY, "PRECISIONS": ("fp32", "int8"), "RESULTS": results},
            **{"DECODED": 9, "READ": 20, "TOKENS": 6, "RUNS": 2, "THREADS": 1},
        }.items():
            patch.setattr(gpu, name, value)
        with redirect_stdout(io.StringIO()) as shown:
            found = gpu.run(gpu.folder(tmp_path_factory.mktemp("model") / "tiny", gpu.TINY))
        found["shown"] = shown.getvalue().splitlines()
        [found["written"]] = results.rglob("engine.json")
        for engine in ("mistral-nb fp32", "mistral-nb int8"):
            ending = found["engines"][engine]["ending"]
            ending |= {"captures": [CAPTURE], "torch_kept": 0, "left": 10**9, "step": [{"name": "linear_kernel"}] * 16}
        found["report"] |= {"spec_gbs": 1e-9, "spec_tflops": gpu.TFLOPS, "kept_bytes": 0}
        patch.setitem(gpu.FLOORS, "fp32", 0.8)
        patch.setitem(gpu.GOALS, "fp32", 0.9)
        patch.setattr(gpu, "BESIDE", 10_000)
        patch.setattr(gpu, "FIRST_TOKEN_MS", 60_000)  # of two runs, in which a machine may stand still
        yield found


def test_engines_take_turns_on_the_same_random_weights(found: dict[str, Any]) -> None:
    """In fp32 ours writes what transformers writes: the weights that both make are the same."""
    names = ["mistral-nb fp32", "mistral-nb int8", "transformers"]
    assert list(found["rows"]) == [(name, length) for length in (9, 20) for name in names]
    for row in found["rows"].values():
        assert row.decode.median > 0 < row.first_token.median
        assert row.decode.runs == row.first_token.runs == row.prefill.runs == 2
        assert row.share_of_read
        assert row.share_of_spec is row.share_of_peak is None
        assert row.same is not None
    turns = [line.partition(" at ")[0] for line in found["shown"] if " at 20: first token after " in line]
    assert turns == names * 4
    ours, int8, peer = (found["engines"][name] for name in names)
    assert ours["scores"] == peer["scores"] == {"9": {"same": 1.0, "loss": 0.0}, "20": {"same": 1.0, "loss": 0.0}}
    assert any(line.startswith("mistral-nb, int8, at 20: decodes ") for line in found["shown"])
    layer = 512 * (8 + 2 * 2) * 64 + 8 * 64 * 512 + 3 * 512 * 1024
    matrices, norms = 4 * layer + 1024 * 512, (2 * 4 + 1) * 512
    assert ours["weight_bytes"] == 4 * (matrices + norms + 512)
    assert peer["weight_bytes"] == 4 * (matrices + norms)
    assert matrices < int8["weight_bytes"] < 1.05 * matrices
    assert ours["kv_bytes"] == peer["kv_bytes"] == 2 * 4 * 2 * 64 * 4


def test_every_test_of_the_part_runs(found: dict[str, Any]) -> None:
    assert [line.partition(":")[0] for line in gpu.bars(found)] == ["fp32", "int8", "first token of 20, fp32"]
    gpu.test_what_is_written_is_what_the_model_says(found)
    gpu.test_the_first_token_of_a_long_prompt_comes_soon(found)
    for precision in gpu.PRECISIONS:
        gpu.test_decoding_is_bound_by_memory(precision, found)
        gpu.test_a_step_is_one_graph_of_few_launches(precision, found)
        gpu.test_closing_gives_the_memory_back(precision, found)


def test_the_figures_are_written(found: dict[str, Any]) -> None:
    written = json.loads(found["written"].read_text())
    assert written["command"] == "make gpu PART=engine"
    assert {row["engine"] for row in written["measurements"]} == {"mistral-nb fp32", "mistral-nb int8", "transformers"}
    launches = written["engines"][0]["ending"]["launches"]
    assert {"name", "launches", "us"} == set(launches[0])


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"spec_gbs": 1e9}, lambda found: gpu.test_decoding_is_bound_by_memory("int8", found)),
        ({"correct": None}, gpu.test_what_is_written_is_what_the_model_says),
        ({"kept_bytes": 10**9}, lambda found: gpu.test_closing_gives_the_memory_back("int8", found)),
    ],
)
def test_what_misses_a_bar_fails(changes: dict[str, Any], broken: Any, found: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        broken({**found, "report": {**found["report"], **changes}})


def test_fewer_runs_fail(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RUNS", 3)
    with pytest.raises(AssertionError):
        gpu.test_the_first_token_of_a_long_prompt_comes_soon(found)


def test_too_many_launches_fail(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "BESIDE", 0)
    with pytest.raises(AssertionError):
        gpu.test_a_step_is_one_graph_of_few_launches("int8", found)


def test_it_decodes_faster_or_fails(found: dict[str, Any]) -> None:
    row = found["rows"]["transformers", gpu.READ]
    twice = replace(row, decode=replace(row.decode, median=2 * row.decode.median))
    peers = {("transformers", context): row for context in (gpu.DECODED, gpu.READ)}
    ours = {("mistral-nb fp32", context): twice for context in (gpu.DECODED, gpu.READ)}
    gpu.test_it_decodes_faster_than_transformers_compiled({**found, "rows": {**peers, **ours}})
    with pytest.raises(AssertionError):
        gpu.test_it_decodes_faster_than_transformers_compiled(
            {**found, "rows": {**peers, **ours, ("mistral-nb fp32", gpu.READ): row}}
        )


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_eight_at_once_on_the_cpu(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "TINY", gpu.TINY | tiny_bench.SHAPE | {"max_position_embeddings": 512})
    gpu.test_eight_at_once_write_what_each_writes_alone(precision, tmp_path)
