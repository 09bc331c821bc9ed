"""Adapters where prompts begin alike, and where pages run out: what was read with one is no other's, and who is paused
keeps its slot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.engine import AdapterSource, Engine, Generation
from mistral_nb.engine import scheduler as scheduler_module
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.engine.arena import Reserve
from tests.engine.jobs import ids, wait_until
from tests.engine.tiny_adapters import CONTEXT, LONG, PLACES, PROMPT, Tiny, engine_of, submit, tiny, write

CHUNK = 64
SHARED = LONG[:150]

Asked = tuple[AdapterSource | None, float]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"), "int8")


@pytest.fixture(scope="module")
def sources(base: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterSource]:
    folder = tmp_path_factory.mktemp("adapters")
    modules = (["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj", "down_proj"], ["k_proj", "down_proj"])
    return [write(folder / str(i), base, names, rank=1 + 5 * i, seed=i, size=3.0) for i, names in enumerate(modules)]


@pytest.fixture(params=[False, True], ids=["direct", "ahead"])
def engine(base: Tiny, request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = engine_of(base, request.param)
    engine._runner.chunk = CHUNK
    yield engine
    engine.close()


def fresh(engine: Engine) -> None:
    assert wait_until(lambda: engine.active == 0 and engine._runner.pool.used == 0)
    engine._runner.pool.forget()


def test_numbers_that_one_adapter_broke_are_in_no_other_text(
    base: Tiny, sources: list[AdapterSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not zero the memory that it is given back, as macOS and Windows."""
    monkeypatch.setattr(Reserve, "zeroes", False)
    monkeypatch.setattr(Reserve, "release", lambda *_: None)
    engine = engine_of(base)
    try:
        alone = ids(submit(engine, None))
        broken = list(submit(engine, sources[3], 1e38, LONG))
        assert "the model's numbers break down" in broken[-1].error
        fresh(engine)
        assert ids(submit(engine, None)) == alone
        assert len(ids(submit(engine, None, 1.0, PROMPT[:3]))) == 30
    finally:
        engine.close()


def test_what_is_reused_was_read_with_the_same_adapter_at_the_same_scale(
    engine: Engine, sources: list[AdapterSource]
) -> None:
    """Each way round; scale 0 is the base, whichever adapter it is of."""
    one, other = sources[:2]
    asked: list[Asked] = [(None, 1.0), (one, 0.0), (one, 1.0), (one, 0.5), (other, 1.0)]
    texts = []
    for each in asked:
        fresh(engine)
        texts.append(ids(submit(engine, *each, SHARED, 12)))
    assert texts[0] == texts[1]
    assert len(set(map(tuple, texts))) == 4
    for first in asked:
        for second, text in zip(asked, texts, strict=True):
            fresh(engine)
            ids(submit(engine, *first, SHARED, 1))
            again = submit(engine, *second, SHARED, 12)
            assert ids(again) == text
            same = first == second or {first, second} == {asked[0], asked[1]}
            assert again.reused == (2 * CHUNK if same else 0), (first, second)


def test_another_version_of_an_adapter_reuses_nothing(base: Tiny, engine: Engine, tmp_path: Path) -> None:
    """By its key, in the same folder; the first version runs on meanwhile."""
    first = replace(write(tmp_path / "it", base, seed=1), key="it 1")
    running = submit(engine, first, prompt=SHARED, count=200)
    begin = next(iter(running)).id
    second = replace(write(tmp_path / "it", base, seed=2), key="it 2")
    generation = submit(engine, second, prompt=SHARED, count=12)
    text = ids(generation)
    assert generation.reused == 0
    again = submit(engine, first, prompt=SHARED, count=200)
    assert again.reused in (0, 2 * CHUNK)
    assert [begin, *ids(running)] == ids(again)
    assert again.reused == 2 * CHUNK
    fresh(engine)
    assert ids(submit(engine, second, prompt=SHARED, count=12)) == text


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of what is read into slots."""
    keys: list[str] = []
    load = AdapterSlots._load

    def noting(slots: AdapterSlots, source: AdapterSource, *rest: Any) -> None:
        keys.append(source.key)
        load(slots, source, *rest)

    monkeypatch.setattr(AdapterSlots, "_load", noting)
    return keys


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Callable[[Engine], list[tuple[str, Generation]]]:
    """Who is paused and resumed; each with its adapter's slot, which nobody else gets."""

    def of(engine: Engine) -> list[tuple[str, Generation]]:
        moved: list[tuple[str, Generation]] = []

        def spied(name: str) -> Callable[[Generation], None]:
            move = getattr(engine._runner, name)

            def moving(generation: Generation) -> None:
                moved.append((name, generation))
                move(generation)
                holding = {holder for one in engine._adapters._residents.values() for holder in one.holders}
                assert generation.adapter is None or (generation.applied is not None and generation in holding)

            return moving

        for name in ("pause", "resume"):
            monkeypatch.setattr(engine._runner, name, spied(name))
        return moved

    return of


@pytest.mark.parametrize("slots", [PLACES, 2])
def test_who_is_paused_keeps_its_slot_and_goes_on_with_the_same_text(
    base: Tiny,
    sources: list[AdapterSource],
    read: list[str],
    moves: Callable[[Engine], list[tuple[str, Generation]]],
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
) -> None:
    """With pages for one full context: every slot is held, all but one of the holders are paused, and others wait for a
    slot. Nobody waits for a slot to be resumed, and nothing is read again for it.
    """
    monkeypatch.setattr(scheduler_module, "MARGIN", 16)
    asked: list[Asked] = [(sources[i % 4], (1.0, 0.5, 2.0)[i % 3]) for i in range(8)]
    for i in (0, 3):
        asked.insert(i, (None, 1.0))
    prompts = [PROMPT[: 5 + i] for i in range(len(asked))]
    roomy = engine_of(base, ahead=True)
    alone = [ids(submit(roomy, *each, prompt, 180)) for each, prompt in zip(asked, prompts, strict=True)]
    roomy.close()
    read.clear()
    engine = engine_of(base, ahead=True, tokens=CONTEXT, slots=slots)
    moved = moves(engine)
    together = [submit(engine, *each, prompt, 180) for each, prompt in zip(asked, prompts, strict=True)]
    assert [ids(generation) for generation in together] == alone
    paused = [generation for name, generation in moved if name == "pause"]
    assert any(generation.adapter is not None and generation.drawn for generation in paused)
    assert engine.failure == ""
    if slots == PLACES:
        assert sorted(read) == sorted(source.key for source in sources)
    fresh(engine)
    assert not any(one.holders for one in engine._adapters._residents.values())
    engine.close()
