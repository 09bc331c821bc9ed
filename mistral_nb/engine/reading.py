"""Tensors out of a checkpoint's files: plain reads by a few threads, straight to their place or in blocks of rows.

The files are not mapped: their pages would count as the process's own beside the weights, and a file that is cut short
meanwhile would kill the process.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mistral_nb.checkpoints.checkpoint import TensorInfo
from mistral_nb.checkpoints.untrusted import AGAIN, open_file, readable
from mistral_nb.engine.arena import pages
from mistral_nb.errors import ModelError

__all__ = ["DTYPES", "Part", "read_parts"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""torch's dtypes by the names in the files."""

DIRECT = 1 << 24
"""Bytes that one read puts straight into their place."""

BLOCK = 1 << 21
"""Bytes of rows that are converted at a time: what is made of them on the way stays in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor on its way.

    Its bytes go as they are into the CPU tensor `direct`; without one, its rows [n, columns] go to `put(first, rows)`,
    which may overwrite them, in any order and from several threads, a multiple of `step` rows at a time. A vector is
    one row.
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


def read_parts(
    parts: Sequence[Part], progress: Callable[[int, int], None], *, threads: int, pinned: bool = False
) -> None:
    """Read all of `parts`; `progress(done, total)` gets bytes, in this thread, and an exception from it ends the work.

    `pinned` is for rows that go to a GPU. Raises `ModelError` for a file that cannot be read or ends early.
    """
    ordered = sorted(parts, key=lambda part: (part.info.file, part.info.start))
    blocks = [block for part in ordered for block in _blocks(part)]
    total = sum(block.size for block in blocks)
    reader = _Reader(max((block.size for block in blocks if block.part.direct is None), default=0), pinned)
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


def _blocks(part: Part) -> Iterator[_Block]:
    size = part.info.end - part.info.start
    if part.direct is not None:
        for start in range(0, size, DIRECT):
            yield _Block(part, start, min(DIRECT, size - start), 0)
        return
    rows = 1 if len(part.info.shape) == 1 else part.info.shape[0]
    row = size // rows
    together = max(1, BLOCK // (row * part.step)) * part.step
    for first in range(0, rows, together):
        yield _Block(part, first * row, min(together, rows - first) * row, first)


class _Reader:
    """What the threads share. Each has open files and a scratch memory of its own."""

    def __init__(self, scratch: int, pinned: bool) -> None:
        self._scratch = scratch
        self._pinned = pinned
        self._own = threading.local()
        self._opened: list[BinaryIO] = []

    def read(self, block: _Block) -> int:
        """Read a block and hand its rows on; the bytes that were read."""
        info, part = block.part.info, block.part
        at = info.start + block.start
        if part.direct is not None:
            self._fill(info.file, at, _bytes_of(part.direct)[block.start : block.start + block.size])
            return block.size
        scratch = self._own_scratch()[: block.size]
        self._fill(info.file, at, _bytes_of(scratch))
        part.put(block.first, scratch.view(DTYPES[info.dtype]).view(-1, info.shape[-1]))
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

    def _own_scratch(self) -> Tensor:
        if not hasattr(self._own, "scratch"):
            size = self._scratch
            self._own.scratch = torch.empty(size, dtype=torch.uint8, pin_memory=True) if self._pinned else pages(size)
        scratch: Tensor = self._own.scratch
        return scratch

    def close(self) -> None:
        for file in self._opened:
            file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, which must outlive the view."""
    assert tensor.is_contiguous()
    size = tensor.numel() * tensor.itemsize
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
