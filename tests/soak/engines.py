"""The engines of a soak: as it is loaded on the CPU, and one with a GPU's pages and steps, which has few of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

from torch import Tensor

from mistral_nb import models
from mistral_nb.engine import AdapterSource, Engine, scheduler
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.scheduler import Generation
from mistral_nb.engine.tokenizer import Tokenizer, load_tokenizer
from tests.finetunes.adapters import write_random
from tests.soak.asking import PAGE

__all__ = ["Pausing", "embedded", "paged", "reserves"]

CONTEXT, PLACES = 512, 8
ADAPTERS = 10
MODULES = (("q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj"), ("k_proj", "down_proj"))


class Pausing(GraphRunner):
    """Counts how often a generation is paused."""

    pauses = 0

    def pause(self, generation: Generation) -> None:
        self.pauses += 1
        super().pause(generation)


@contextmanager
def paged(model: Transformer, like: Engine, context: int, places: int, chunk: int) -> Iterator[Engine]:
    """With pages for one full context, and with adapters for half of its places: those that grow push each other out,
    and some wait for a slot.
    """
    pool = KVPool(model.args, places, context, model.kv_dtype, model.device, PAGE)
    runner = Pausing(model, pool, AdapterSlots(model.args, model.dtype, model.device, slots=places // 2))
    runner.chunk = chunk
    with mock.patch.object(scheduler, "MARGIN", PAGE // 4):
        engine = Engine(runner, replace(like.info, context=context))
        try:
            yield engine
        finally:
            engine.close()


@contextmanager
def embedded(folder: Path) -> Iterator[tuple[list[Engine], Tokenizer, list[AdapterSource]]]:
    """The embedded model's two, of one set of weights, and more adapters in `folder` than either has slots."""
    model = models.pull("embedded")
    adapters = [
        AdapterSource(str(i), write_random(folder / f"adapter-{i}", i, modules, 0.03))
        for i, modules in zip(range(ADAPTERS), itertools.cycle(MODULES), strict=False)
    ]
    loaded = Engine.load(model, precision="int8", context=2 * CONTEXT)
    try:
        runner = loaded._runner
        transformer: Transformer = runner._model  # type: ignore[attr-defined]
        small = Transformer(replace(transformer.args, context=CONTEXT), transformer.weights, transformer.ops)
        with paged(small, loaded, CONTEXT, PLACES, runner.chunk) as few:
            yield [loaded, few], load_tokenizer(model), adapters
    finally:
        loaded.close()


def reserves(engines: Sequence[Engine]) -> list[Tensor]:
    """What engines have asked the system for, and take as it is written to."""
    runners = [engine._runner for engine in engines]
    found = [runner.pool._reserve for runner in runners]
    found += [runner.adapters._memory._reserve for runner in runners if runner.adapters._memory]
    return [reserve.tensor for reserve in found if reserve]
