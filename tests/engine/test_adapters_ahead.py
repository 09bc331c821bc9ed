"""Steps with adapters are made ready between the steps of what runs, one at a time, before anybody has one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_nb.engine import AdapterSource, Engine
from mistral_nb.engine.graphs import GraphRunner
from tests.engine.jobs import ids
from tests.engine.tiny_adapters import LONG, Tiny, engine_of, submit, tiny, write


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapter(base: Tiny, tmp_path_factory: pytest.TempPathFactory) -> AdapterSource:
    return write(tmp_path_factory.mktemp("adapter"), base, size=3.0)


@pytest.fixture
def engine(base: Tiny) -> Iterator[Engine]:
    engine = engine_of(base, ahead=True)
    yield engine
    engine.close()


@pytest.fixture
def seen(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the runner was asked, and the kinds of steps that it captured."""
    runner, seen = engine._runner, []
    assert isinstance(runner, GraphRunner)
    captured, model = runner._captured, runner._model

    def capturing(kind: Any) -> Callable[[], Tensor]:
        seen.append((kind.size, kind.adapted))
        return captured(kind)

    def spied(name: str, of: Any) -> Callable[..., Any]:
        usual = getattr(of, name)

        def asked(*what: Any) -> Any:
            seen.append((name, what[0]) if name == "compile" else name)
            return usual(*what)

        return asked

    monkeypatch.setattr(runner, "_captured", capturing)
    monkeypatch.setattr(runner, "decode", spied("decode", runner))
    monkeypatch.setattr(model, "compile", spied("compile", model))
    return seen


def test_one_between_two_steps_of_what_runs(
    base: Tiny, engine: Engine, adapter: AdapterSource, seen: list[Any]
) -> None:
    """And none that was not made ready when it is needed."""
    alone = engine_of(base)
    texts = [ids(submit(alone, each, 1.0, LONG, count)) for each, count in ((None, 200), (adapter, 30))]
    alone.close()
    running = submit(engine, None, prompt=LONG, count=200)
    begin = next(iter(running)).id
    assert ids(submit(engine, adapter, prompt=LONG, count=30)) == texts[1]
    assert [begin, *ids(running)] == texts[0]
    made = [what for what in seen if what[0] == "compile" or what[1] is True]
    assert made == [("compile", 128), ("compile", 64), (1, True), (2, True), (4, True)]
    places = [seen.index(what) for what in made]
    assert all("decode" in seen[one:other] for one, other in itertools.pairwise(places))
    seen.clear()
    several = [submit(engine, adapter, scale) for scale in (1.0, 0.5, 2.0)]
    assert [len(ids(generation)) for generation in several] == [30] * 3
    assert set(seen) == {"decode"}


def test_what_cannot_be_made_ready_ends_those_who_wait(
    engine: Engine, adapter: AdapterSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another runs on, and who asks again may have more luck."""
    running = submit(engine, None, count=200)
    next(iter(running))
    faults = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")]
    compiling = engine._runner._model.compile  # type: ignore[attr-defined]

    def failing(*what: Any) -> None:
        if faults:
            raise faults.pop()
        compiling(*what)

    monkeypatch.setattr(engine._runner._model, "compile", failing)  # type: ignore[attr-defined]
    end = list(submit(engine, adapter))
    assert [token.finish_reason for token in end] == ["error"]
    assert "--context" in end[0].error
    assert len(ids(submit(engine, adapter))) == 30
    assert len(ids(running)) == 199
    assert engine.failure == ""
