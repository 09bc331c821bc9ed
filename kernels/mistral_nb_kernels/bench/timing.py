"""Times of GPU work as the engine runs it, in a CUDA graph, and what the machine's memory gives at most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from mistral_nb_kernels.bench.case import Case

__all__ = ["Timing", "copy_ceiling", "device_facts", "read_ceiling", "rotated", "time_calls", "time_case", "time_peers"]

DATA_SHEETS = {
    "H100 80GB HBM3": (3350, 989),
    "H200": (4800, 989),
    "A100-SXM4-80GB": (2039, 312),
    "RTX 4090": (1008, 165),
    "L4": (300, 121),
    "T4": (320, 65),
}
"""GB/s of device memory, and TFLOP/s of dense products in 16 bits, by a part of the device's name."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds a call: the median and the 20th and 80th percentiles of the repeats."""

    ms: float
    p20: float
    p80: float


def rotated(make: Callable[[], Case], most: int = 256) -> list[Case]:
    """As many cases of one shape as it takes that nothing of one is in L2 when its turn comes again."""
    first = make()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return [first, *(make() for _ in range(max(2, min(most, math.ceil(5 * l2 / first.bytes))) - 1))]


def time_case(make: Callable[[], Case], function: Callable[..., Any]) -> tuple[Timing, Case]:
    """Of an op on a case, once it has been right; `ValueError` if it is wrong."""
    cases = rotated(make)
    wrong = cases[0].wrong(function)
    if wrong:
        raise ValueError(wrong)
    return time_calls([case.call(function) for case in cases]), cases[0]


def time_peers(
    make: Callable[[], Case], peers: Callable[[Case], Mapping[str, Callable[[], Any]]]
) -> tuple[dict[str, Timing], Case]:
    """Of what others have for a case, by name. One that turns out not to run on this machine is told, and left out."""
    cases = rotated(make)
    sets = [peers(case) for case in cases]
    found = {}
    for name in sets[0]:
        try:
            found[name] = time_calls([calls[name] for calls in sets])
        except RuntimeError as error:
            print(f"{name} does not run: {str(error)[:200]}", flush=True)
    return found, cases[0]


def time_calls(calls: Sequence[Callable[[], Any]], repeats: int = 20, least_ms: float = 2.0) -> Timing:
    """Time of one call among `calls`, which do the same on different buffers, captured in one CUDA graph.

    They are repeated within the graph until a replay takes about `least_ms`, so that starting it does not count.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = _captured(calls, 1)
    once = statistics.median(_events(graph.replay, 3))
    rounds = max(1, min(50, math.ceil(least_ms / once)))
    if rounds > 1:
        graph = _captured(calls, rounds)
        _events(graph.replay, 2)
    times = sorted(ms / (rounds * len(calls)) for ms in _events(graph.replay, repeats))
    return Timing(statistics.median(times), times[len(times) // 5], times[-1 - len(times) // 5])


def _captured(calls: Sequence[Callable[[], Any]], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


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


def device_facts() -> dict[str, Any]:
    """What a number needs beside it: device and versions, and what its data sheet says where that is known."""
    device = torch.cuda.get_device_name()
    sheet = next((sheet for name, sheet in DATA_SHEETS.items() if device.endswith(name)), None)
    return {
        "device": device,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        **({} if sheet is None else {"spec_gbs": sheet[0], "spec_tflops": sheet[1]}),
    }
