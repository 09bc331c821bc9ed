"""The whole engine on an NVIDIA GPU: eight at once as each alone; and in Mistral-7B's shape speed, memory and launches.

Weights are random and made on the device. The figures go to kernels/results/<device>/engine.json, with every launch of
a decoding step. Floors are shares of the memory's speed by the data sheet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import mistral_nb_kernels  # noqa: E402
from mistral_nb import bench_engine  # noqa: E402
from mistral_nb.bench_engine import Row  # noqa: E402
from mistral_nb.bench_turns import Plan, texts  # noqa: E402
from mistral_nb.checkpoints import ModelArgs  # noqa: E402
from mistral_nb.engine import Engine, Sampling  # noqa: E402
from mistral_nb.engine.kv_pool import KVPool  # noqa: E402
from tests.engine.jobs import check_stop_and_cancel, ids, jobs, wait_until  # noqa: E402

# what other packages warn of on a host is no fault of the engine
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

RESULTS = Path(__file__).resolve().parent.parent.parent / "kernels" / "results"
DEVICE = "cuda"
SHAPE = bench_engine.SHAPE_7B
TINY = SHAPE | {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
PRECISIONS = ("bf16", "int8", "int4")
DECODED, READ = 512, 2048
"""Prompts' lengths: after which decoding, and of which the first token is held against the bars."""
TOKENS, RUNS, THREADS = 128, 7, 8
FLOORS = {"bf16": 0.78, "int8": 0.65, "int4": 0.50}
GOALS = {"bf16": 0.85, "int8": 0.80, "int4": 0.70}
FIRST_TOKEN_MS, FIRST_TOKEN_GOAL_MS, TFLOPS = 80, 60, 989
"""Of an H100 SXM, and what its data sheet gives it, as it gives an H200."""
LAUNCHES_A_LAYER, BESIDE = 6, 12
CAPTURE_S, CAPTURE_MB, LEFT_MB, KEPT_MB = 60, 1000, 1500, 100
"""What capturing a graph may take, what may be left in the process once closed, CUDA's context above all, and what may
still be taken of the GPU when all processes have ended.
"""


def folder(path: Path, shape: dict[str, Any]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(shape))
    return path


@pytest.mark.parametrize("precision", PRECISIONS)
def test_eight_at_once_write_what_each_writes_alone(precision: str, tmp_path: Path) -> None:
    engine = Engine.load(folder(tmp_path / "tiny", TINY), device=DEVICE, precision=precision, random=True)
    prompts = [texts(seed, 3 + 29 * seed, TINY["vocab_size"]) for seed in range(8)]
    try:
        alone = [[token.id for token in engine.submit(ids, Sampling(temperature=0), 40)] for ids in prompts]
        together = [engine.submit(ids, Sampling(temperature=0), 40) for ids in prompts]
        assert [[token.id for token in generation] for generation in together] == alone
        assert {len(ids) for ids in alone} == {40}
        assert len({tuple(ids) for ids in alone}) == 8
    finally:
        engine.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_twelve_write_what_each_writes_alone(precision: str, tmp_path: Path) -> None:
    """More than there are places: drawn in many ways, some with a constraint. A stop and a cancel drop what was drawn
    ahead.
    """
    engine = Engine.load(folder(tmp_path / "tiny", TINY), device=DEVICE, precision=precision, random=True)
    vocab = TINY["vocab_size"]
    try:
        alone = [ids(engine.submit(*job)) for job in jobs(vocab)]
        together = [engine.submit(*job) for job in jobs(vocab)]
        assert [ids(generation) for generation in together] == alone
        assert [len(text) for text in alone] == [job[2] for job in jobs(vocab)]
        check_stop_and_cancel(engine)
    finally:
        engine.close()


@pytest.mark.parametrize(("head_dim", "asked"), [(64, "torch"), (96, "auto"), (64, "auto")])
def test_the_tokens_are_the_cpus_whatever_runs_the_ops(
    head_dim: int, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32. A step in which torch attends or draws reads numbers on the host, and no graph holds it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.MistralConfig(**TINY | {"head_dim": head_dim})
    model = transformers.MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path)
    written = [all_written(tmp_path, "cpu", captured=False)]
    choose = mistral_nb_kernels.choose
    monkeypatch.setattr(mistral_nb_kernels, "choose", partial(choose, asked=asked))
    written.append(all_written(tmp_path, DEVICE, captured=(head_dim, asked) == (64, "auto")))
    assert written[0] == written[1]


def all_written(model: Path, device: str, captured: bool) -> list[list[int]]:
    engine = Engine.load(model, device=device, precision="fp32")
    try:
        assert engine._runner._model.ops.capturable == captured
        generations = [engine.submit(*job) for job in jobs(TINY["vocab_size"])]
        return [ids(generation) for generation in generations]
    finally:
        engine.close()


def test_the_host_waits_for_the_copy_of_tokens_and_nothing_else(tmp_path: Path) -> None:
    """torch raises where something else waits for the device, from the prompt to the place's return."""
    engine = Engine.load(folder(tmp_path / "tiny", TINY), device=DEVICE, precision="bf16", random=True)
    sampling = Sampling(temperature=0.8, seed=3, top_k=20, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.1)
    asked = texts(5, 300, TINY["vocab_size"]), sampling, 30
    try:
        expected = ids(engine.submit(*asked))
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            generation = engine.submit(*asked)
            assert ids(generation) == expected
            assert generation.finish_reason == "length"
        assert wait_until(lambda: engine._runner.pool.used == 0)
        assert engine.failure == ""
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.close()


def test_a_place_is_taken_of_a_full_gpu() -> None:
    args = ModelArgs(64, 1, 4, 2, 64, 96, 100, 1e-5, 1e6, 500)
    pool = KVPool(args, 2, 1000, torch.float16, torch.device(DEVICE))
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert pool.take(200) == 0
    assert pool.take(70) == 1
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert pool.table[:, :4].tolist() == [[0, 1, 2, 3], [4, 5, 0, 0]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """One run of everything, shown as it goes."""
    shown = pytestconfig.pluginmanager.getplugin("capturemanager")
    with shown.global_and_fixture_disabled():
        return run(folder(tmp_path_factory.mktemp("model") / bench_engine.RANDOM, SHAPE))


def run(model: Path) -> dict[str, Any]:
    """The report, which is written whatever comes of it, its engines by name and its rows by engine and length."""
    plan = Plan(
        folder=model,
        device=DEVICE,
        precisions=PRECISIONS,
        lengths=(DECODED, READ),
        threads=THREADS,
        runs=RUNS,
        tokens=TOKENS,
        random=True,
        peers=("transformers",),
        profiled=True,
    )
    report, rows = bench_engine.measure(plan, lambda line: print(line, flush=True))
    report["command"] = "make gpu PART=engine"
    name = re.sub(r"\W+", "-", report["on"]).strip("-").lower()
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    bench_engine.write_report(report, rows, RESULTS / name / "engine.json")
    engines = {engine["name"]: engine for engine in report["engines"]}
    found = {"report": report, "engines": engines, "rows": {(row.engine, row.context): row for row in rows}}
    print("\n".join([bench_engine.table(rows), *report["told"], *bars(found)]), flush=True)
    return found


def bars(found: dict[str, Any]) -> Iterator[str]:
    for precision in PRECISIONS:
        row = found["rows"].get((f"mistral-nb {precision}", DECODED))
        if row and (share := of_spec(precision, row, found)):
            yield (
                f"{precision}: {share:.1%} of the data sheet's speed in weights alone; "
                f"the floor is {FLOORS[precision]:.0%}, the goal {GOALS[precision]:.0%}"
            )
    yield f"first token of {READ}, {PRECISIONS[0]}: the floor is {FIRST_TOKEN_MS} ms, the goal {FIRST_TOKEN_GOAL_MS}"


def of_spec(precision: str, row: Row, found: dict[str, Any]) -> float | None:
    spec = found["report"]["spec_gbs"]
    read = found["engines"][f"mistral-nb {precision}"]["weight_bytes"] / 1e9
    return row.decode.median * read / spec if spec else None


def measured(found: dict[str, Any], engine: str, context: int) -> Row:
    refused = found["engines"][engine].get("refused")
    assert refused is None, refused
    row: Row = found["rows"][engine, context]
    assert row.decode.runs == RUNS
    return row


def test_what_is_written_is_what_the_model_says(found: dict[str, Any]) -> None:
    assert found["report"]["correct"], found["report"]["told"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_decoding_is_bound_by_memory(precision: str, found: dict[str, Any]) -> None:
    share = of_spec(precision, measured(found, f"mistral-nb {precision}", DECODED), found)
    if share is None:
        pytest.skip(f"the data sheet of {found['report']['on']} is not known here")
    assert share >= FLOORS[precision]


def test_the_first_token_of_a_long_prompt_comes_soon(found: dict[str, Any]) -> None:
    first = measured(found, f"mistral-nb {PRECISIONS[0]}", READ).first_token.median
    if found["report"]["spec_tflops"] != TFLOPS:
        pytest.skip(f"the bar is of {TFLOPS} TFLOP/s: {first:.1f} ms here")
    assert first <= FIRST_TOKEN_MS


def test_it_decodes_faster_than_transformers_compiled(found: dict[str, Any]) -> None:
    """In the same type, with the same weights."""
    for context in (DECODED, READ):
        ours, peer = (measured(found, name, context) for name in (f"mistral-nb {PRECISIONS[0]}", "transformers"))
        assert ours.decode.median > peer.decode.median, context


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_is_one_graph_of_few_launches(precision: str, found: dict[str, Any]) -> None:
    ending = found["engines"][f"mistral-nb {precision}"]["ending"]
    assert [one["places"] for one in ending["captures"]] == [1]
    assert ending["captures"][0]["seconds"] < CAPTURE_S
    assert 0 <= ending["captures"][0]["megabytes"] < CAPTURE_MB
    assert "launches" in ending, ending["unprofiled"]
    launches = sum(row["launches"] for row in ending["launches"])
    assert launches <= LAUNCHES_A_LAYER * SHAPE["num_hidden_layers"] + BESIDE
    assert len(ending["step"]) >= 4 * SHAPE["num_hidden_layers"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_closing_gives_the_memory_back(precision: str, found: dict[str, Any]) -> None:
    ending = found["engines"][f"mistral-nb {precision}"]["ending"]
    assert ending["torch_kept"] <= KEPT_MB * 1e6
    if found["report"]["kept_bytes"] is None:
        pytest.skip("the driver does not tell how much memory is free")
    assert ending["left"] <= LEFT_MB * 1e6
    assert found["report"]["kept_bytes"] <= KEPT_MB * 1e6
