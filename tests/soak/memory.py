"""The process's memory, every second: how much more it takes than in the time in which it warmed up."""

from __future__ import annotations

import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mistral_nb.hardware import resident_memory

__all__ = ["GROWTH", "Growth", "Memory", "growth", "touched"]

WARM_S = 30.0
"""After so many seconds, and a round of every engine, all that is used over and over has been touched once."""
GROWTH = 20e6
"""Bytes that may come after that."""
EVERY_S = 1.0
PAGE = 4096
TRIES, MOMENT = 20, 1e6


@dataclass(frozen=True)
class Growth:
    """After the warm time: `more` bytes than ever in it, at most, and what a straight line through all samples gains
    from its beginning to its end.
    """

    samples: int
    more: float
    slope: float

    def check(self) -> None:
        worst = max(self.more, self.slope)
        assert worst <= GROWTH, f"memory grows: {self}"

    def __str__(self) -> str:
        return f"{self.more / 1e6:+.1f} MB at most, {self.slope / 1e6:+.1f} MB by a line through {self.samples} samples"


def growth(samples: Sequence[tuple[float, float]], warm: float) -> Growth | None:
    """Of (seconds, bytes); None where there are too few on either side of `warm` seconds."""
    before, after = [one for one in samples if one[0] < warm], [one for one in samples if one[0] >= warm]
    if len(before) < 2 or len(after) < 5:
        return None
    line = statistics.linear_regression(*zip(*after, strict=True))
    most = max(size for _, size in after) - max(size for _, size in before)
    return Growth(len(after), most, line.slope * (after[-1][0] - after[0][0]))


def touched(tensor: Tensor) -> int:
    """Bytes of a mapping of its own that the system has given memory to."""
    size = tensor.numel() * tensor.element_size()
    present = np.zeros(-(-size // PAGE), dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mincore(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(size), present.ctypes.data_as(ctypes.c_void_p)):
        raise OSError(ctypes.get_errno(), "mincore")
    return int(np.count_nonzero(present & 1)) * PAGE


class Memory(threading.Thread):
    """Samples until `stop`. `apart`: reserves, which are written to and given back as requests come and go."""

    def __init__(self, apart: Callable[[], Sequence[Tensor]]) -> None:
        super().__init__(name="memory", daemon=True)
        self.samples: list[tuple[float, float]] = []
        self._warm: float | None = None
        self._apart = apart
        self._over = threading.Event()
        self._began = time.monotonic()

    def all_ran(self) -> None:
        """All that the process does has been done once."""
        self._warm = self._warm or max(WARM_S, time.monotonic() - self._began)

    def stop(self) -> None:
        self._over.set()
        self.join()

    def told(self) -> str:
        """In words; `AssertionError` where it has grown."""
        if self._warm is None or (grown := growth(self.samples, self._warm)) is None:
            return "was watched for too short a time"
        grown.check()
        return f"after the first {self._warm:.0f} s: {grown}"

    def run(self) -> None:
        while not self._over.wait(EVERY_S):
            size = self._sample()
            if size is not None:
                self.samples.append((time.monotonic() - self._began, size))

    def _sample(self) -> float | None:
        """Of a moment in which hardly anything of the reserves comes or goes; None where there is no such, and where
        the system does not tell.
        """
        for _ in range(TRIES if resident_memory() else 0):
            before, resident = self._touched(), resident_memory()
            if resident and abs(self._touched() - before) < MOMENT:
                return resident - before
        return None

    def _touched(self) -> int:
        return sum(touched(tensor) for tensor in self._apart())
