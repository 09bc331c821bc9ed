"""Prompts that begin as others did: only what is new is read, and the text is the same."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from mistral_nb.engine import Engine, Generation, Sampling
from mistral_nb.engine.model import Transformer
from tests.engine.jobs import ids, jobs, wait_until
from tests.engine.small_model import CHUNK, CONTEXT, VOCAB, small_engine, small_transformer

DRAWN = Sampling(temperature=1.0, seed=5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return small_transformer(tmp_path_factory.mktemp("small"))


@pytest.fixture(params=[False, True], ids=["direct", "ahead"])
def engine(model: Transformer, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = small_engine(model, request.param)
    yield engine
    engine.close()


@pytest.fixture
def forwards(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of prompts each forward was given."""
    lengths: list[int] = []
    runner: Any = engine._runner
    forward = runner._model.forward

    def counting(tokens: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        if not options.get("decoding"):
            lengths.append(len(tokens))
        result: torch.Tensor = forward(tokens, *rest, **options)
        return result

    monkeypatch.setattr(runner._model, "forward", counting)
    return lengths


def prompt(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def idle(engine: Engine) -> bool:
    return wait_until(lambda: engine.active == 0 and engine._runner.pool.used == 0)


def fresh(engine: Engine, *job: Any) -> list[int]:
    assert idle(engine)
    engine._runner.pool.forget()
    generation = engine.submit(*job)
    text = ids(generation)
    assert generation.reused == 0
    return text


def test_a_prompt_again_reads_its_last_chunk_only(engine: Engine, forwards: list[int]) -> None:
    job = (prompt(90), DRAWN, 20)
    text = fresh(engine, *job)
    assert forwards == [CHUNK] * 5 + [10]
    assert idle(engine)
    forwards.clear()
    again = engine.submit(*job)
    assert ids(again) == text
    assert again.reused == 80
    assert forwards == [10]


def test_a_longer_chat_reads_what_is_new(engine: Engine) -> None:
    """What the model wrote itself is new: decoding rounds otherwise than a prompt does."""
    turn = prompt(40)
    chat = [*turn, *fresh(engine, turn, DRAWN, 30), *prompt(20, 2)]
    expected = fresh(engine, chat, DRAWN, 20)
    fresh(engine, turn, DRAWN, 30)
    assert idle(engine)
    longer = engine.submit(chat, DRAWN, 20)
    assert ids(longer) == expected
    assert longer.reused == 32


def test_where_the_last_pieces_are_shorter_so_is_what_is_read_again(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. A longer prompt begins with as much as is cut as in its own; what was computed in other pieces would
    round otherwise.
    """
    engine = small_engine(model, True)
    engine._runner.chunk, engine._runner.rest = 3 * CHUNK, CHUNK
    expected = {length: fresh(engine, prompt(length), DRAWN, 20) for length in (40, 90, 100)}
    for order in ((90, 100, 90, 40), (40, 90, 40, 100)):
        assert idle(engine)
        engine._runner.pool.forget()
        reused = []
        for length in order:
            generation = engine.submit(prompt(length), DRAWN, 20)
            assert ids(generation) == expected[length]
            reused.append(generation.reused)
            assert idle(engine)
        assert reused == ([0, 48, 80, 0] if order[0] == 90 else [0, 0, 32, 48])
    engine.close()


def test_a_prompt_that_runs_is_shared(engine: Engine) -> None:
    job = (prompt(60), DRAWN, 60)
    text = fresh(engine, *job)
    assert idle(engine)
    engine._runner.pool.forget()
    first = engine.submit(*job)
    tokens = iter(first)
    begin = next(tokens).id
    second = engine.submit(*job)
    other = engine.submit([*job[0][:50], *prompt(30, 3)], DRAWN, 5)
    assert ids(second) == [begin, *(token.id for token in tokens)] == text
    assert (second.reused, other.reused) == (48, 48)
    assert ids(other) == fresh(engine, other.prompt_ids, DRAWN, 5)


def test_what_a_cancelled_prompt_has_read_is_reused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    job = (prompt(100), DRAWN, 20)
    text = fresh(engine, *job)
    assert idle(engine)
    engine._runner.pool.forget()
    prefill: Callable[[Generation], Any] = engine._runner.prefill

    def cancelling(generation: Generation) -> Any:
        result = prefill(generation)
        if generation.cached == 3 * CHUNK:
            generation.cancel()
        return result

    monkeypatch.setattr(engine._runner, "prefill", cancelling)
    assert [token.finish_reason for token in engine.submit(*job)] == ["cancelled"]
    monkeypatch.undo()
    again = engine.submit(*job)
    assert ids(again) == text
    assert again.reused == 3 * CHUNK


def test_what_failed_is_not_reused(engine: Engine, model: Transformer) -> None:
    job = (prompt(50), DRAWN, 20)
    text = fresh(engine, *job)
    assert idle(engine)
    engine._runner.pool.forget()
    embeddings, token = model.weights.tok_embeddings, job[0][3]
    before = embeddings[token].clone()
    embeddings[token] = torch.nan
    try:
        assert list(engine.submit(*job))[-1].finish_reason == "error"
    finally:
        embeddings[token] = before
    again = engine.submit(*job)
    assert ids(again) == text
    assert again.reused == 0


def test_many_that_begin_alike_are_as_alone(engine: Engine) -> None:
    """In any order, drawn in many ways, twice as many as there are places; and again, from what was kept."""
    shared = prompt(70)
    asked = []
    for i, (own, *rest) in enumerate(jobs(VOCAB)):
        begin = shared[: 9 * i]
        asked.append(([*begin, *own][: CONTEXT - 41], *rest))
    alone = [fresh(engine, *job) for job in fresh_jobs(asked)]
    engine._runner.pool.forget()
    for _ in range(2):
        generations = [engine.submit(*job) for job in fresh_jobs(asked)]
        assert [ids(generation) for generation in generations] == alone
    assert sum(generation.reused for generation in generations) > 300
    assert idle(engine)


def fresh_jobs(asked: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """With constraints of their own, which remember where they are."""
    constraints = [job[-1] for job in jobs(VOCAB)]
    return [(*job[:-1], constraint) for job, constraint in zip(asked, constraints, strict=True)]
