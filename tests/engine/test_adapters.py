"""Adapters of many generations at once: each as alone, loaded beside the steps, in slots that others need too."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mistral_nb.checkpoints.adapter_files import WEIGHTS_FILE
from mistral_nb.engine import AdapterSource, Engine, adapters
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.errors import AdapterError, InvalidRequest
from tests.engine.jobs import TIMEOUT, ids, wait_until
from tests.engine.tiny_adapters import CPU, LONG, PROMPT, Tiny, engine_of, engines_of, holders, submit, tiny, write
from tests.soak.memory import touched

Make = Callable[..., Engine]
Solo = Callable[..., list[int]]
Hold = Callable[[], tuple[threading.Event, threading.Event]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sources(base: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterSource]:
    """Four, of different modules and ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    modules = (["q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj", "down_proj"], ["k_proj", "down_proj"])
    return [write(folder / str(i), base, names, rank=3 + i, seed=i, size=3.0) for i, names in enumerate(modules)]


@pytest.fixture
def make(base: Tiny) -> Iterator[Make]:
    with engines_of(base) as engine:
        yield engine


@pytest.fixture
def hold_reading(monkeypatch: pytest.MonkeyPatch) -> Hold:
    """Adapters are not read from now on until the second event; the first one tells that a reading has begun."""

    def hold() -> tuple[threading.Event, threading.Event]:
        read, begun, go = adapters._tensor, threading.Event(), threading.Event()

        def slowly(*args: Any) -> Any:
            begun.set()
            assert go.wait(TIMEOUT)
            return read(*args)

        monkeypatch.setattr(adapters, "_tensor", slowly)
        return begun, go

    return hold


@pytest.fixture(scope="module")
def solo(base: Tiny) -> Iterator[Solo]:
    engine, texts = engine_of(base), {}

    def text(adapter: AdapterSource | None, scale: float = 1.0, prompt: list[int] = PROMPT) -> list[int]:
        """Alone, with nothing kept from before."""
        asked = adapter, scale, tuple(prompt)
        if asked not in texts:
            assert wait_until(lambda: not engine._scheduler.all())
            engine._runner.pool.forget()
            texts[asked] = ids(submit(engine, adapter, scale, prompt))
        return texts[asked]

    yield text
    engine.close()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("slots", [2, 8])
def test_many_at_once_are_each_as_alone(
    make: Make, solo: Solo, sources: list[AdapterSource], ahead: bool, slots: int
) -> None:
    """With several adapters, several scales of one, and none; with fewer slots than there are adapters."""
    asked: list[tuple[AdapterSource | None, float]] = [(each, 1.0) for each in sources]
    asked += [(None, 1.0), (sources[0], 0.5), (sources[2], 2.0), (sources[1], 0.0)]
    for prompt in (PROMPT, LONG):
        alone = [solo(*each, prompt) for each in asked]
        assert alone[4] == alone[7]
        assert len(set(map(tuple, alone))) == len(alone) - 1
        engine = make(ahead, slots=slots)
        for order in (1, -1):
            together = [submit(engine, *each, prompt) for each in asked[::order]]
            assert [ids(generation) for generation in together] == alone[::order]


@pytest.mark.parametrize("ahead", [False, True])
def test_swapped_in_the_middle_of_a_conversation(
    make: Make, solo: Solo, sources: list[AdapterSource], ahead: bool
) -> None:
    """Each turn begins with the one before it, whose keys and values are another adapter's."""
    engine, turns = make(ahead), list(LONG[:150])
    for adapter, scale in ((sources[0], 1.0), (sources[1], 1.0), (sources[0], 0.7), (None, 1.0), (sources[0], 1.0)):
        text = ids(submit(engine, adapter, scale, turns))
        assert text == solo(adapter, scale, turns)
        turns += text


@pytest.mark.parametrize("ahead", [False, True])
def test_what_runs_goes_on_while_an_adapter_is_read(
    make: Make, solo: Solo, sources: list[AdapterSource], ahead: bool, hold_reading: Hold
) -> None:
    alone, engine = solo(sources[0]), make(ahead)
    running = submit(engine, None, count=400)
    tokens = iter(running)
    next(tokens)
    begun, go = hold_reading()
    waiting = submit(engine, sources[0])
    assert wait_until(begun.is_set)
    other = submit(engine, None)
    assert len(ids(other)) == 30
    assert sum(1 for _, token in zip(range(100), tokens, strict=False) if token.id is not None) == 100
    assert waiting.drawn == 0
    go.set()
    assert ids(waiting) == alone
    assert running.finish_reason is None or len(ids(running)) == 299


@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_of_one_adapter_that_waited_for_it_are_read_once(
    make: Make, solo: Solo, sources: list[AdapterSource], ahead: bool, hold_reading: Hold
) -> None:
    """Neither has a place before it is there, so that the second begins with what the first has written."""
    alone, engine = solo(sources[3], 1.0, LONG), make(ahead)
    engine._runner.chunk = 128
    _, go = hold_reading()
    both = [submit(engine, sources[3], prompt=LONG) for _ in range(2)]
    assert wait_until(lambda: both[1] in holders(engine, sources[3]))
    assert [generation.place for generation in both] == [None, None]
    go.set()
    assert [ids(generation) for generation in both] == [alone, alone]
    assert both[1].reused == 128
    assert engine.failure == ""


def test_who_cancels_while_it_is_read_gives_its_slot_back(
    make: Make, solo: Solo, sources: list[AdapterSource], hold_reading: Hold
) -> None:
    alone, engine = solo(sources[1]), make(slots=1)
    begun, go = hold_reading()
    first = submit(engine, sources[0])
    assert wait_until(begun.is_set)
    second = submit(engine, sources[1])
    first.cancel()
    assert ids(first) == []
    go.set()
    assert ids(second) == alone
    assert engine._adapters.keys == (sources[1].key,)


def test_the_least_recently_used_that_nobody_holds_goes(base: Tiny, sources: list[AdapterSource]) -> None:
    slots = AdapterSlots(base.model.args, torch.float32, CPU, slots=2)
    one, two, three = (source.key for source in sources[:3])

    def take(holder: str, index: int) -> adapters.Applied:
        assert wait_until(lambda: slots.take(holder, sources[index]) is not None)
        applied = slots.take(holder, sources[index])
        assert applied is not None
        return applied

    first, second = take("a", 0), take("b", 1)
    assert {first.slot, second.slot} == {0, 1}
    assert slots.take("c", sources[2]) is None
    assert slots.keys == (one, two)
    slots.give_back("b")
    assert take("c", 2).slot == second.slot
    assert slots.keys == (one, three)
    slots.give_back("a")
    slots.give_back("c")
    assert take("d", 0) == first
    assert slots.keys == (three, one)
    slots.give_back("d")
    assert take("d", 1).slot == second.slot
    assert slots.keys == (one, two)
    slots.close()


WRONG = [
    ({"use_dora": True}, "use_dora is set: DoRA"),
    ({"bias": "all"}, "biases are not applied"),
    ({"modules_to_save": ["lm_head"]}, "whole modules"),
    ({"r": 5}, "r is 5, and the matrices have rank 3"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"rank_pattern": {"q_proj": 8}}, "ranks that differ"),
    ({"init_lora_weights": "pissa"}, "changes the base model's weights too"),
    ({"init_lora_weights": "olora"}, "changes the base model's weights too"),
    ({"kasa_config": {"beta": 1e-4}}, "kasa_config is set"),
]


@pytest.mark.parametrize(("config", "told"), WRONG, ids=lambda value: str(value)[:20])
def test_what_is_not_applied_is_refused_by_name(
    base: Tiny, make: Make, tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    bad = write(tmp_path / "bad", base, rank=3, **config)
    with pytest.raises(AdapterError, match=f"the adapter bad is not applied.*{told}"):
        submit(make(), bad)


def test_an_adapter_of_another_model_or_of_too_high_a_rank_is_refused(base: Tiny, make: Make, tmp_path: Path) -> None:
    engine = make(rank=16)
    with pytest.raises(AdapterError, match="it has 3 layers, and the model 2"):
        submit(engine, write(tmp_path / "deep", base, layers=range(3)))
    high = write(tmp_path / "high", base, rank=17)
    told = "has rank 17, and slots hold up to 16; start the engine with --lora-rank 17, or set lora_rank to 17"
    with pytest.raises(AdapterError, match=told):
        submit(engine, high)
    assert len(ids(submit(make(rank=17), high))) == 30
    other = write(tmp_path / "other", base, ["q_proj", "v_proj"], sizes={"q": 128})
    with pytest.raises(AdapterError, match=r"do not fit the model \(features: 128 and not 64\)"):
        submit(engine, other)
    with pytest.raises(AdapterError, match="the adapter none is not applied"):
        submit(engine, AdapterSource("none", tmp_path / "none"))
    fine = write(tmp_path / "fine", base)
    for scale in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InvalidRequest, match="lora_scale"):
            submit(engine, fine, scale)


@pytest.mark.parametrize("ahead", [False, True])
def test_one_that_cannot_be_read_ends_its_own_generation(
    base: Tiny, make: Make, sources: list[AdapterSource], tmp_path: Path, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone or broken between the check and the reading; put right, it is read."""
    engine, bad = make(ahead), write(tmp_path / "bad", base)
    whole = (bad.folder / WEIGHTS_FILE).read_bytes()
    other = submit(engine, sources[0], count=100)
    monkeypatch.setattr(engine._adapters, "check", lambda source: None)
    for broken in (whole[:-7], b""):
        (bad.folder / WEIGHTS_FILE).write_bytes(broken)
        end = list(submit(engine, bad))
        assert [token.finish_reason for token in end] == ["error"]
        assert "the adapter bad is not applied" in end[0].error
    (bad.folder / WEIGHTS_FILE).write_bytes(whole)
    assert len(ids(submit(engine, bad))) == 30
    assert len(ids(other)) == 100
    assert engine.failure == ""


def test_closing_while_an_adapter_is_read(
    make: Make, sources: list[AdapterSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = adapters._tensor, threading.Event()

    def told(*args: Any) -> Any:
        reads.set()
        return read(*args)

    monkeypatch.setattr(adapters, "_tensor", told)
    engine = make()
    generation = submit(engine, sources[0])
    assert reads.wait(TIMEOUT)
    engine.close()
    assert list(generation)[-1].finish_reason in ("cancelled", "length")
    assert engine._adapters.keys == ()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what is resident")
def test_slots_take_no_more_memory_than_what_is_in_them(base: Tiny, tmp_path: Path) -> None:
    """Of slots of rank 64; and all that a slot had is gone before the next adapter comes."""
    args = replace(base.model.args, dim=1024, hidden_dim=2048, n_heads=64)
    wide: Any = SimpleNamespace(model=SimpleNamespace(args=args), folder=base.folder)
    slots = AdapterSlots(args, torch.float32, CPU, slots=2)
    assert slots._memory is None
    for module, rank in (("gate_proj", 8), ("q_proj", 5)):
        for name in "ab":
            source = write(tmp_path / f"{module} {name}", wide, [module], rank=rank)
            assert wait_until(lambda source=source: slots.take("a", source) is not None)  # type: ignore[misc]
            slots.give_back("a")
        assert slots._memory is not None
        assert slots._memory._reserve is not None
        # All outputs of a product and the inputs of each of its modules are there, as zeros where a module has none.
        parts, outputs = {"gate_proj": (2, 2 * 2048), "q_proj": (3, 1024 + 2 * 32)}[module]
        written = 2 * 2 * rank * (parts * 1024 + outputs) * 4
        assert 0.9 * written < touched(slots._memory._reserve.tensor) < 1.1 * written
    slots.close()
