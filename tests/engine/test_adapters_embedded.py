"""Adapters of several ranks and scales on the embedded model, in int8 and int4: alone, together, reused, paused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_nb.checkpoints import open_checkpoint
from mistral_nb.checkpoints.adapter_tensors import MODULES
from mistral_nb.engine import AdapterSource, Engine, EngineInfo, Generation, Sampling
from mistral_nb.engine import scheduler as scheduler_module
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.runner import DirectRunner
from mistral_nb.engine.weights import load_weights
from mistral_nb_kernels import choose
from tests.engine.jobs import ids, wait_until
from tests.engine.tiny_adapters import CPU, Tiny, write

CONTEXT, PLACES, PAGE, COUNT = 256, 4, 16, 8
TEXT = [(i * i * 31 + 7 * i) % 40000 + 100 for i in range(200)]


@dataclass(frozen=True)
class Job:
    prompt: Sequence[int]
    adapter: AdapterSource | None = None
    scale: float = 1.0
    temperature: float = 0.0


@pytest.fixture(scope="module", params=["int8", "int4"])
def model(embedded: Path, request: pytest.FixtureRequest) -> Transformer:
    """In int8 with keys and values as a CPU has them that does not multiply bf16."""
    checkpoint = open_checkpoint(embedded)
    args = replace(checkpoint.args, context=CONTEXT)
    weights = load_weights(checkpoint, request.param, CPU)
    model = Transformer(args, weights, choose(CPU, args.head_dim, weights.tok_embeddings.dtype))
    if request.param == "int8":
        model.kv_dtype = torch.float32
    return model


@pytest.fixture(scope="module")
def asked(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Begun alike beyond a chunk of 128 tokens, or short; with three adapters, and none."""
    folder = tmp_path_factory.mktemp("adapters")
    sizes = Tiny(folder, None, model)  # type: ignore[arg-type]
    of = ((2, ["q_proj", "v_proj"]), (8, list(MODULES)), (48, ["gate_proj", "up_proj", "down_proj"]))
    few, every, wide = (
        write(folder / f"{rank}", sizes, modules, rank, seed=rank, layers=range(model.args.n_layers), size=0.06)
        for rank, modules in of
    )
    return [
        Job(TEXT[:156], few),
        Job(TEXT[:140], every),
        Job(TEXT[:156], every, 0.5),
        Job(TEXT[:156], wide, 2.0, 0.8),
        Job(TEXT[:156]),
        Job(TEXT[:9], every, 1.5, 0.8),
        Job(TEXT[:60], few, 0.0),
    ]


@contextmanager
def running(model: Transformer, ahead: bool, tokens: int = PLACES * CONTEXT) -> Iterator[Engine]:
    pool = KVPool(model.args, PLACES, tokens, model.kv_dtype, CPU, PAGE if ahead else None)
    slots = AdapterSlots(model.args, model.dtype, CPU, slots=PLACES)
    runner: Any = GraphRunner(model, pool, slots) if ahead else DirectRunner(model, pool, 2, slots)
    runner.chunk = 128
    engine = Engine(runner, EngineInfo("embedded", "CPU", "fp32", CONTEXT, model.args.vocab_size, 2, str(model.ops)))
    try:
        yield engine
    finally:
        engine.close()


def submitted(engine: Engine, job: Job) -> Generation:
    sampling = Sampling(temperature=job.temperature, seed=5)
    return engine.submit(job.prompt, sampling, COUNT, adapter=job.adapter, lora_scale=job.scale)


def alone(engine: Engine, jobs: Sequence[Job]) -> list[list[int]]:
    """One after another, with nothing kept from one to the next."""
    texts = []
    for job in jobs:
        assert wait_until(lambda: engine.active == 0 and engine._runner.pool.used == 0)
        engine._runner.pool.forget()
        generation = submitted(engine, job)
        texts.append(ids(generation))
        assert generation.reused == 0
    return texts


def test_together_reused_and_paused_are_as_alone(
    model: Transformer, asked: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on the CPU, and in pages that grow and run out."""
    monkeypatch.setattr(scheduler_module, "MARGIN", 0)
    moved: list[Generation] = []
    pause = GraphRunner.pause

    def pausing(runner: GraphRunner, generation: Generation) -> None:
        moved.append(generation)
        pause(runner, generation)

    monkeypatch.setattr(GraphRunner, "pause", pausing)
    with running(model, ahead=False) as engine:
        expected = alone(engine, asked)
        assert len(set(map(tuple, expected))) == len(asked)
        for order in (1, -1):
            together = [submitted(engine, job) for job in asked[::order]]
            assert [ids(generation) for generation in together] == expected[::order]
        again = submitted(engine, asked[-order])
        assert ids(again) == expected[-order]
        assert any(generation.reused for generation in (*together, again))
    with running(model, ahead=True, tokens=21 * PAGE) as engine:
        assert alone(engine, asked) == expected
        together = [submitted(engine, job) for job in asked]
        assert [ids(generation) for generation in together] == expected
    assert any(generation.adapter is not None and generation.drawn for generation in moved)
