"""The GPU part `serve` on the CPU, with a tiny model: a whole run with peft beside it, and every test of the part."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_nb.engine import assembly
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb_kernels import PAGE
from tests import tiny_bench
from tests.gpu import serving
from tests.gpu import test_serve as gpu

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own affair

SHAPE = tiny_bench.SHAPE | {"max_position_embeddings": 512}
SMALL = {
    "batches": (1, 8, 9),
    "prompt": 9,
    "tokens": 6,
    "runs": 2,
    "swaps": 2,
    "loads": 2,
    "read_again": 300,
    "context": 400,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the part's own run finds, and the file that it writes."""
    pytest.importorskip("peft")
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DEVICE": "cpu", "PRECISION": "fp32", "MEASURED": SMALL, "RESULTS": results}.items():
            patch.setattr(gpu, name, value)
        with redirect_stdout(io.StringIO()) as shown:
            model = gpu.folder(tmp_path_factory.mktemp("model") / "tiny", SHAPE)
            found = gpu.run(model, tmp_path_factory.mktemp("adapters"))
        found["shown"] = shown.getvalue().splitlines()
        [found["written"]] = results.rglob("serve.json")
        yield found


def passing(found: dict[str, Any]) -> dict[str, Any]:
    """With figures that keep every bar."""
    rows = {
        key: replace(
            row,
            more=row.more and 0.01,
            step=replace(row.step, median=0.1 if row.engine == "mistral-nb" else 10.0),
        )
        for key, row in found["rows"].items()
    }
    swap = [found["report"]["swap"][0]] * 2
    load = found["report"]["load"] | {"gaps_ms": [1.0, 50.0]}
    return {**found, "rows": rows, "report": found["report"] | {"swap": swap, "load": load, "first": {"gap_ms": 49.0}}}


def test_every_case_has_a_row_and_the_texts_are_as_alone(found: dict[str, Any]) -> None:
    """In fp32 peft would have written the same: both have the same weights and the same adapters."""
    ours = [(1, 0), (1, 1), (8, 0), (8, 8), (9, 0), (9, 8), (8, 1)]
    peers = [("transformers", 1, 0), ("transformers", 8, 0), ("peft", 1, 1), ("peft", 8, 1), ("peft", 8, 8)]
    keys = [("mistral-nb", *case) for case in ours] + [(f"{name}, eager", *case) for name, *case in peers]
    assert list(found["rows"]) == keys
    for (engine, _, adapters), row in found["rows"].items():
        assert row.step.runs == 2
        assert row.step.median > 0
        assert (row.more is None) == (engine != "mistral-nb" or adapters == 0)
        assert row.same == (1.0 if engine == "mistral-nb" else None)
    assert [score["same"] for score in found["report"]["scores"]] == [1.0, 1.0]
    assert (found["rows"]["mistral-nb", 1, 1].most, found["rows"]["mistral-nb", 8, 8].goal) == (0.05, 0.10)


def test_the_figures_are_written_and_told(found: dict[str, Any]) -> None:
    written = json.loads(found["written"].read_text())
    assert written["command"] == "make gpu PART=serve"
    assert len(written["measurements"]) == len(found["rows"])
    assert {row["most"] for row in written["measurements"]} == {None, 0.05, 0.15}
    assert [one["runs"] for one in (*written["swap"], written["load"]["first"])] == [2, 2, 2]
    for gaps in (written["load"]["gaps_ms"], written["load"]["bare_gaps_ms"]):
        assert len(gaps) == 2
        assert any(f"{max(gaps):.1f}" in line for line in found["shown"] if line.startswith("one that is loaded:"))
    assert "peft" in written["versions"]
    assert any(line.split()[:4] == ["mistral-nb", "8", "8", *line.split()[3:4]] for line in found["shown"])
    assert "below" in found["shown"][-1]
    assert written["again"]["reused"] == 256
    assert any(line.startswith("a prompt of 300 tokens asked again: 256 are taken over") for line in found["shown"])


def test_every_test_of_the_part_runs(found: dict[str, Any]) -> None:
    good = passing(found)
    for case in gpu.BARS:
        gpu.test_adapters_cost_little_of_a_step(case, good)
    gpu.test_another_adapter_in_a_slot_costs_next_to_nothing(good)
    gpu.test_a_stream_has_no_gap_beside_a_loading(good)
    gpu.test_the_first_adapter_of_all_stops_nobody_either(good)
    gpu.test_up_to_eight_at_once_write_what_each_writes_alone(good)
    gpu.test_more_at_once_are_more_tokens_a_second(good)
    gpu.test_peft_finds_our_texts_as_good_as_its_own_and_is_slower(good)


def changed(found: dict[str, Any], key: tuple[str, int, int], **how: Any) -> dict[str, Any]:
    return {**found, "rows": {**found["rows"], key: replace(found["rows"][key], **how)}}


def test_what_misses_a_bar_fails(found: dict[str, Any]) -> None:
    good = passing(found)
    one, eight, nine = (("mistral-nb", *case) for case in ((1, 1), (8, 8), (9, 8)))
    report = good["report"]
    swap = [report["swap"][0], report["swap"][0] | {"median": report["swap"][0]["median"] + 1.1}]
    load = report["load"] | {"gaps_ms": [20.0, 50.1]}
    slow = replace(good["rows"][nine].step, median=1.0)
    bad = [{"loss": 0.06, "same": 0.5}, report["scores"][1]]
    for broken in (
        lambda: gpu.test_adapters_cost_little_of_a_step((1, 1), changed(good, one, more=0.051)),
        lambda: gpu.test_adapters_cost_little_of_a_step((8, 8), changed(good, eight, more=0.151)),
        lambda: gpu.test_another_adapter_in_a_slot_costs_next_to_nothing({**good, "report": report | {"swap": swap}}),
        lambda: gpu.test_a_stream_has_no_gap_beside_a_loading({**good, "report": report | {"load": load}}),
        lambda: gpu.test_the_first_adapter_of_all_stops_nobody_either(
            {**good, "report": report | {"first": {"gap_ms": 51.0}}}
        ),
        lambda: gpu.test_up_to_eight_at_once_write_what_each_writes_alone(changed(good, eight, same=0.99)),
        lambda: gpu.test_up_to_eight_at_once_write_what_each_writes_alone(changed(good, nine, same=0.89)),
        lambda: gpu.test_more_at_once_are_more_tokens_a_second(changed(good, nine, step=slow)),
        lambda: gpu.test_peft_finds_our_texts_as_good_as_its_own_and_is_slower(
            {**good, "report": report | {"scores": bad}}
        ),
        lambda: gpu.test_peft_finds_our_texts_as_good_as_its_own_and_is_slower(
            changed(good, ("peft, eager", 1, 1), step=replace(good["rows"][one].step, median=0.05))
        ),
    ):
        with pytest.raises(AssertionError):
            broken()


def test_a_gap_is_one_that_lies_beside_a_loading_if_only_in_part() -> None:
    times = [0.0, 1.0, 4.0, 5.0, 5.5, 9.0]
    assert serving.largest_gap(times, 2.0, 5.2) == 3.0
    assert serving.largest_gap(times, 4.5, 5.2) == 1.0
    assert serving.largest_gap(times, 4.5, 6.0) == 3.5


def test_tokens_after_the_first_that_differs_do_not_count() -> None:
    assert serving.same_so_far([[1, 2, 3, 4], [1, 9, 3]], [[1, 2, 3], [1, 2, 3]]) == 4 / 5
    assert serving.same_so_far([[1], [2]], [[1], [2]]) == 1.0


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU with a GPU's runner and its pages."""

    def runner(model: Transformer, pool: KVPool, threads: int, adapters: AdapterSlots) -> GraphRunner:
        pages = KVPool(model.args, len(pool.table), pool.tokens, model.kv_dtype, model.device, PAGE)
        return GraphRunner(model, pages, adapters)

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "PRECISION", "fp32")
    monkeypatch.setattr(gpu, "TINY", gpu.TINY | tiny_bench.SHAPE | {"max_position_embeddings": 512})
    monkeypatch.setattr(assembly, "DirectRunner", runner)


@pytest.mark.usefixtures("ahead")
def test_the_texts_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.test_eight_with_adapters_or_none_write_what_each_writes_alone("int8", tmp_path / "eight")
    gpu.test_what_is_paused_or_was_begun_by_another_is_as_if_alone("int4", tmp_path / "paused", monkeypatch)
    gpu.test_closing_while_an_adapter_is_read_gives_the_memory_back(tmp_path / "closing")


@pytest.mark.usefixtures("ahead")
def test_a_resident_adapter_is_swapped_without_a_wait_or_a_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CPU can tell of it: the modes that are asked for, and the kinds of steps."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    gpu.test_the_host_waits_for_no_adapter_that_is_in_a_slot(tmp_path)
    assert modes == ["error", "default"]
