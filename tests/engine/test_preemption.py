"""Pages that run out: the youngest is paused and goes on later with the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mistral_nb.engine import Engine, Generation, Sampling, graphs
from mistral_nb.engine import scheduler as scheduler_module
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from tests.engine.jobs import Thirds, held, ids, jobs, wait_until
from tests.engine.small_model import CONTEXT, PAGE, VOCAB, small_engine, small_transformer

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return small_transformer(tmp_path_factory.mktemp("small"))


@pytest.fixture
def engine(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """With pages for one full context, for four places."""
    monkeypatch.setattr(scheduler_module, "MARGIN", PAGE)
    engine = small_engine(model, ahead=True, tokens=CONTEXT)
    yield engine
    engine.close()


@pytest.fixture
def moves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Generation]]:
    """Who was paused and resumed."""
    moved: list[tuple[str, Generation]] = []

    def spied(name: str) -> Callable[[Generation], None]:
        move = getattr(engine._runner, name)

        def moving(generation: Generation) -> None:
            moved.append((name, generation))
            move(generation)

        return moving

    for name in ("pause", "resume"):
        monkeypatch.setattr(engine._runner, name, spied(name))
    return moved


def everything_came_back(engine: Engine) -> bool:
    pool: Any = engine._runner.pool
    assert wait_until(lambda: engine.active == 0 and pool.used == 0)
    pool.forget()
    return bool(len(pool._free_pages) == CONTEXT // PAGE and not any(pool._holders) and not engine._runner._saved)  # type: ignore[attr-defined]


def test_a_text_is_the_same_however_often_it_is_paused(
    engine: Engine, model: Transformer, moves: list[tuple[str, Generation]]
) -> None:
    """Drawn in many ways, with penalties and constraints, at places that are others' than before."""
    roomy = small_engine(model, ahead=True)
    asked: list[tuple[Any, ...]] = [(job[0][: CONTEXT - 60], job[1], 60, *job[3:]) for job in jobs(VOCAB)]
    constraints: list[Any] = [job[-1] for job in jobs(VOCAB)]
    alone = [ids(roomy.submit(*job)) for job in asked]
    roomy.close()
    with held(engine):
        generations = [
            engine.submit(*(*job[:5], constraint)) for job, constraint in zip(asked, constraints, strict=True)
        ]
    assert [ids(generation) for generation in generations] == alone
    paused = [generation for name, generation in moves if name == "pause"]
    assert len(paused) > 3
    assert any(generation.drawn for generation in paused)
    assert any(generation.constraint for generation in paused)
    assert any(generation.sampling.repetition_penalty != 1 for generation in paused)
    assert everything_came_back(engine)


def test_the_youngest_is_paused_and_the_oldest_never(engine: Engine, moves: list[tuple[str, Generation]]) -> None:
    with held(engine):
        generations = [engine.submit([1, 2, i], GREEDY, 100) for i in range(4)]
    assert [len(ids(generation)) for generation in generations] == [100] * 4
    assert moves[0] == ("pause", generations[3])
    assert ("pause", generations[0]) not in moves
    resumed = [generation.number for name, generation in moves if name == "resume"]
    assert resumed == sorted(resumed)
    assert everything_came_back(engine)


def test_who_is_paused_can_be_cancelled_and_stopped(
    engine: Engine, moves: list[tuple[str, Generation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = engine._runner.pause

    def cancelling(generation: Generation) -> None:
        pause(generation)
        generation.cancel()

    monkeypatch.setattr(engine._runner, "pause", cancelling)
    with held(engine):
        generations = [engine.submit([1, 2, i], GREEDY, 100) for i in range(3)]
    ends = [list(generation)[-1].finish_reason for generation in generations]
    assert ends[0] == "length"
    assert ends[2] == "cancelled"
    assert "resume" not in [name for name, _ in moves]
    assert everything_came_back(engine)


@pytest.mark.parametrize(
    ("owner", "move"), [(KVPool, "save"), (KVPool, "restore"), (graphs.State, "save"), (graphs.State, "load")]
)
def test_where_the_copy_fails_its_own_generation_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, owner: type, move: str
) -> None:
    """Of the pages, or of the state of its place."""

    def failing(*arguments: Any) -> None:
        raise RuntimeError("out of the host's memory\nMore")

    monkeypatch.setattr(owner, move, failing)
    with held(engine):
        generations = [engine.submit([1, 2, i], GREEDY, 100) for i in range(2)]
    ends = [list(generation)[-1] for generation in generations]
    assert [end.finish_reason for end in ends] == ["length", "error"]
    assert "out of the host's memory); see the engine's log" in ends[1].error
    assert everything_came_back(engine)
    assert engine.failure == ""


def test_a_prompt_too_long_for_the_room_left_waits(engine: Engine, moves: list[tuple[str, Generation]]) -> None:
    first = engine.submit([1, 2, 3], GREEDY, 60)
    next(iter(first))
    long = engine.submit([4] * 120, GREEDY, 3)
    assert len(ids(first)) == 59
    assert len(ids(long)) == 3
    assert moves == []
    assert everything_came_back(engine)


def test_a_constraint_is_where_it_was(engine: Engine, moves: list[tuple[str, Generation]]) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    with held(engine):
        others = [engine.submit([1, 2, i], GREEDY, 110) for i in range(2)]
        constrained = engine.submit([5, 6], sampling, 90, constraint=Thirds(VOCAB))  # type: ignore[arg-type]
    text = ids(constrained)
    assert [token % 3 for token in text] == [i % 3 for i in range(90)]
    assert [len(ids(other)) for other in others] == [110, 110]
    assert moves


@pytest.mark.parametrize(("prompt", "most"), [(32, 1), (27, 6)])
def test_who_has_its_last_token_writes_to_nobody_elses_page(model: Transformer, prompt: int, most: int) -> None:
    """Its pages are full, and a step more begins before anybody has read that it was the last."""
    roomy, sampling = small_engine(model, ahead=True), Sampling(temperature=1.0, seed=3)
    text = ids(roomy.submit([1, 2, 3], sampling, 110))
    running = [roomy.submit([1, 2, 3], sampling, 110) for _ in range(3)]
    begun = [next(iter(one)).id for one in running]
    for _ in range(3):
        assert len(ids(roomy.submit(list(range(prompt)), GREEDY, most))) == most
    assert [[first, *ids(one)] for first, one in zip(begun, running, strict=True)] == [text] * 3
    roomy.close()
