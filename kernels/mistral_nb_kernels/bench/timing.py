"""Times of calls: on a GPU as the engine runs them, in a CUDA graph, or between events; on a CPU by the clock."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, perf_counter_ns
from typing import Any

import torch

from mistral_nb_kernels.bench.case import Case, Device
from mistral_nb_kernels.data_sheets import data_sheet

__all__ = [
    "Timing",
    "copy_ceiling",
    "device_facts",
    "fastest",
    "read_ceiling",
    "replayed",
    "rotated",
    "time_calls",
    "time_case",
    "time_peers",
]

LAST_LEVEL = 32 * 2**20
"""Bytes of a CPU's last cache, of which a process has no more for itself."""
MOST_ON_CPU = 8
"""Cases of one shape there."""
RUNS = 20
LEAST_SECONDS, MOST_SECONDS = 0.2, 2.0
"""Of measuring one case by the clock or by events."""
SLICE = 1000.0
"""Microseconds that a core is given to others at least."""
LOOKING = 0.25
"""Seconds of looking for the fastest run."""
FEWEST = 3
"""Runs of a call that takes longer than that."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds a call: the median and the 20th and 80th percentiles of `runs`.

    timer: "graph" (repeats within a CUDA graph), "events" (calls between two events, with what launches take and until
    all streams are done), "wall" (the clock), "waited" (the clock, but threads waited for a core that others had).
    """

    us: float
    p20: float
    p80: float
    runs: int
    timer: str

    @property
    def ms(self) -> float:
        """Milliseconds, the median."""
        return self.us / 1e3


def rotated(make: Callable[[], Case], device: Device = "cuda", most: int = 256) -> list[Case]:
    """As many cases of one shape as it takes that nothing of one is in the last cache when its turn comes again."""
    first = make()
    if torch.device(device).type == "cuda":
        cache, least = torch.cuda.get_device_properties(device).L2_cache_size, 2
    else:
        cache, least, most = LAST_LEVEL, 1, MOST_ON_CPU
    return [first, *(make() for _ in range(max(least, min(most, math.ceil(5 * cache / first.bytes))) - 1))]


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


def time_calls(
    calls: Sequence[Callable[[], Any]], device: Device = "cuda", repeats: int = RUNS, least_ms: float = 2.0
) -> Timing:
    """Time of one call among `calls`, which do the same on different buffers.

    On a GPU they are captured in one CUDA graph, and repeated within it until a replay takes about `least_ms`, so that
    starting it does not count; calls that wait for the GPU cannot be captured, and are timed one by one by events.
    """
    if torch.device(device).type == "cuda":
        return _timing(*_on_gpu(calls, repeats, least_ms))
    return _timing(*_on_cpu(calls))


def _on_cpu(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], str]:
    """Microseconds of each run, and the timer; once more where threads waited for a core."""
    _warm(calls)
    found = _one_by_one(calls, _clock)
    if not _waited(calls[0], found):
        return found, "wall"
    found = min(found, _one_by_one(calls, _clock), key=statistics.median)
    return found, "waited" if _waited(calls[0], found) else "wall"


def _waited(call: Callable[[], Any], us: Sequence[float]) -> bool:
    """Whether the median is a scheduler's: far above the fastest run, or above what one thread takes."""
    median = statistics.median(us)

    def far(best: float, times: int) -> bool:
        return median > times * best and median - best > SLICE

    if far(min(us), 3):
        return True
    threads = torch.get_num_threads()
    if threads == 1 or median < SLICE:
        return False
    torch.set_num_threads(1)
    try:
        return far(min(_one_by_one([call], _clock, FEWEST, 0.0)), 2)
    finally:
        torch.set_num_threads(threads)


def fastest(call: Callable[[], Any], device: Device = "cuda") -> float:
    """Microseconds of the fastest run: what is possible, whatever else the machine does.

    On a CPU with one thread, too: several wait for each other where others want the cores.
    """
    if torch.device(device).type == "cuda":
        return min(_on_gpu([call], RUNS, 2.0)[0])
    before, best = torch.get_num_threads(), math.inf
    try:
        for threads in dict.fromkeys((before, 1)):
            torch.set_num_threads(threads)
            _warm([call])
            best = min(best, *_one_by_one([call], _clock, FEWEST, LOOKING))
    finally:
        torch.set_num_threads(before)
    return best


def replayed(call: Callable[[], Any]) -> Callable[[], Any] | None:
    """What `time_calls` times of a call that has run before: each time the replay of a CUDA graph of it, and its
    result. None where it cannot be captured, and is timed as it is.
    """
    if _waits(call):
        return None
    found: list[Any] = []
    try:
        graph = _captured([lambda: found.append(call())], 1)
    except RuntimeError:
        return None

    def replay() -> Any:
        graph.replay()
        torch.cuda.synchronize()
        return found[0]

    return replay


def _on_gpu(calls: Sequence[Callable[[], Any]], repeats: int, least_ms: float) -> tuple[list[float], str]:
    """Microseconds of each run, and the timer."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    if _waits(calls[0]):
        return _one_by_one(calls, _awaited), "events"
    try:
        graph = _captured(calls, 1)
    except RuntimeError:
        return _one_by_one(calls, _awaited), "events"
    once = statistics.median(_event(graph.replay) for _ in range(3))
    rounds = max(1, min(50, math.ceil(least_ms * 1e3 / once)))
    if rounds > 1:
        graph = _captured(calls, rounds)
        for _ in range(2):
            graph.replay()
    return [_event(graph.replay) / (rounds * len(calls)) for _ in range(repeats)], "graph"


def _warm(calls: Sequence[Callable[[], Any]]) -> None:
    """Each once, as long as that does not take longer than what is measured."""
    began = perf_counter()
    for call in calls:
        call()
        if perf_counter() - began >= LEAST_SECONDS:
            return


def _timing(us: Sequence[float], timer: str) -> Timing:
    times = sorted(us)
    fifth = len(times) // 5
    return Timing(statistics.median(times), times[fifth], times[-1 - fifth], len(times), timer)


def _waits(call: Callable[[], Any]) -> bool:
    """Whether a call reads on the host what the GPU computes. A capture that fails for it would leave traces."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.cuda.synchronize()
    return False


def _captured(calls: Sequence[Callable[[], Any]], rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _one_by_one(
    calls: Sequence[Callable[[], Any]],
    timer: Callable[[Callable[[], Any]], float],
    runs: int = RUNS,
    seconds: float = LEAST_SECONDS,
) -> list[float]:
    """Microseconds of each run, at least so many and for so long; fewer where they take too long."""
    found: list[float] = []
    began = perf_counter()
    while True:
        found.append(timer(calls[len(found) % len(calls)]))
        passed = perf_counter() - began
        enough = len(found) >= runs and passed >= seconds
        if enough or (len(found) >= FEWEST and passed >= MOST_SECONDS):
            return found


def _clock(call: Callable[[], Any]) -> float:
    """Microseconds by the clock."""
    began = perf_counter_ns()
    call()
    return (perf_counter_ns() - began) / 1e3


def _event(call: Callable[[], Any]) -> float:
    """Microseconds between two events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end))


def _awaited(call: Callable[[], Any]) -> float:
    """The same until nothing is under way on any stream."""

    def all_of_it() -> None:
        call()
        torch.cuda.synchronize()

    return _event(all_of_it)


def read_ceiling() -> float:
    """GB/s that a kernel which only reads 2 GiB gets from device memory."""
    read = importlib.import_module("mistral_nb_kernels.read_kernel").read
    x = torch.randint(0, 1000, (2**29,), dtype=torch.int32, device="cuda")
    out = torch.zeros(1, dtype=torch.int32, device="cuda")

    def reading(block: int) -> Callable[[], Any]:
        return lambda: read(x, out, block)

    best = min(time_calls([reading(block)]).us for block in (4096, 8192, 16384))
    return x.nbytes / best / 1e3


def copy_ceiling() -> float:
    """GB/s of a device-to-device copy of 1 GiB, bytes read and bytes written."""
    source = torch.randint(0, 1000, (2**28,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_calls([lambda: target.copy_(source)]).us / 1e3


def device_facts() -> dict[str, Any]:
    """What a number needs beside it: device and versions, and what its data sheet says where that is known."""
    device = torch.cuda.get_device_name()
    sheet = data_sheet(device)
    return {
        "device": device,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "cuda": str(torch.version.cuda),
        **({} if sheet is None else {"spec_gbs": sheet.gbs, "spec_tflops": sheet.tflops}),
    }
