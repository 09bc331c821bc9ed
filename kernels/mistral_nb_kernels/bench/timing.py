"""Times of GPU work as the engine runs it, in a CUDA graph, and what the machine's memory gives at most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["Timing", "copy_ceiling", "device_facts", "read_ceiling", "rotation", "time_calls"]


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds a call: the median and the 20th and 80th percentiles of the repeats."""

    ms: float
    p20: float
    p80: float


def rotation(set_bytes: int, most: int = 256) -> int:
    """How many sets of inputs of that size are needed so that none of them is in L2 when its turn comes again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(most, math.ceil(5 * l2 / set_bytes)))


def time_calls(calls: Sequence[Callable[[], Any]], repeats: int = 20, least_ms: float = 2.0) -> Timing:
    """Time of one call among `calls`, which do the same on different buffers, captured in one CUDA graph.

    They are repeated within the graph until a replay takes about `least_ms`, so that starting it does not count.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    once = _events(lambda: [call() for call in calls], 3)
    rounds = max(1, min(50, math.ceil(least_ms / statistics.median(once))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    _events(graph.replay, 3)
    times = sorted(ms / (rounds * len(calls)) for ms in _events(graph.replay, repeats))
    return Timing(statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5])


def _events(call: Callable[[], Any], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return found


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr):
    """Reads BLOCK words, and writes only if their largest is one that is not there."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.max(tl.load(x + at), axis=0)
    if largest == 123456789:
        tl.store(out, largest)


def read_ceiling() -> float:
    """GB/s that a kernel which only reads 2 GiB gets from device memory."""
    x = torch.randint(0, 1000, (2**29,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(block: int) -> Callable[[], Any]:
        return lambda: _read_kernel[(2**29 // block,)](x, out, BLOCK=block, num_warps=8)

    best = min(time_calls([read(block)]).ms for block in (4096, 8192, 16384))
    return 2**31 / best / 1e6


def copy_ceiling() -> float:
    """GB/s of a device-to-device copy of 1 GiB, bytes read and bytes written."""
    source = torch.randint(0, 1000, (2**28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2**31 / time_calls([lambda: target.copy_(source)]).ms / 1e6


def device_facts() -> dict[str, str]:
    """What a number needs beside it: device and versions."""
    return {
        "device": torch.cuda.get_device_name(),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }
