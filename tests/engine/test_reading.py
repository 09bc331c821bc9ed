"""Reading to a GPU, on a CPU that stands in for one: copies out of pinned memory that end late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mistral_nb.checkpoints.checkpoint import TensorInfo
from mistral_nb.engine import reading
from mistral_nb.engine.reading import Part, read_parts

CPU = torch.device("cpu")


class Stream:
    """Copies that nobody has waited for yet."""

    def __init__(self, device: object) -> None:
        self.pending: list[Callable[[], object]] = []

    def synchronize(self, first: int | None = None) -> None:
        while self.pending:
            self.pending.pop(0)()

    def wait_stream(self, other: object) -> None:
        pass


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        if self.stream:
            self.stream.synchronize()


class Later(TorchFunctionMode):
    """A copy that need not block is put off; whatever else is asked for comes after it."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.copy_ and kwargs == {"non_blocking": True}:
            self.stream.pending.append(lambda: func(*args))
            return args[0]
        if func in (Tensor.view, Tensor.__getitem__):
            return func(*args, **(kwargs or {}))
        self.stream.synchronize()
        return func(*args, **(kwargs or {}))


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    with Later(stream):
        yield


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_sends_to", lambda device: True)
    monkeypatch.setattr(reading, "_pinned", lambda size: torch.empty(size, dtype=torch.uint8))
    monkeypatch.setattr(reading, "SENT", 1000)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Tensor, TensorInfo]:
    """A tensor [100, 33] of fp32 behind 7 bytes of something else."""
    tensor = torch.randn(100, 33)
    path = tmp_path / "file"
    path.write_bytes(b"1234567" + tensor.numpy().tobytes())
    return tensor, TensorInfo("F32", (100, 33), path, 7, 7 + 4 * tensor.numel())


@pytest.mark.parametrize("threads", [1, 3])
def test_what_is_read_arrives(sending: None, written: tuple[Tensor, TensorInfo], threads: int) -> None:
    """Straight, though it is copied after the next blocks were read; in rows, a multiple of 4 of them at a time."""
    tensor, info = written
    direct, rows_place = torch.zeros(100, 33), torch.zeros(100, 33)
    firsts: list[int] = []

    def put(first: int, rows: Tensor) -> None:
        firsts.append(first)
        rows_place[first : first + len(rows)] = rows

    told: list[int] = []
    parts = [Part(info, put, direct), Part(info, put, step=4)]
    read_parts(parts, lambda done, total: told.append(done), threads=threads, device=CPU)
    assert torch.equal(direct, tensor)
    assert torch.equal(rows_place, tensor)
    assert sorted(firsts) == list(range(0, 100, 4))
    assert told[-1] == 2 * 4 * tensor.numel()


def test_a_failure_waits_for_copies_that_are_under_way(sending: None, written: tuple[Tensor, TensorInfo]) -> None:
    tensor, info = written
    direct = torch.zeros(100, 33)

    def give_up(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read_parts([Part(info, lambda first, rows: None, direct)], give_up, threads=1, device=CPU)
    assert torch.equal(direct, tensor)
