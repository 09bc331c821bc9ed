"""Many at once on an NVIDIA GPU, each with its adapter: the texts that each has alone, and what adapters cost.

Weights and adapters are random, the model in Mistral-7B's shape. The figures go to kernels/results/<device>/serve.json,
those of transformers and peft in the same run beside them.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from mistral_nb.bench_engine import LOSS  # noqa: E402
from mistral_nb.bench_peers import versions  # noqa: E402
from mistral_nb.bench_report import Measurement, machine, write_report  # noqa: E402
from mistral_nb.bench_turns import texts  # noqa: E402
from mistral_nb.checkpoints import ModelArgs  # noqa: E402
from mistral_nb.engine import AdapterSource, Engine, Sampling, assembly, scheduler  # noqa: E402  # noqa: E402
from mistral_nb.engine.device import side_stream  # noqa: E402
from mistral_nb.engine.scheduler import Generation  # noqa: E402
from mistral_nb_kernels import PAGE  # noqa: E402
from tests.engine.jobs import ids, jobs, wait_until  # noqa: E402
from tests.gpu.peft_peer import PeftPeer, lacking  # noqa: E402
from tests.gpu.serving import COLUMNS, Row, Serving, Setup, write_adapter  # noqa: E402
from tests.gpu.test_engine import SHAPE, TINY, folder  # noqa: E402

# what other packages warn of on a host is no fault of the engine
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

RESULTS = Path(__file__).resolve().parent.parent.parent / "kernels" / "results"
DEVICE = "cuda"
PRECISION = "bf16"
PRECISIONS = ("bf16", "int8", "int4")
MEASURED: dict[str, Any] = {}
"""Of `Setup`, what is not as it is there."""
ONE, EIGHT = (1, 1), (8, 8)
BARS = {ONE: (0.05, 0.03), EIGHT: (0.15, 0.10)}
"""By rows and adapters among them: what these may add to a step, and what they should."""
SWAP_MS, SWAP_GOAL_MS = 1.0, 0.1
GAP_MS, GAP_GOAL_MS = 50.0, 20.0
ALIKE = 150
"""Tokens with which prompts begin."""
AGREED = 0.9
"""Of the tokens beyond eight at once, whose products are cuBLAS's and depend on the number of rows."""


def sources(path: Path, count: int, rank: int = 16) -> list[AdapterSource]:
    args = ModelArgs.from_folder(path / "tiny")
    for index in range(count):
        write_adapter(path / str(index), args, rank, index)
    return [AdapterSource(str(index), path / str(index)) for index in range(count)]


def loaded(path: Path, precision: str, **how: Any) -> Engine:
    if not (path / "tiny").exists():
        path.mkdir(exist_ok=True)
        folder(path / "tiny", TINY)
    return Engine.load(path / "tiny", device=DEVICE, precision=precision, random=True, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_eight_with_adapters_or_none_write_what_each_writes_alone(precision: str, tmp_path: Path) -> None:
    """Two of the base, six adapters, of which one twice with other scales; then another of each slot."""
    engine = loaded(tmp_path, precision)
    of = sources(tmp_path, 6)
    adapters = [(None, 1.0), (of[0], 1.0), (of[1], 1.0), (of[0], 0.5), (None, 1.0), *((one, 2.0) for one in of[2:5])]

    def submitted(row: int, adapter: AdapterSource | None, scale: float) -> Any:
        prompt = texts(row, 3 + 29 * row, TINY["vocab_size"])
        return engine.submit(prompt, Sampling(temperature=0), 40, adapter=adapter, lora_scale=scale)

    try:
        for asked in (adapters, [*adapters[3:], *adapters[:3]]):
            alone = [ids(submitted(row, *how)) for row, how in enumerate(asked)]
            together = [submitted(row, *how) for row, how in enumerate(asked)]
            assert [ids(generation) for generation in together] == alone
            assert {len(text) for text in alone} == {40}
            bare = [ids(submitted(row, None, 1.0)) for row in range(8)]
            assert [text == own for text, own in zip(alone, bare, strict=True)] == [how[0] is None for how in asked]
            assert ids(submitted(1, of[5], 0.0)) == bare[1]
    finally:
        engine.close()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_paused_or_was_begun_by_another_is_as_if_alone(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pages for one full context, prompts that begin alike, drawn in many ways with three adapters or none."""
    monkeypatch.setattr(scheduler, "MARGIN", 0)
    engine = loaded(tmp_path, precision)
    of = [None, *sources(tmp_path, 3)]
    alone = [ids(generation) for generation in alike(engine, of, alone=True)]
    engine.close()
    monkeypatch.setattr(assembly, "kv_tokens", lambda *_: TINY["max_position_embeddings"])
    engine = loaded(tmp_path, precision, max_batch=4)
    runner: Any = engine._runner
    pause = runner.pause
    paused: list[Generation] = []

    def pausing(generation: Generation) -> None:
        paused.append(generation)
        pause(generation)

    monkeypatch.setattr(runner, "pause", pausing)
    try:
        together = list(alike(engine, of))
        assert [ids(generation) for generation in together] == alone
        assert any(generation.drawn for generation in paused)
        assert any(generation.adapter for generation in paused)
        assert {generation.reused for generation in together} == {0, ALIKE // PAGE * PAGE}
        assert wait_until(lambda: runner.pool.used == 0)
        assert engine.failure == ""
    finally:
        engine.close()


def alike(engine: Engine, adapters: list[AdapterSource | None], alone: bool = False) -> Iterator[Generation]:
    """Generations whose prompts begin alike, one after another or at once."""
    engine._runner.chunk = 2 * PAGE
    same = texts(9, ALIKE, TINY["vocab_size"])
    for row, (prompt, sampling, _, stop_ids, on_token, constraint) in enumerate(jobs(TINY["vocab_size"])[4:]):
        generation = engine.submit(
            same + prompt, sampling, 60, stop_ids, on_token, constraint, adapters[row % len(adapters)]
        )
        assert not alone or wait_until(lambda each=generation: each.finish_reason is not None)  # type: ignore[misc]
        yield generation


def test_the_host_waits_for_no_adapter_that_is_in_a_slot(tmp_path: Path) -> None:
    """torch raises where something else than the copy of tokens waits for the device; so do swaps, which capture
    nothing.
    """
    engine = loaded(tmp_path, PRECISION)
    of = sources(tmp_path, 2)
    runner: Any = engine._runner
    prompt = texts(5, 300, TINY["vocab_size"])
    try:
        expected = [ids(engine.submit(prompt, Sampling(temperature=0), 30, adapter=one)) for one in of]
        assert expected[0] != expected[1]
        captured = len(getattr(runner, "_steps", ()))
        torch.cuda.set_sync_debug_mode("error")
        for turn in range(4):
            generation = engine.submit(prompt, Sampling(temperature=0), 30, adapter=of[turn % 2])
            assert ids(generation) == expected[turn % 2]
        assert wait_until(lambda: runner.pool.used == 0)
        assert len(getattr(runner, "_steps", ())) == captured
        assert engine.failure == ""
    finally:
        torch.cuda.set_sync_debug_mode("default")
        engine.close()


def test_no_step_is_captured_on_a_stream_that_adapters_are_read_on() -> None:
    """torch hands its streams out in turn."""
    device = torch.device(DEVICE)
    capturing, reading = (
        {make().cuda_stream for _ in range(40)} for make in (torch.cuda.Stream, lambda: side_stream(device))
    )
    assert capturing.isdisjoint(reading)


def test_closing_while_an_adapter_is_read_gives_the_memory_back(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    engine = loaded(tmp_path, PRECISION)
    of = sources(tmp_path, 8)
    ids(engine.submit([1, 2, 3], Sampling(temperature=0), 2, adapter=of[0]))
    asked = [engine.submit([1, 2, 3], Sampling(temperature=0), 2, adapter=one) for one in of]
    engine.close()
    assert {generation.finish_reason for generation in asked} <= {"cancelled", "length"}
    del engine, asked
    gc.collect()
    assert torch.cuda.memory_allocated() <= before


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> dict[str, Any]:
    """One run of everything, shown as it goes."""
    shown = pytestconfig.pluginmanager.getplugin("capturemanager")
    with shown.global_and_fixture_disabled():
        return run(folder(tmp_path_factory.mktemp("model") / "random-7b", SHAPE), tmp_path_factory.mktemp("adapters"))


def run(model: Path, adapters: Path) -> dict[str, Any]:
    """The report, which is written whatever comes of it, and its rows by engine, batch and adapters."""
    setup = Setup(model, DEVICE, PRECISION, **MEASURED)  # type: ignore[arg-type]
    report: dict[str, Any] = {**machine(), "command": "make gpu PART=serve", "on": setup.device, "peer": lacking()}
    report |= {"setup": {**asdict(setup), "folder": model.name}, "versions": versions()}
    serving = Serving(setup, adapters, say)
    try:
        report["on"] = serving.engine.info.device
        report["first"] = serving.first_adapter()
        rows = serving.rows(BARS)
        report["swap"] = [asdict(one) for one in serving.swaps()]
        report["load"] = serving.loadings()
        report["again"] = serving.again()
        written = {adapter: serving.written(adapter, adapter) for adapter in range(2)}
        prompts = [serving.prompt(row) for row in range(setup.adapters)]
    finally:
        serving.close()
    if not report["peer"]:
        peer = PeftPeer(setup, serving.adapters, say)
        rows += peer.rows(prompts)
        report["scores"] = [peer.score(adapter, prompts[adapter], text) for adapter, text in written.items()]
        peer.close()
    path = RESULTS / re.sub(r"\W+", "-", report["on"]).strip("-").lower() / "serve.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, rows, path)
    found = {"report": report, "rows": {(row.engine, row.batch, row.adapters): row for row in rows}}
    say("\n".join([table(rows), *told(report)]))
    return found


def say(line: str) -> None:
    print(line, flush=True)


def table(rows: list[Row]) -> str:
    width = max(len(row.engine) for row in rows)
    return "\n".join([" " * width + COLUMNS, *(f"{row.engine:<{width}}{row}" for row in rows)])


def told(report: dict[str, Any]) -> Iterator[str]:
    yield (
        f"another adapter that is in a slot: {swap_ms(report):+.3f} ms to the first token; "
        f"at most {SWAP_MS}, the goal {SWAP_GOAL_MS}"
    )
    load = report["load"]
    yield (
        f"one that is loaded: gaps of up to {max(load['gaps_ms']):.1f} ms in a stream beside it (at most {GAP_MS:.0f}, "
        f"the goal {GAP_GOAL_MS:.0f}; beside a request of the base {max(load['bare_gaps_ms']):.1f}), its first token "
        f"after {load['first']['median']:.0f} ms"
    )
    again = report["again"]
    yield (
        f"a prompt of {again['tokens']} tokens asked again: {again['reused']} are taken over, its first token comes in "
        f"{again['again']['median'] / again['fresh']['median']:.0%} of the time"
    )
    beside = report["first"]["gap_ms"]
    yield f"the first of all, with whatever is compiled and captured for it: a gap of {beside:.0f} ms"
    if report["peer"]:
        yield report["peer"]
    else:
        yield f"by peft's scores our texts with adapters are {max(each['loss'] for each in report['scores']):.2%} below"


def swap_ms(report: dict[str, Any]) -> float:
    again, other = (Measurement(**one) for one in report["swap"])
    return other.median - again.median


def more(found: dict[str, Any], case: tuple[int, int]) -> float:
    row: Row = found["rows"]["mistral-nb", *case]
    assert row.more is not None
    assert row.step.runs == found["report"]["setup"]["runs"]
    return row.more


@pytest.mark.parametrize("case", BARS)
def test_adapters_cost_little_of_a_step(case: tuple[int, int], found: dict[str, Any]) -> None:
    assert more(found, case) <= BARS[case][0]


def test_another_adapter_in_a_slot_costs_next_to_nothing(found: dict[str, Any]) -> None:
    assert swap_ms(found["report"]) < SWAP_MS


def test_a_stream_has_no_gap_beside_a_loading(found: dict[str, Any]) -> None:
    gaps = found["report"]["load"]["gaps_ms"]
    assert len(gaps) == found["report"]["setup"]["loads"]
    assert max(gaps) <= GAP_MS


def test_the_first_adapter_of_all_stops_nobody_either(found: dict[str, Any]) -> None:
    assert found["report"]["first"]["gap_ms"] <= GAP_MS


def test_up_to_eight_at_once_write_what_each_writes_alone(found: dict[str, Any]) -> None:
    """Beyond, agreement is told and bounded."""
    ours = [row for row in found["rows"].values() if row.engine == "mistral-nb"]
    assert {row.same for row in ours if row.batch <= found["report"]["setup"]["alone"]} == {1.0}
    assert all(row.same >= AGREED for row in ours)


def test_more_at_once_are_more_tokens_a_second(found: dict[str, Any]) -> None:
    """With adapters and without."""
    batches = sorted({row.batch for row in found["rows"].values() if row.engine == "mistral-nb"})
    for some in (False, True):
        rows = [found["rows"]["mistral-nb", batch, min(batch, EIGHT[1]) * some] for batch in batches]
        speeds = [row.tokens_per_second for row in rows]
        assert speeds == sorted(speeds)


def test_peft_finds_our_texts_as_good_as_its_own_and_is_slower(found: dict[str, Any]) -> None:
    if found["report"]["peer"]:
        pytest.skip(found["report"]["peer"])
    assert all(score["loss"] <= LOSS for score in found["report"]["scores"])
    for row in found["rows"].values():
        ours = found["rows"].get(("mistral-nb", row.batch, row.adapters))
        if row.engine != "mistral-nb" and ours is not None:
            assert ours.step.median < row.step.median, row
