"""Memory for weights: on Linux in huge pages, which are cheaper to touch first and to read through."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from mistral_nb.errors import ModelError

__all__ = ["Arena", "Reserve", "pages"]

REGION = 1 << 28
"""Bytes that are asked of the system at a time. What is never written to takes no memory."""

ALIGNMENT = 64

NORESERVE = 0x4000 if sys.platform == "linux" else 0
"""Linux's MAP_NORESERVE: no more is promised than is there. Python has the name from 3.13 on."""


class Arena:
    """Hands out tensors on `device`; the memory is given back when the last of them is gone.

    On the CPU they share regions of huge pages where the system has them: 2.4 GB of new memory were touched at 22 GB/s
    so, and at 3 GB/s in pages of 4 kB (AMD EPYC, 2 cores, one thread).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._region: mmap.mmap | None = None
        self._used = 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor with nothing in it. Where there is no memory for it, `torch.OutOfMemoryError` on a GPU, else
        `ModelError`.
        """
        if self._device.type == "cuda":
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)
        with _memory():
            if self._device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
                return torch.empty(tuple(shape), dtype=dtype, device=self._device)
            return self._cut(math.prod(shape), dtype).view(tuple(shape))

    def passing(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `tensor`; on the CPU its memory is given back with itself."""
        if self._device.type != "cpu":
            return self.tensor(shape, dtype)
        with _memory():
            return pages(math.prod(shape) * dtype.itemsize).view(dtype).view(tuple(shape))

    def _cut(self, count: int, dtype: torch.dtype) -> Tensor:
        size = count * dtype.itemsize
        if self._region is None or self._used + size > len(self._region):
            self._region = _huge_pages(max(size, REGION))
            self._used = 0
        tensor = torch.frombuffer(self._region, dtype=dtype, count=count, offset=self._used)
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return tensor


@contextmanager
def _memory() -> Iterator[None]:
    """Around what asks the system for it: `ModelError` where it has none."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:  # torch raises the last
        first = str(error).partition("\n")[0]
        raise ModelError(
            f"there is no memory for the model's weights ({first}); free some, or choose a smaller precision"
        ) from error


def pages(size: int) -> Tensor:
    """`size` bytes of the CPU's memory, which the system has back as soon as the tensor is gone."""
    return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)


def _huge_pages(size: int) -> mmap.mmap:
    """New memory; in pages of the usual size where the kernel has no others."""
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    return region


class Reserve:
    """A tensor [n, ...] of the CPU's memory that takes none before it is written to; rows are given back one by one."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = max(1, math.prod(shape) * dtype.itemsize)
        self._row = size // shape[0]
        try:
            if hasattr(mmap, "MAP_PRIVATE"):
                self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
            else:
                self._memory = mmap.mmap(-1, size)
        except OSError as error:
            told = f"the system gives no addresses for {size / 1e9:.1f} GB: {error.strerror}"
            raise ModelError(f"{told}; lower --context, or raise the limit (ulimit -v)") from None
        self.tensor = torch.frombuffer(self._memory, dtype=dtype).view(tuple(shape))

    @property
    def zeroes(self) -> bool:
        """Whether a row that was given back is zeros: macOS keeps what it held, and Windows takes nothing back."""
        return sys.platform == "linux" and self._row % mmap.PAGESIZE == 0

    def release(self, row: int, parts: int = 1, kept: int = 0) -> None:
        """Give a row's memory back to the system, where it takes it, but the first `kept` bytes of each of its `parts`.
        What it held is lost.
        """
        size = self._row // parts
        for part in range(row * self._row, row * self._row + parts * size, size):
            begin = -(-(part + kept) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (part + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > begin and hasattr(mmap, "MADV_DONTNEED"):
                self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)
