"""Capturing a step, on the CPU with a CUDA that only tells what it was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_nb.engine import graphs
from mistral_nb.engine.bench_probe import Captures
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb_kernels import Choice
from mistral_nb_kernels.configs import Config
from tests.engine.tiny_adapters import CONTEXT, CPU, tiny, write

PLACES = 4


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GraphRunner:
    """Of a model whose ops a graph could hold, with an adapter in a slot."""
    free = iter(range(10**9, 0, -(10**8)))

    @contextmanager
    def graph(graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # other threads read adapters meanwhile
        yield

    class CUDAGraph:
        def replay(self) -> None:
            pass

    for name, value in {
        **{"graph": graph, "CUDAGraph": CUDAGraph, "graph_pool_handle": object, "empty_cache": lambda: None},
        **{"synchronize": lambda device: None, "mem_get_info": lambda device: (next(free), 10**10)},
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    base = tiny(tmp_path / "tiny")
    choices = tuple(Choice(choice.op, Config(4), "") for choice in base.model.ops.choices)
    model = Transformer(base.model.args, base.model.weights, replace(base.model.ops, choices=choices))
    runner = GraphRunner(model, KVPool(model.args, PLACES, PLACES * CONTEXT, torch.float32, CPU, 16))
    adapter = write(tmp_path / "one", base)
    while runner.adapters.take("test", adapter) is None:
        runner.adapters.wait(180)
    return runner


@pytest.mark.parametrize("adapted", [False, True])
def test_a_capture_is_told_by_its_places_its_seconds_and_its_megabytes(runner: GraphRunner, adapted: bool) -> None:
    captures = Captures()
    graphs.log.addHandler(captures)
    level = graphs.log.level
    graphs.log.setLevel("INFO")
    try:
        step = runner._captured(graphs._Kind(2, constrained=False, adapted=adapted))
    finally:
        graphs.log.removeHandler(captures)
        graphs.log.setLevel(level)
    assert step().shape == (2, 300)
    [found] = captures.found
    assert found.keys() == {"places", "seconds", "megabytes"}
    assert (found["places"], found["megabytes"]) == (2, 100)
    assert 0 <= found["seconds"] < 60


def test_what_a_graph_reads_by_address_lives_as_long_as_the_graph(runner: GraphRunner) -> None:
    """The pages' views and the adapters' slots, which nobody else may hold by then."""
    step: Any = runner._captured(graphs._Kind(2, constrained=False, adapted=True))
    kv, _, layers = step.reads
    assert layers is runner.adapters.layers
    assert kv[0].k.data_ptr() == runner.pool._data.data_ptr()
    bare: Any = runner._captured(graphs._Kind(2, constrained=False, adapted=False))
    assert bare.reads[2] is None
