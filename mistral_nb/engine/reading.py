"""Tensors out of files: plain reads by a few threads, straight to their place, in blocks of rows, or to a GPU.

The files are not mapped: their pages would count as the process's own beside the weights, and a file that is cut short
meanwhile would kill the process. What goes to a GPU is read into pinned memory, of which each thread has a few blocks:
while one is copied, the next is read. Rows are converted there, on the thread's own stream.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from mistral_nb.checkpoints.checkpoint import StoredDType, TensorInfo
from mistral_nb.checkpoints.untrusted import AGAIN, open_file, readable
from mistral_nb.engine.arena import pages
from mistral_nb.errors import ModelError

__all__ = ["DTYPES", "Part", "ReadError", "read_parts"]

DTYPES: dict[StoredDType, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""torch's dtypes by the names in the files."""

DIRECT = 1 << 24
"""Bytes that one read puts straight into their place on the CPU."""

BLOCK = 1 << 21
"""Bytes of rows that the CPU converts at a time: what is made of them on the way stays in the processor's cache."""

SENT = 1 << 22
"""Bytes that are copied to a GPU at a time: at 25 GB/s 0.2 ms, some ten times what asking for it takes."""

PINNED = 3
"""Blocks of pinned memory for each thread."""


class ReadError(ModelError):
    """The file at `path` cannot be read, or does not hold what it should."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor on its way.

    Its bytes go as they are into the tensor `direct`; without one, its rows [n, columns], on the device that they are
    for, go to `put(first, rows)`, which may overwrite them, in any order and from several threads, a multiple of `step`
    rows at a time. A vector is one row.
    """

    info: TensorInfo
    put: Callable[[int, Tensor], None]
    direct: Tensor | None = None
    step: int = 1


@dataclass(frozen=True, slots=True)
class _Block:
    """A piece of a part: bytes of the tensor, from its first on, and the row that it begins with."""

    part: Part
    start: int
    size: int
    first: int

    def rows(self, data: Tensor) -> Tensor:
        info = self.part.info
        return data.view(DTYPES[info.dtype]).view(-1, info.shape[-1])


def read_parts(
    parts: Sequence[Part], progress: Callable[[int, int], None], *, threads: int, device: torch.device
) -> None:
    """Read all of `parts` to `device`; `progress(done, total)` gets bytes, in this thread, and an exception from it
    ends the work. Raises `ReadError` for a file that cannot be read or ends early.
    """
    ordered = sorted(parts, key=lambda part: (part.info.file, part.info.start))
    sends = _sends_to(device)
    blocks = [block for part in ordered for block in _blocks(part, *((SENT, SENT) if sends else (DIRECT, BLOCK)))]
    total = sum(block.size for block in blocks)
    largest = max((block.size for block in blocks if sends or block.part.direct is None), default=0)
    reader = _Reader((lambda: _Sending(largest, device)) if sends else (lambda: _Here(largest)))
    done = 0
    progress(done, total)
    # torch shares one operator among threads of its own, which would be in the way of ours; the last thread to say how
    # many there are says it for every thread to come
    usual = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "mistral-nb read", torch.set_num_threads, (1,)) as pool:
        try:
            for read in [pool.submit(reader.read, block) for block in blocks]:
                done += read.result()
                progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(usual)
            reader.close()


def _sends_to(device: torch.device) -> bool:
    return device.type != "cpu"


def _blocks(part: Part, direct: int, block: int) -> Iterator[_Block]:
    size = part.info.end - part.info.start
    if part.direct is not None:
        for start in range(0, size, direct):
            yield _Block(part, start, min(direct, size - start), 0)
        return
    rows = 1 if len(part.info.shape) == 1 else part.info.shape[0]
    row = size // rows
    together = max(1, block // (row * part.step)) * part.step
    for first in range(0, rows, together):
        yield _Block(part, first * row, min(together, rows - first) * row, first)


class _Lane(Protocol):
    """One thread's way to the device."""

    def memory(self, block: _Block) -> Tensor:
        """Where to read `block` to: as many bytes of the CPU's memory."""
        ...

    def hand_on(self, block: _Block) -> None:
        """What was read there goes on to its place."""
        ...

    def close(self) -> None:
        """Wait until all of it is there."""
        ...


class _Here:
    """To the CPU: straight, or through memory that is used again for every block of rows."""

    def __init__(self, largest: int) -> None:
        self._scratch = pages(largest) if largest else torch.empty(0, dtype=torch.uint8)

    def memory(self, block: _Block) -> Tensor:
        if block.part.direct is None:
            return self._scratch[: block.size]
        return _flat(block.part.direct)[block.start : block.start + block.size]

    def hand_on(self, block: _Block) -> None:
        if block.part.direct is None:
            block.part.put(block.first, block.rows(self._scratch[: block.size]))

    def close(self) -> None:
        pass


class _Sending:
    """To a GPU, through pinned blocks in turn: one is read into again when the copy out of it has ended."""

    def __init__(self, largest: int, device: torch.device) -> None:
        self._pinned = [_pinned(largest) for _ in range(PINNED)]
        self._copied = [torch.cuda.Event() for _ in range(PINNED)]  # type: ignore[no-untyped-call]
        self._turn = -1
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            self._arrived = torch.empty(largest, dtype=torch.uint8, device=device)

    def memory(self, block: _Block) -> Tensor:
        self._turn = (self._turn + 1) % PINNED
        self._copied[self._turn].synchronize()
        return self._pinned[self._turn][: block.size]

    def hand_on(self, block: _Block) -> None:
        direct = block.part.direct
        place = self._arrived[: block.size]
        if direct is not None:
            place = _flat(direct)[block.start : block.start + block.size]
        with torch.cuda.stream(self._stream):
            place.copy_(self._pinned[self._turn][: block.size], non_blocking=True)
            self._copied[self._turn].record(self._stream)
            if direct is None:
                block.part.put(block.first, block.rows(place))

    def close(self) -> None:
        self._stream.synchronize()


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _Reader:
    """What the threads share. Each has open files and a lane of its own."""

    def __init__(self, lane: Callable[[], _Lane]) -> None:
        self._new_lane = lane
        self._own = threading.local()
        self._opened: list[BinaryIO] = []
        self._lanes: list[_Lane] = []

    def read(self, block: _Block) -> int:
        """Read a block and hand it on; the bytes that were read."""
        info, lane = block.part.info, self._lane()
        try:
            self._fill(info.file, info.start + block.start, _bytes_of(lane.memory(block)))
        except ModelError as error:
            raise ReadError(info.file, str(error)) from error
        lane.hand_on(block)
        return block.size

    def _fill(self, path: Path, at: int, view: memoryview) -> None:
        with readable(path):
            file = self._file(path)
            file.seek(at)
            while len(view):
                got = file.readinto(view)  # type: ignore[attr-defined]
                if not got:
                    raise ModelError(f"{path} was cut short while it was being read; {AGAIN}")
                view = view[got:]

    def _file(self, path: Path) -> BinaryIO:
        if not hasattr(self._own, "files"):
            self._own.files = {}
        files: dict[Path, BinaryIO] = self._own.files
        if path not in files:
            files[path] = open_file(path)
            self._opened.append(files[path])
        return files[path]

    def _lane(self) -> _Lane:
        if not hasattr(self._own, "lane"):
            self._own.lane = self._new_lane()
            self._lanes.append(self._own.lane)
        lane: _Lane = self._own.lane
        return lane

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        for file in self._opened:
            file.close()


def _flat(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which must outlive the view."""
    assert tensor.is_contiguous()
    size = tensor.numel() * tensor.itemsize
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
