"""A soak of seconds on a tiny model, and that it sees what it is there to see."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mistral_nb.checkpoints import open_checkpoint
from mistral_nb.engine import Engine, EngineInfo, Sampling
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.engine.detokenizer import Detokenizer
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.runner import DirectRunner
from mistral_nb.engine.weights import load_weights
from mistral_nb_kernels import choose
from tests.engine.tiny_adapters import CONTEXT, CPU, VOCAB, tiny, write
from tests.soak import rounds
from tests.soak.asking import Kind, cut, kinds_of
from tests.soak.engines import MODULES, Pausing, paged
from tests.soak.rounds import Soak

CHUNK, PLACES = 32, 8
RANKS = (1, 8, 4, 64)


def stream() -> Detokenizer:
    """A letter for each token."""
    return Detokenizer(lambda token: chr(97 + token % 26), errors="replace", drop_space=False)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Engine], list[Kind]]]:
    """One whose steps are over when they return and one in few pages, and kinds with more adapters than slots."""
    folder = tmp_path_factory.mktemp("tiny")
    model = tiny(folder / "model")
    adapters = [
        write(folder / f"{i}", model, MODULES[i % 4], RANKS[i % 4], seed=i, size=0.3) for i in range(PLACES + 2)
    ]
    checkpoint = open_checkpoint(folder / "model")
    args = replace(checkpoint.args, context=CONTEXT)
    weights = load_weights(checkpoint, "int8", CPU)
    transformer = Transformer(args, weights, choose(CPU, args.head_dim, weights.tok_embeddings.dtype))
    slots = AdapterSlots(args, transformer.dtype, CPU, slots=PLACES // 2)
    runner = DirectRunner(transformer, KVPool(args, PLACES, PLACES * CONTEXT, transformer.kv_dtype, CPU), 1, slots)
    runner.chunk = CHUNK
    direct = Engine(runner, EngineInfo("tiny", "CPU", "int8", CONTEXT, VOCAB, 1, str(transformer.ops)))
    with paged(transformer, direct, 192, PLACES, CHUNK) as few:
        yield [direct, few], kinds_of(0, 16, VOCAB, adapters, 120, CHUNK)
    direct.close()


def test_every_answer_is_the_one_alone_and_everything_comes_back(engines: tuple[list[Engine], list[Kind]]) -> None:
    both, kinds = engines
    assert len({kind.adapter for kind in kinds if kind.adapter}) > max(one._runner.adapters.slots for one in both)
    alone: dict[Kind, list[int]] = {}
    soaks = [Soak(engine, kinds, stream, 0, alone) for engine in both]
    for one in (*soaks, *soaks):
        one.round()
    seen: Counter[str] = sum((one.seen for one in soaks), Counter())
    assert seen["whole"] + seen["stop text"] + seen["stop id"] + seen["cancelled"] == 4 * rounds.AT_ONCE
    assert all(seen[what] for what in ("whole", "stop text", "stop id", "cancelled", "reused"))
    runner = both[1]._runner
    assert isinstance(runner, Pausing)
    assert runner.pauses


@pytest.fixture
def direct(engines: tuple[list[Engine], list[Kind]]) -> Engine:
    """With nothing of an earlier test in it."""
    engine = engines[0][0]
    Soak(engine, [], stream, 0, {}).came_back()
    return engine


def test_a_token_that_is_another_is_seen(direct: Engine) -> None:
    kind = Kind((1, 2, 3), Sampling(temperature=0), 5)
    soak = Soak(direct, [kind], stream, 0, {kind: [0, 0, 0, 0, VOCAB]})
    with pytest.raises(AssertionError, match="instead of"):
        soak.round(4)


def test_a_place_that_is_not_given_back_is_seen(direct: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = Soak(direct, [], stream, 0, {})
    monkeypatch.setattr(rounds, "TIMEOUT_S", 0.05)
    place = direct._runner.pool.take(5)
    assert place is not None
    with pytest.raises(AssertionError, match=r"not given back: .*'places': 1"):
        soak.came_back()
    direct._runner.pool.give_back(place)
    soak.came_back()


def test_a_page_that_is_lost_is_seen(direct: Engine) -> None:
    pool: Any = direct._runner.pool
    lost = pool._free_pages.pop()
    with pytest.raises(AssertionError, match="pages are lost"):
        Soak(direct, [], stream, 0, {}).came_back()
    pool._free_pages.append(lost)


def test_an_adapter_that_is_held_on_is_seen(
    engines: tuple[list[Engine], list[Kind]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, kinds = engines[0][0], engines[1]
    soak = Soak(engine, [next(kind for kind in kinds if kind.adapter)], stream, 0, {})
    soak.came_back()
    monkeypatch.setattr(rounds, "TIMEOUT_S", 0.05)
    slots: Any = engine._runner.adapters
    next(iter(slots._residents.values())).holders.add("nobody")
    with pytest.raises(AssertionError, match=r"not given back: .*'slots': 1"):
        soak.came_back()
    slots.give_back("nobody")


@pytest.mark.parametrize("seed", range(20))
def test_a_kind_that_is_cut_ends_where_its_text_or_id_says(seed: int) -> None:
    kind, tokens = Kind((1,), Sampling(temperature=0), 9), [0, 1, 2, 1, 30, 4, 5, 1, 2]
    stopped, expected = cut(kind, tokens, stream, random.Random(seed))
    assert expected == tokens[: len(expected)]
    if stopped.stop_ids:
        assert tokens[len(expected)] in stopped.stop_ids
        assert not stopped.stop_ids & set(expected)
    else:
        text = "".join(map(stream().push, expected))
        assert text.endswith(stopped.stop)
        assert text.find(stopped.stop) == len(text) - len(stopped.stop)
