"""The engine as `mistral-nb bench engine` measures it, in a process of its own.

`python -m mistral_nb.engine.bench_probe --folder DIR ...` speaks the lines of JSON of `bench_peers`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mistral_nb.bench_peers import serve, torch_memory
from mistral_nb.engine.engine import Engine
from mistral_nb.engine.sampling import Sampling
from mistral_nb.engine.scheduler import Token
from mistral_nb.errors import EngineError
from mistral_nb_kernels.data_sheets import data_sheet

__all__ = ["Captures", "Probe", "kernel_times", "last_step", "options"]

GREEDY = Sampling(temperature=0.0)
_LAST_KERNEL = "sample_kernel"
_READ = 1 << 29
_REPEATS = 6


class Launch(NamedTuple):
    """A kernel's, a copy's or an operator's name, its microseconds, and those at which it began."""

    name: str
    us: float
    start: float = 0.0


class Probe:
    """An engine that is loaded, asked and closed as the lines say."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self._captures = Captures()
        logging.getLogger("mistral_nb.engine").addHandler(self._captures)
        logging.getLogger("mistral_nb.engine").setLevel(logging.INFO)
        self._cuda = asked.device == "cuda"
        self._threads = asked.threads
        if asked.profiled and self._cuda:
            torch.profiler._utils._init_for_cuda_graphs()
        self._engine = Engine.load(
            asked.folder,
            device=asked.device,
            precision=asked.precision,
            context=asked.context,
            max_batch=1,
            threads=asked.threads,
            packed_copy=asked.packed_copy,
            random=asked.random,
        )
        info = self._engine.info
        weights, kv = traffic(self._engine)
        self.facts = {
            "what": f"mistral-nb, {info.precision}",
            "device": info.device,
            "kernels": info.kernels,
            "context": info.context,
            "weight_bytes": weights,
            "kv_bytes": kv,
            "sheet": _sheet(info.device) if self._cuda else {},
        }

    def answer(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        ids: list[int] = []
        times: list[float] = []
        failed: list[str] = []
        over = threading.Event()

        def take(token: Token) -> None:
            times.append(time.perf_counter() - began)
            if token.id is not None:
                ids.append(token.id)
            if token.finish_reason is not None:
                failed.append(token.error)
                over.set()

        began = time.perf_counter()
        self._engine.submit(prompt, GREEDY, tokens, on_token=take)
        over.wait()
        if len(ids) != tokens:
            raise EngineError(f"{len(ids)} of {tokens} tokens were written ({failed[0] or 'no error was told'})")
        return {"first": times[0], "last": times[-1], "ids": ids}

    def copied(self) -> dict[str, Any]:
        """Wait for the packed copy, where one is being made."""
        copying = self._engine._copying
        return {"done": copying is not None and copying.wait()}

    def memory(self) -> dict[str, Any]:
        """Bytes, and of each CUDA graph the seconds and megabytes that capturing it took, by the places in its step."""
        return {**torch_memory(torch), "captures": self._captures.found}

    def read(self) -> dict[str, float]:
        """GB/s that this machine reads memory with at most."""
        if self._cuda:
            from mistral_nb_kernels.bench.timing import read_ceiling

            return {"gbs": read_ceiling()}
        return {"gbs": max(_read_speed(threads) for threads in range(1, self._threads + 1))}

    def profile(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """What is launched in the steps of an answer: see `kernel_times` and `last_step`."""
        self.answer(prompt, tokens)
        prefill, whole = (self._launches(prompt, count) for count in (1, tokens))
        return {"launches": kernel_times(prefill, whole, tokens - 1), "step": last_step(whole)}

    def _launches(self, prompt: list[int], tokens: int) -> list[Launch]:
        with _profiler(self._cuda) as profiler:
            self.answer(prompt, tokens)
        return [
            Launch(
                event.name,
                event.time_range.elapsed_us() if self._cuda else event.self_cpu_time_total,
                event.time_range.start,
            )
            for event in profiler.events()
            if event.device_type.name == ("CUDA" if self._cuda else "CPU")
        ]

    def close(self) -> dict[str, Any]:
        """End the engine. `torch_kept`: bytes that torch still has of a GPU then."""
        self._engine.close()
        return {"torch_kept": torch.cuda.memory_reserved()} if self._cuda else {}


def _profiler(cuda: bool) -> Any:
    """Of the GPU; else of torch's operators on the CPU, in every thread."""
    activity = torch.profiler.ProfilerActivity
    if cuda:
        return torch.profiler.profile(activities=[activity.CUDA])
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    return torch.profiler.profile(activities=[activity.CPU], experimental_config=every_thread)


def kernel_times(prefill: Sequence[Launch], whole: Sequence[Launch], steps: int) -> list[dict[str, Any]]:
    """Of each name the launches and microseconds in one decoding step: those of a whole answer without those of its
    prompt, over its steps. The longest comes first.
    """
    sums: dict[str, list[float]] = {}
    for sign, launches in ((1, whole), (-1, prefill)):
        for launch in launches:
            each = sums.setdefault(launch.name, [0.0, 0.0])
            each[0] += sign / steps
            each[1] += sign * launch.us / steps
    longest = sorted(sums.items(), key=lambda item: -item[1][1])
    counted = ((name, round(count, 2), round(us, 2)) for name, (count, us) in longest)
    return [{"name": name, "launches": count, "us": us} for name, count, us in counted if count > 0]


def last_step(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """Every launch of the last whole step in order, with the microseconds from the end of the one before it (`gap`).
    A step is over with its sampling; nothing where no kernel of that name was launched twice.
    """
    ordered = sorted(launches, key=lambda launch: launch.start)
    ends = [at for at, launch in enumerate(ordered) if launch.name.startswith(_LAST_KERNEL)]
    step = ordered[ends[-2] : ends[-1] + 1] if len(ends) > 1 else []
    return [
        {"name": launch.name, "us": round(launch.us, 2), "gap": round(launch.start - before.start - before.us, 2)}
        for before, launch in pairwise(step)
    ]


def _sheet(device: str) -> dict[str, int]:
    sheet = data_sheet(device)
    return sheet._asdict() if sheet else {}


class Captures(logging.Handler):
    """Of each CUDA graph the places in its step, and the seconds and megabytes that capturing it took."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("captured") and isinstance(record.args, tuple):
            self.found.append(dict(zip(("places", "seconds", "megabytes"), record.args, strict=False)))


def traffic(engine: Engine) -> tuple[int, int]:
    """Bytes that a decoding step reads: of weights, of which the embeddings are one row, and of each token's KV."""
    model = engine._runner._model  # type: ignore[attr-defined]
    args, weights = model.args, model.weights
    read = {id(each): each for each in _tensors((weights.layers, weights.norm, weights.output))}
    kv = 2 * args.n_layers * args.n_kv_heads * args.head_dim * model.kv_dtype.itemsize
    return sum(each.numel() * each.itemsize for each in read.values()) + args.dim * model.dtype.itemsize, kv


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, tuple):
        for each in part:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _tensors(getattr(part, field.name))


def _read_speed(threads: int) -> float:
    """GB/s of the fastest of a few operators that read half a GB and write nothing."""
    torch.set_num_threads(threads)
    x = torch.ones(_READ // 4)
    whole = x.view(torch.int64)
    operators: tuple[Callable[[], Any], ...] = (x.sum, whole.sum, x.amax, lambda: torch.dot(x, x))
    best = float("inf")
    for _ in range(_REPEATS):
        for operator in operators:
            began = time.perf_counter()
            operator()
            best = min(best, time.perf_counter() - began)
    return _READ / best / 1e9


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--packed-copy", type=Path)
    parser.add_argument("--random", action="store_true", help="weights that only the folder's config is read for")
    parser.add_argument("--profiled", action="store_true", help="launches will be asked for")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    asked = options()
    serve(lambda: Probe(asked))
