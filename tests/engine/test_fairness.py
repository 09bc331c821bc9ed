"""Whose prompt goes on next, and who is admitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from mistral_nb.engine import Sampling
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.prefixes import Cut
from mistral_nb.engine.scheduler import Generation, Scheduler
from tests.engine.small_model import CHUNK, CONTEXT, PAGE, pool_of, small_transformer

CUT = Cut(CHUNK, CHUNK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return small_transformer(tmp_path_factory.mktemp("small"))


def generation(prompt: int, first: int = 1, most: int = 20) -> Generation:
    return Generation([first] * prompt, Sampling(temperature=0), most, frozenset(), None, lambda: None)


@dataclass
class Loop:
    """An engine's loop without a model: every token is 5."""

    pool: KVPool
    scheduler: Scheduler = field(default_factory=Scheduler)
    prefilled: list[Generation] = field(default_factory=list)

    def step(self) -> Any:
        step = self.scheduler.schedule(self.pool, CUT)
        for one in step.cancelled:
            one.finish("cancelled")
        for one in step.decode:
            one.cached += 1
            one.drawn += 1
            one.take(5)
        if step.prefill is not None:
            self.prefilled.append(step.prefill)
            step.prefill.cached = min(step.prefill.cached + CHUNK, step.prefill.prompt_tokens)
            assert step.prefill.place is not None
            self.pool.wrote(step.prefill.place, step.prefill.prefix(CUT))
            if not step.prefill.prefilling:
                step.prefill.drawn = 1
                step.prefill.take(5)
        return step


@pytest.mark.parametrize("page", [PAGE, None])
def test_prompts_take_turns(model: Transformer, page: int | None) -> None:
    """A short one does not wait for a long one's chunks; each has its chunk before any has its next."""
    loop = Loop(pool_of(model, page))
    long, other, short = generation(100, 1), generation(100, 2), generation(5, 3)
    loop.scheduler.submit(long)
    loop.step()
    for one in (other, short):
        loop.scheduler.submit(one)
    for _ in range(6):
        loop.step()
    assert loop.prefilled == [long, long, other, short, long, other, long]


def test_who_decodes_has_a_token_in_every_step(model: Transformer) -> None:
    loop = Loop(pool_of(model))
    first = generation(5, 1, 30)
    loop.scheduler.submit(first)
    loop.step()
    for i in range(3):
        loop.scheduler.submit(generation(100, 2 + i))
    for expected in range(2, 22):
        loop.step()
        assert first.completion_tokens == expected


def test_first_come_first_served(model: Transformer) -> None:
    """Beyond the places, in the order of submission; a place that comes back goes to who waits longest."""
    loop = Loop(pool_of(model))
    asked = [generation(10, i, 4 + i) for i in range(8)]
    for one in asked:
        loop.scheduler.submit(one)
    while len(loop.scheduler):
        loop.step()
    begun = sorted(asked, key=loop.prefilled.index)
    assert begun == asked
    assert {one.finish_reason for one in asked} == {"length"}


def test_who_waits_is_admitted_where_the_rest_can_still_grow(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_nb.engine.scheduler.MARGIN", PAGE)
    loop = Loop(pool_of(model, PAGE, CONTEXT))
    first, second, third = generation(CONTEXT // 2, 1, 60), generation(5, 2, 60), generation(5, 3, 60)
    for one in (first, second, third):
        loop.scheduler.submit(one)
    for _ in range(3):
        loop.step()
    # Soon the first has 64 + 16 tokens, the others 5 + 16: 5, 2 and 2 of the 8 pages.
    assert [one.place for one in (first, second, third)] == [0, 1, None]


def test_whoever_runs_the_oldest_ends_first_where_all_grow(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody's text as long as the context, with pages for one of them: each ends, the oldest before the younger."""
    monkeypatch.setattr("mistral_nb.engine.scheduler.MARGIN", PAGE)
    loop = Loop(pool_of(model, PAGE, CONTEXT))
    asked = [generation(8 + i, i, CONTEXT - 8 - i) for i in range(6)]
    ended: list[Generation] = []
    for one in asked:
        loop.scheduler.submit(one)
    for _ in range(2000):
        loop.step()
        ended += [one for one in asked if one.finish_reason and one not in ended]
    assert ended == asked
    assert len(loop.scheduler) == 0
    assert loop.pool.used == 0
