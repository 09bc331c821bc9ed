"""The engine: token ids in, token ids out. One thread schedules, runs the model and hands out tokens."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import mistral_nb_kernels as ops
from mistral_nb.engine.args import ModelArgs
from mistral_nb.engine.model import Span, Transformer
from mistral_nb.engine.sampling import Sampler, Sampling
from mistral_nb.engine.scheduler import PREFILL_CHUNK, Generation, Scheduler, Step, Token
from mistral_nb.engine.weights import Precision, load_weights
from mistral_nb.errors import ConfigurationError, ContextOverflow, EngineError, InvalidRequest

__all__ = ["Engine", "EngineInfo"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded. `context` in tokens; `weight_bytes` is what one decoding step reads."""

    model: str
    device: str
    precision: Precision
    context: int
    vocab_size: int
    weight_bytes: int
    threads: int
    kernels: str


class Engine:
    """Serves many generations at once from one model.

    A text does not depend on what runs beside it (int8 on the CPU): prompts are prefilled one sequence at a time in
    chunks of fixed bounds, and every op of the decoding batch works row by row.

    On the CPU decoding leaves half of the threads alone. It waits for all its threads 120 times a token, so that each
    other process that wants a core would hold it up: on 2 cores with one of them busy, a token took 13 ms with one
    thread and 48 ms with two. A prompt's steps are longer and take all of them.
    """

    def __init__(self, model: Transformer, info: EngineInfo, *, max_batch: int = 8) -> None:
        self.info = info
        self._model = model
        # two full contexts: the longest request always fits, and others need not wait for it
        self._scheduler = Scheduler(max_batch, 2 * info.context, model.new_cache)
        self._wake = threading.Condition()
        self._closing = False
        self._failure = ""
        self._thread = threading.Thread(target=self._loop, name="mistral-nb engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Precision | Literal["auto"] = "auto",
        max_batch: int = 8,
        threads: int | None = None,
    ) -> Engine:
        """Load a checkpoint folder and start the engine's thread.

        `auto` takes an NVIDIA GPU where there is one, in bf16 (fp16 before compute capability 8.0), else the CPU in
        int8. `threads` is for prompts on the CPU, by default the largest power of two that the machine's CPUs allow;
        decoding takes half as many. Raises `ModelError` for a checkpoint that does not fit and `ConfigurationError` for
        a device that is not there.
        """
        target = _device(device)
        chosen = _precision(precision, target)
        threads = threads or _power_of_two(_cpus())
        torch.set_num_threads(threads)
        args = ModelArgs.from_folder(folder)
        weights = load_weights(folder, args, chosen, target)
        name = torch.cuda.get_device_name(target) if target.type == "cuda" else f"CPU, {threads} threads"
        info = EngineInfo(
            model=folder.name,
            device=name,
            precision=chosen,
            context=args.context,
            vocab_size=args.vocab_size,
            weight_bytes=weights.nbytes,
            threads=threads,
            kernels=ops.kernels_in_use(),
        )
        return cls(Transformer(args, weights), info, max_batch=max_batch)

    @property
    def active(self) -> int:
        """Generations that wait or run."""
        with self._wake:
            return len(self._scheduler)

    @property
    def failure(self) -> str:
        """Why the engine's loop ended on its own; empty while it serves."""
        return self._failure

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        on_token: Callable[[Token], None] | None = None,
    ) -> Generation:
        """Queue a generation; its tokens go to `on_token`, on the engine's thread, or to whoever iterates it.

        `max_tokens` is cut to what the context leaves. Raises `ContextOverflow` when the context leaves nothing,
        `InvalidRequest` for an empty prompt or an id outside the vocabulary, `EngineError` once closed.
        """
        ids = list(prompt_ids)
        if not ids:
            raise InvalidRequest("prompt", "0 tokens", "must hold at least one token")
        outside = next((i for i in ids if not 0 <= i < self.info.vocab_size), None)
        if outside is not None:
            raise InvalidRequest("prompt", outside, f"token ids go from 0 to {self.info.vocab_size - 1}")
        room = self.info.context - len(ids)
        if room < 1:
            raise ContextOverflow(len(ids), self.info.context)
        sampler = Sampler(sampling, ids, self.info.vocab_size, self._model.device)
        generation = Generation(ids, sampler, min(max_tokens, room), stop_ids, on_token, self._notify)
        with self._wake:
            if self._closing or self._failure:
                raise EngineError(f"the engine has ended ({self._failure or 'closed'}); start it again")
            self._scheduler.submit(generation)
            self._wake.notify()
        return generation

    def close(self) -> None:
        """End every generation as cancelled and let the model go. May be called more than once."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _loop(self) -> None:
        failure = "the engine's loop ended unexpectedly; see the log"
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or len(self._scheduler))
                    if self._closing:
                        failure = ""
                        return
                    step = self._scheduler.schedule()
                if step:
                    self._run(step)
        finally:
            with self._wake:
                self._failure = failure
                for generation in self._scheduler.all():
                    if failure:
                        generation.finish("error", error=failure)
                    else:
                        generation.finish("cancelled")

    def _run(self, step: Step) -> None:
        try:
            if step.prefill is not None:
                self._prefill(step.prefill)
            if step.decode:
                self._decode(step.decode)
        except RuntimeError as error:
            log.exception("a step of the model failed")
            message = f"the model failed ({str(error).splitlines()[0]}); ask for less at once"
            for generation in (*step.decode, *([step.prefill] if step.prefill else [])):
                generation.finish("error", error=message)

    def _prefill(self, generation: Generation) -> None:
        """The next chunk of the prompt; the first token after the last one."""
        assert generation.cache is not None
        torch.set_num_threads(self.info.threads)
        start = generation.cache.length
        chunk = generation.prompt_ids[start : start + PREFILL_CHUNK]
        logits = self._model.forward([Span(chunk, generation.cache)])
        if generation.cache.length == generation.prompt_tokens:
            generation.take(generation.sampler.next(logits[0]))

    def _decode(self, generations: Sequence[Generation]) -> None:
        torch.set_num_threads(max(1, self.info.threads // 2))
        spans = []
        for generation in generations:
            assert generation.cache is not None
            assert generation.last_token is not None
            spans.append(Span([generation.last_token], generation.cache))
        logits = self._model.forward(spans)
        for generation, row in zip(generations, logits, strict=True):
            generation.take(generation.sampler.next(row))


def _device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda was asked for, and torch sees no NVIDIA GPU; use cpu or auto")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")


def _precision(asked: Precision | Literal["auto"], device: torch.device) -> Precision:
    if device.type == "cpu":
        return "int8" if asked == "auto" else asked
    if asked == "int8":
        raise ConfigurationError("precision int8 runs on the CPU only; use bf16, fp16 or auto on a GPU")
    if asked == "auto":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return asked


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _power_of_two(n: int) -> int:
    return 1 << (n.bit_length() - 1)
