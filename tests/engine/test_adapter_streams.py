"""How adapters are read into a GPU's slots, on the CPU: what waits for what, and whole slots are written.

The slots are on torch's meta device, which has no numbers; streams and events tell what they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_nb.checkpoints.adapter_files import open_adapter
from mistral_nb.engine.adapters import GROUPS, _Memory
from tests.engine.tiny_adapters import LAYERS, Tiny, tiny, write

META = torch.device("meta")
SLOTS, RANK, OWN = 3, 16, 5


class Copies(TorchDispatchMode):
    """Tells of what is copied to the slots, and keeps how much."""

    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].device == META:
            self._told.append("copy")
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What streams and events were asked for, in order."""
    asked: list[str] = []

    class Event:
        def record(self) -> None:
            asked.append("record")

        def wait(self) -> None:
            asked.append("wait")

    class Stream:
        def __init__(self, device: torch.device, priority: int = 0) -> None:
            asked.append(f"stream of priority {priority}")

        def synchronize(self) -> None:
            asked.append("synchronize")

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        asked.append("on the stream")
        yield
        asked.append("off the stream")

    for name, value in {"Event": Event, "Stream": Stream, "stream": on}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return asked


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("tiny"))


def memory_of(base: Tiny) -> _Memory:
    return _Memory(base.model.args, torch.float16, META, SLOTS, RANK, {group: [0] * SLOTS for group in GROUPS})


def test_a_slot_is_written_after_all_that_reads_it_and_is_there_when_the_reading_ends(
    base: Tiny, tmp_path: Path, told: list[str]
) -> None:
    """On a stream on which no step is captured: those of the usual priority are handed out in turn."""
    adapter = write(tmp_path / "one", base, ["q_proj", "down_proj"], OWN)
    memory = memory_of(base)
    assert told == ["stream of priority -1"]
    told.clear()
    cleared = memory.clear(1)
    assert told == ["record"]
    with Copies(told) as copies:
        memory.read(open_adapter(adapter.folder, base.model.args), 1, cleared, lambda: False)
    copied = ["copy"] * (LAYERS * len(GROUPS) * 2)
    assert told == ["record", "on the stream", "wait", *copied, "synchronize", "off the stream"]
    loras = [getattr(layer, group) for layer in memory.layers for group in GROUPS]
    assert copies.sizes == [matrices[1].numel() for lora in loras for matrices in (lora.a, lora.b)]


def test_a_reading_that_nobody_waits_for_ends_between_two_layers(base: Tiny, tmp_path: Path, told: list[str]) -> None:
    adapter = write(tmp_path / "one", base, rank=OWN)
    memory, asked = memory_of(base), iter((False, True))
    with Copies(told):
        memory.read(open_adapter(adapter.folder, base.model.args), 0, memory.clear(0), lambda: next(asked))
    assert told.count("copy") == len(GROUPS) * 2


def test_steps_read_the_slots_where_they_stay(base: Tiny, told: list[str]) -> None:
    """One buffer, whose views are made once, each 16 bytes aligned: a graph keeps their addresses."""
    memory = memory_of(base)
    assert memory.layers is memory.layers
    for layer in memory.layers:
        for group in GROUPS:
            lora = getattr(layer, group)
            assert lora.ranks is None
            for matrices in (lora.a, lora.b):
                assert matrices.untyped_storage().nbytes() == memory._data.untyped_storage().nbytes()
                assert matrices.storage_offset() % 8 == matrices.stride(0) % 8 == matrices.stride(1) % 8 == 0
