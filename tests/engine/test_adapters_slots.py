"""Slots for adapters when there are too few, when an adapter's files change or go, and when its loading fails."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_nb.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, looks
from mistral_nb.engine import AdapterSource, Engine, Generation, Sampling, Token, adapters
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.errors import AdapterError
from tests.engine.jobs import TIMEOUT, Thirds, held, ids, wait_until
from tests.engine.tiny_adapters import CPU, PLACES, PROMPT, VOCAB, Tiny, engines_of, holders, submit, tiny, write

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def sources(base: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterSource]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write(folder / str(i), base, ["q_proj", "down_proj"], rank=1 + i, seed=i, size=3.0) for i in range(10)]


@pytest.fixture
def make(base: Tiny) -> Iterator[Make]:
    with engines_of(base) as engine:
        yield engine


@pytest.fixture
def slots(base: Tiny) -> Iterator[Callable[[int], AdapterSlots]]:
    made: list[AdapterSlots] = []

    def some(count: int) -> AdapterSlots:
        made.append(AdapterSlots(base.model.args, torch.float32, CPU, slots=count))
        return made[-1]

    yield some
    for each in made:
        each.close()


class Gate:
    """Stops every loading until it is opened; `begun` counts the adapters whose loading has begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[AdapterSource] = []
        self._open = threading.Event()
        load = AdapterSlots._load

        def gated(this: AdapterSlots, source: AdapterSource, *rest: Any) -> None:
            self.begun.append(source)
            assert self._open.wait(TIMEOUT)
            load(this, source, *rest)

        monkeypatch.setattr(AdapterSlots, "_load", gated)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def loaded(slots: AdapterSlots, holder: str, source: AdapterSource) -> int:
    assert wait_until(lambda: slots.take(holder, source) is not None)
    applied = slots.take(holder, source)
    assert applied is not None
    return applied.slot


def end(generation: Generation) -> tuple[str | None, str]:
    last = list(generation)[-1]
    return last.finish_reason, last.error


def came_back(engine: Engine) -> bool:
    slots = engine._adapters
    idle = wait_until(lambda: engine.active == 0 and not any(one.holders for one in slots._residents.values()))
    return idle and not slots._waiting and not slots._failures


def test_slots_go_to_who_asked_first(slots: Callable[[int], AdapterSlots], sources: list[AdapterSource]) -> None:
    """Nine for eight: who asks while another waits is behind it, even for an adapter that is there."""
    eight = slots(8)
    assert len({loaded(eight, str(i), sources[i]) for i in range(8)}) == 8
    assert eight.take("ninth", sources[8]) is None
    assert eight.take("tenth", sources[9]) is None
    assert eight.take("same", sources[0]) is None
    assert eight.take("0", sources[0]) is not None
    eight.give_back("3")
    assert eight.take("same", sources[0]) is None
    assert eight.take("tenth", sources[9]) is None
    assert loaded(eight, "ninth", sources[8]) == 3
    assert eight.take("same", sources[0]) is None
    eight.give_back("tenth")
    assert loaded(eight, "same", sources[0]) == 0


@pytest.mark.parametrize("ahead", [False, True])
def test_more_adapters_than_slots_are_served_in_the_order_of_asking(
    make: Make, sources: list[AdapterSource], ahead: bool
) -> None:
    """One is not passed by those that go on asking for the adapters which are there; who has none passes."""
    engine, order = make(ahead, slots=2), []
    asked = [0, 1, 0, 2, 0, 1, 0, 3, 0, 1]
    generations = [submit(engine, sources[i], prompt=[7, i, n], count=20) for n, i in enumerate(asked)]
    for generation in generations:
        next(iter(generation))
        order.append(generation.number)
    free = submit(engine, None, count=3)
    assert len(ids(free)) == 3
    assert [len(ids(generation)) for generation in generations] == [19] * len(asked)
    assert order == sorted(order)
    assert came_back(engine)


def test_who_waits_for_a_slot_begins_before_who_came_later(make: Make, sources: list[AdapterSource]) -> None:
    """Of requests for the adapters that are there, one can have begun by the time that it has ended, in its stead."""
    engine, over = make(slots=2), threading.Event()
    tokens: list[Token] = []
    begun: list[Generation] = []

    def take(token: Token) -> None:
        tokens.append(token)
        if token.finish_reason:
            begun.extend(generation for generation in later if generation.drawn > 0)
            over.set()

    with held(engine):
        keeping = [submit(engine, sources[i], count=60) for i in (0, 1)]
        engine.submit(PROMPT, Sampling(temperature=0), 5, on_token=take, adapter=sources[2])
        later = [submit(engine, sources[i], count=60) for i in (0, 1, 0, 1)]
    assert over.wait(TIMEOUT)
    assert len(tokens) == 5
    assert len(begun) <= 1
    assert [len(ids(generation)) for generation in keeping] == [60] * 2
    assert [len(ids(generation)) for generation in later] == [60] * 4


@pytest.mark.parametrize("ahead", [False, True])
def test_a_loading_that_fails_ends_all_who_wait_for_it_at_once(
    base: Tiny, make: Make, gate: Gate, sources: list[AdapterSource], tmp_path: Path, ahead: bool
) -> None:
    """And no other; one loading, not one for each. Put right, it is read."""
    engine, bad = make(ahead), write(tmp_path / "bad", base)
    kept = (bad.folder / WEIGHTS_FILE).read_bytes()
    waiting = [submit(engine, bad) for _ in range(3)]
    other = submit(engine, sources[0])
    assert wait_until(lambda: len(holders(engine, bad)) == 3 and len(gate.begun) == 2)
    (bad.folder / WEIGHTS_FILE).write_bytes(kept[:-9])
    gate.open()
    for reason, error in map(end, waiting):
        assert reason == "error"
        assert "the adapter bad is not applied" in error
    assert gate.begun == [bad, sources[0]]
    assert len(ids(other)) == 30
    (bad.folder / WEIGHTS_FILE).write_bytes(kept)
    assert len(ids(submit(engine, bad))) == 30
    assert came_back(engine)


def delete(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)


def rewrite(folder: Path, other: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (folder / name).write_bytes((other / name).read_bytes())


def replace_folder(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


FAULTS = [(delete, "cannot be read"), (rewrite, "its files were changed"), (replace_folder, "its files were changed")]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_files_that_change_between_the_check_and_the_reading(
    base: Tiny, make: Make, gate: Gate, tmp_path: Path, fault: Callable[[Path, Path], None], told: str
) -> None:
    """Numbers of one version never go by the key of another."""
    engine, one, other = make(), write(tmp_path / "one", base, seed=1), write(tmp_path / "other", base, seed=2)
    known = replace(one, looks=looks(one.folder))
    generation = submit(engine, known)
    assert wait_until(lambda: gate.begun == [known])
    fault(one.folder, other.folder)
    gate.open()
    reason, error = end(generation)
    assert reason == "error"
    assert told in error
    if fault is not delete:
        assert end(submit(engine, known)) == (reason, error)
        now = AdapterSource("now", one.folder, looks(one.folder))
        assert ids(submit(engine, now)) == ids(submit(engine, other))
    assert came_back(engine)


@pytest.mark.parametrize("known", [False, True])
def test_files_that_change_while_they_are_read(
    base: Tiny, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Between two of its matrices; the sizes are the same."""
    engine, one, other = make(), write(tmp_path / "one", base, seed=1), write(tmp_path / "other", base, seed=2)
    read, times = adapters._tensor, []
    if known:
        one = replace(one, looks=looks(one.folder))

    def rewriting(*args: Any) -> Any:
        times.append(args)
        if len(times) == 3:
            rewrite(one.folder, other.folder)
        return read(*args)

    monkeypatch.setattr(adapters, "_tensor", rewriting)
    reason, error = end(submit(engine, one))
    assert reason == "error"
    assert "the adapter one is not applied: its files were changed; ask again" in error
    assert engine._adapters.keys == ()
    assert came_back(engine)


def test_no_memory_for_slots_ends_who_asked_and_no_other(base: Tiny, make: Make) -> None:
    """More addresses than a process has."""
    engine = make(rank=1 << 36)
    other = submit(engine, None)
    adapter = write(base.folder / "fine", base)
    for _ in range(2):
        reason, error = end(submit(engine, adapter))
        assert reason == "error"
        assert "there is no memory for 8 adapters of rank 68719476736" in error
        assert error.endswith("--lora-rank")
    assert len(ids(other)) == 30
    assert engine.failure == ""


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(base: Tiny, make: Make, tmp_path: Path, number: float) -> None:
    engine, bad = make(), write(tmp_path / "bad", base)
    tensors = load_file(bad.folder / WEIGHTS_FILE)
    list(tensors.values())[-1][1, 2] = number
    save_file(tensors, bad.folder / WEIGHTS_FILE)
    reason, error = end(submit(engine, bad))
    assert reason == "error"
    assert "the adapter bad cannot be read: it holds numbers that are not finite" in error
    assert came_back(engine)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_scale_under_which_the_model_breaks_down_is_told(
    make: Make, sources: list[AdapterSource], ahead: bool
) -> None:
    engine = make(ahead)
    generation = submit(engine, sources[0], 1e300)
    reason, error = end(generation)
    assert reason == "error"
    assert "the model's numbers break down with it at 1e+300" in error
    assert "lower lora_scale" in error
    assert isinstance(generation.refusal, AdapterError)
    constraint: Any = Thirds(VOCAB, 0)
    failing = engine.submit([1, 2], Sampling(temperature=0), 5, constraint=constraint, adapter=sources[0])
    assert "simpler schemas" in end(failing)[1]
    assert failing.refusal is None


def test_where_no_thread_can_be_had_its_own_generation_ends(
    make: Make, sources: list[AdapterSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = make()
    other = submit(engine, None, count=200)
    monkeypatch.setattr(threading.Thread, "start", failing)
    reason, error = end(submit(engine, sources[0]))
    monkeypatch.undo()
    assert (reason, "cannot be read: can't start new thread" in error) == ("error", True)
    assert len(ids(submit(engine, sources[0]))) == 30
    assert len(ids(other)) == 200
    assert came_back(engine)


@pytest.mark.parametrize("ahead", [False, True])
def test_who_waits_for_a_slot_can_be_cancelled_and_the_engine_closed(
    make: Make, gate: Gate, sources: list[AdapterSource], ahead: bool
) -> None:
    engine = make(ahead, slots=1)
    first, second, third, fourth = (submit(engine, sources[i]) for i in range(4))
    assert wait_until(lambda: len(engine._adapters._waiting) == 0 and gate.begun == [sources[0]])
    second.cancel()
    assert end(second) == ("cancelled", "")
    first.cancel()
    assert end(first) == ("cancelled", "")
    gate.open()
    assert len(ids(third)) == 30
    assert gate.begun == [sources[0], sources[2], *gate.begun[2:]]
    engine.close()
    assert end(fourth)[0] in ("cancelled", "length")
    assert engine._adapters.keys == ()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("crash", [False, True])
def test_nobody_waits_at_the_end_for_a_disk_that_does_not_answer(
    make: Make, gate: Gate, sources: list[AdapterSource], monkeypatch: pytest.MonkeyPatch, crash: bool
) -> None:
    """Neither when it is closed nor after an error of its own; the memory comes back when the disk answers."""
    monkeypatch.setattr(adapters, "CLOSING_S", 60.0)
    engine = make()
    waiting = submit(engine, sources[0])
    assert wait_until(lambda: gate.begun == [sources[0]])
    running = submit(engine, None, count=400)
    next(iter(running))
    if crash:
        monkeypatch.setattr(engine._scheduler, "schedule", lambda *_: 1 / 0)
    else:
        threading.Thread(target=engine.close).start()
    assert wait_until(lambda: None not in (running.finish_reason, waiting.finish_reason))
    assert [reading.is_alive() for reading in engine._adapters._readers] == [True]
    reason = "error" if crash else "cancelled"
    for generation in (running, waiting):
        assert end(generation) == (reason, engine._ended if crash else "")
    gate.open()
    engine.close()
    assert not engine._adapters.begun


@pytest.mark.parametrize("fails", [False, True])
def test_closing_does_not_wait_for_ever(
    slots: Callable[[int], AdapterSlots],
    gate: Gate,
    sources: list[AdapterSource],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: bool,
) -> None:
    """Who reads still has the memory, and ends without a fault when the disk answers, or not."""
    monkeypatch.setattr(adapters, "CLOSING_S", 0.1)
    eight = slots(8)
    assert eight.take("one", sources[0]) is None
    [reading] = eight._readers
    eight.close()
    assert reading.is_alive()
    assert "1 adapters are still being read" in caplog.text
    assert not eight.begun
    if fails:
        monkeypatch.setattr(adapters, "open_adapter", lambda *_: open_missing())
    gate.open()
    reading.join(TIMEOUT)
    assert not reading.is_alive()


def open_missing() -> None:
    raise AdapterError("it is gone")


@pytest.mark.parametrize("ahead", [False, True])
def test_what_has_no_adapter_is_not_held_up(make: Make, gate: Gate, sources: list[AdapterSource], ahead: bool) -> None:
    """By as many as there are places that wait for theirs: they have no place before."""
    engine = make(ahead)
    waiting = [submit(engine, sources[i]) for i in range(2 * PLACES)]
    assert wait_until(lambda: bool(gate.begun))
    assert len(ids(submit(engine, None))) == 30
    assert [generation.place for generation in waiting] == [None] * len(waiting)
    gate.open()
    assert [len(ids(generation)) for generation in waiting] == [30] * len(waiting)
    assert came_back(engine)
