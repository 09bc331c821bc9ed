"""Places and pages: what is taken, shared, kept and given up, and that all of it comes back."""

from __future__ import annotations

import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.prefixes import Cut, Prefix, Prompt
from tests.engine.small_model import CHUNK, CONTEXT, CPU, PAGE, PLACES, pool_of, small_transformer

PROMPT = list(range(100))
CUT = Cut(CHUNK, CHUNK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    folder: Path = tmp_path_factory.mktemp("small")
    return small_transformer(folder)


def written(pool: KVPool, tokens: int, ids: list[int] = PROMPT, variant: object = None) -> int:
    """A place whose prompt is read; each of its keys is its token."""
    place = pool.take(tokens)
    assert place is not None
    held = pool.of([place])[0]
    for position, token in enumerate(ids[:tokens]):
        held.k[int(held.table[0, position // pool.page]), :, position % pool.page] = token
    pool.wrote(place, Prefix(Prompt(variant, ids, CUT), min(tokens, len(ids)) // CHUNK * CHUNK))
    return place


def keys(pool: KVPool, place: int, count: int) -> list[float]:
    held = pool.of([place])[0]
    return [
        float(held.k[int(held.table[0, position // pool.page]), 0, position % pool.page, 0])
        for position in range(count)
    ]


def test_places_and_pages_come_back(model: Transformer) -> None:
    pool = pool_of(model, 16)
    assert [pool.take(n) for n in (1, 100, 17, 16)] == [0, 1, 2, 3]
    assert pool.take(1) is None
    assert pool.used == 16 * (1 + 7 + 2 + 1)
    pool.give_back(1)
    assert pool.take(CONTEXT) == 1
    numbers = pool.table[1].tolist()
    assert len(set(numbers)) == CONTEXT // 16
    assert not set(numbers) & {int(pool.table[0, 0]), *pool.table[2, :2].tolist(), int(pool.table[3, 0])}
    for place in range(PLACES):
        pool.give_back(place)
    assert (pool.used, pool.room) == (0, PLACES * CONTEXT // 16)
    odd = KVPool(replace(model.args, context=100), PLACES, 400, torch.float32, CPU, 16)
    assert all(row.data_ptr() % 16 == 0 for row in odd.table)
    small = pool_of(model, None, 40)
    assert small.take(30) == 0
    assert small.take(11) is None
    assert small.take(10) == 1


def test_a_place_grows_until_there_are_no_pages(model: Transformer) -> None:
    pool = pool_of(model, PAGE, 10 * PAGE)
    one, other = pool.take(0), pool.take(PAGE)
    assert (one, other, pool.used) == (0, 1, PAGE)
    assert pool.lacks(0, 2 * PAGE + 1) == 3
    assert pool.grow(0, 2 * PAGE + 1)
    assert pool.grow(0, 3 * PAGE)
    assert pool.used == 4 * PAGE
    assert not pool.grow(1, 8 * PAGE)
    assert pool.used == 4 * PAGE
    assert pool.grow(1, 7 * PAGE)
    assert pool.room == 0
    assert len({*pool.table[0, :3].tolist(), *pool.table[1, :7].tolist()}) == 10


@pytest.mark.parametrize("page", [PAGE, None])
def test_what_is_reused_ends_with_a_chunk_and_before_the_last_token(model: Transformer, page: int | None) -> None:
    pool = pool_of(model, page)
    source = written(pool, 100)

    def reused(ids: list[int], variant: object = None) -> int:
        place = pool.take(0 if page else CONTEXT)
        assert place is not None
        count = pool.reuse(place, Prompt(variant, ids, CUT))
        assert keys(pool, place, count) == PROMPT[:count]
        pool.give_back(place, keep=True)
        return count

    for keep in (False, True):
        if keep:
            pool.give_back(source, keep=True)
        assert reused(PROMPT) == 96
        assert reused(PROMPT[:97]) == 96
        assert reused(PROMPT[:96]) == 80
        assert reused([*PROMPT[:40], 7, *PROMPT[41:]]) == 32
        assert reused([7, *PROMPT[1:]]) == 0
        assert reused(PROMPT, ("adapter", 1.0)) == 0
    pool.forget()
    assert reused(PROMPT) == 0
    assert (pool.used, pool.kept) == (0, 0)


@pytest.mark.parametrize("page", [PAGE, None])
def test_a_kept_prefix_outlives_those_who_share_it(model: Transformer, page: int | None) -> None:
    """Nobody else gets its pages until the room is needed; then those who have them still do."""
    pool = pool_of(model, page, 2 * CONTEXT)
    pool.give_back(written(pool, 100), keep=True)
    assert (pool.used, pool.kept) == (0, 96)
    one = pool.take(0 if page else CONTEXT)
    assert one is not None
    assert pool.reuse(one, Prompt(None, PROMPT, CUT)) == 96
    other = written(pool, CONTEXT, [5] * CONTEXT)
    assert keys(pool, one, 96) == PROMPT[:96]
    assert pool.kept == (96 if page else 0)
    assert pool.grow(one, CONTEXT)
    assert keys(pool, one, 96) == PROMPT[:96]
    assert keys(pool, other, CONTEXT) == [5] * CONTEXT
    for place in (one, other):
        pool.give_back(place)
    pool.forget()
    assert pool.used == 0
    assert pool.grows is False or len(pool._free_pages) == pool.room == 2 * CONTEXT // PAGE


def test_the_prefix_that_was_used_longest_ago_goes_first(model: Transformer) -> None:
    pool = pool_of(model, PAGE, CONTEXT)
    for variant in "ab":
        pool.give_back(written(pool, 32, PROMPT, variant), keep=True)
    place = pool.take(0)
    assert place is not None
    assert pool.reuse(place, Prompt("a", PROMPT, CUT)) == 32
    pool.give_back(place)
    assert pool.take(CONTEXT - 32) == 0
    assert [held.prefix.prompt.variant for held in pool._kept if held.prefix] == ["a"]


def test_of_prefixes_that_begin_each_other_one_is_kept(model: Transformer) -> None:
    pool = pool_of(model)
    for tokens in (40, 70, 20):
        pool.give_back(written(pool, tokens), keep=True)
    assert pool.kept == 64
    assert len(pool._free_pages) == pool.room - 64 // PAGE
    pool.give_back(written(pool, 10), keep=True)
    assert pool.kept == 64


def test_a_place_begins_with_what_is_kept_before_others_make_room(model: Transformer) -> None:
    """On the CPU: where there are tokens for no more than the place's own; also with what is not whole of use."""
    pool = pool_of(model, None, CONTEXT)
    pool.give_back(written(pool, 100), keep=True)
    for ids, count in ((PROMPT, 96), (PROMPT, 96), ([*PROMPT[:40], *[7] * 60], 32)):
        prompt = Prompt(None, ids, CUT)
        place = pool.take(CONTEXT, prompt)
        assert place is not None
        assert (pool.used, pool.kept) == (CONTEXT, 0)
        assert pool.take(1) is None
        assert pool.reuse(place, prompt) == count
        assert keys(pool, place, count) == PROMPT[:count]
        pool.give_back(place, keep=True)
        assert pool.kept == count
    pool.forget()
    assert len(pool._free_pages) == 2 * PLACES


@pytest.mark.parametrize("contexts", [2, PLACES])
def test_on_the_cpu_two_contexts_of_prefixes_are_kept(model: Transformer, contexts: int) -> None:
    """No more, however many tokens there are; the one that was used longest ago goes."""
    pool = pool_of(model, None, contexts * CONTEXT)
    for turn in range(3):
        for variant in "ab":
            prompt = Prompt(variant, PROMPT, CUT)
            place = pool.take(CONTEXT, prompt)
            assert place is not None
            assert pool.reuse(place, prompt) == (96 if turn else 0)
            pool.wrote(place, Prefix(prompt, 96))
            pool.give_back(place, keep=True)
    assert pool.kept == 192
    pool.give_back(written(pool, 80, PROMPT, "c"), keep=True)
    assert [held.prefix.prompt.variant for held in pool._kept if held.prefix] == ["b", "c"]


def test_a_place_that_begins_with_what_is_kept_goes_on_with_what_runs(model: Transformer) -> None:
    """Where by its turn somebody who runs has more of it."""
    pool = pool_of(model, None)
    pool.give_back(written(pool, 40), keep=True)
    prompt = Prompt(None, PROMPT, CUT)
    place, running = pool.take(100, prompt), written(pool, 100)
    assert place is not None
    assert pool.reuse(place, prompt) == 96
    assert keys(pool, place, 96) == PROMPT[:96]
    for each in (place, running):
        pool.give_back(each)
    assert len(pool._free_pages) == 2 * PLACES


def test_on_the_cpu_no_more_memory_is_taken_than_by_what_is_kept(model: Transformer) -> None:
    pool = pool_of(model, None)
    place = pool.take(CONTEXT)
    data = pool._data[int(pool.table[place or 0, 0])]
    data.fill_(1.0)
    pool.wrote(place or 0, Prefix(Prompt("d", PROMPT, CUT), 96))
    pool.give_back(place or 0, keep=True)
    assert (data[:, :, :, :96] == 1).all()
    pool.forget()
    big = replace(model.args, context=4096)
    wide = KVPool(big, 1, 8192, torch.float32, CPU)
    place = wide.take(4096)
    data = wide._data[int(wide.table[place or 0, 0])]
    data.fill_(1.0)
    wide.wrote(place or 0, Prefix(Prompt("d", [0] * 4096, CUT), 1024))
    wide.give_back(place or 0, keep=True)
    assert (data[:, :, :, :1024] == 1).all()
    if hasattr(mmap, "MADV_DONTNEED"):
        assert not data[:, :, :, 1024:].any()
        wide.forget()
        assert not data.any()


def test_what_is_swapped_comes_back_as_it_was(model: Transformer) -> None:
    pool = pool_of(model, PAGE, CONTEXT)
    place = written(pool, 50)
    swapped = pool.swap_out(place, 50)
    pool.save(swapped)
    assert pool.used == 0
    other = written(pool, CONTEXT - 64, [9] * CONTEXT)
    again = pool.take(51)
    assert again is not None
    pool.restore(again, swapped)
    assert keys(pool, again, 50) == PROMPT[:50]
    assert keys(pool, other, CONTEXT - 64) == [9] * (CONTEXT - 64)
    pool.give_back(again, keep=True)
    assert pool.kept == 48
