"""The engine: token ids in, token ids out. One thread schedules, runs the model and hands out tokens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import mistral_nb_kernels
from mistral_nb.checkpoints.checkpoint import open_checkpoint
from mistral_nb.checkpoints.memory import Device, Precision, check_fits
from mistral_nb.engine.device import available_cpus, choose_device, choose_precision, free_memory
from mistral_nb.engine.grammar import Constraint
from mistral_nb.engine.kv_cache import KVCache
from mistral_nb.engine.model import Cancelled, Span, Transformer
from mistral_nb.engine.sampling import Sampler, Sampling
from mistral_nb.engine.scheduler import Generation, Scheduler, Token
from mistral_nb.engine.weights import load_weights
from mistral_nb.errors import ConfigurationError, ContextOverflow, EngineError, InvalidRequest

__all__ = ["Engine", "EngineInfo"]

log = logging.getLogger(__name__)

PREFILL_CHUNK = 128
"""Tokens of a prompt between two tokens of everybody else. A constant: its bounds are part of a text's rounding."""

MIN_READERS, MAX_READERS = 4, 8
"""Threads that read files. Four keep a disk busy on 2 cores: 2.2 GB/s, where two had 1.3 of its 2.9 GB/s."""

KV_SHARE = 0.5
"""Share of the memory that is free after loading which the KV caches may take."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded. `context` in tokens; `threads` are those that read prompts on the CPU."""

    model: str
    device: str
    precision: Precision
    context: int
    vocab_size: int
    threads: int
    kernels: str


class Engine:
    """Serves many generations at once from one model.

    A text does not depend on what runs beside it (int8 on the CPU): prompts are prefilled one sequence at a time in
    chunks of fixed bounds, and every op of the decoding batch works row by row.

    On the CPU decoding leaves half of the threads alone. It waits for all its threads 120 times a token, so that each
    other process that wants a core would hold it up: on 2 cores with one of them busy, a token took 14 ms with one
    thread and 48 ms with two. A prompt's steps are longer and take all of them.
    """

    def __init__(self, model: Transformer, info: EngineInfo, *, max_batch: int = 8) -> None:
        self.info = info
        self._model = model
        self._device = model.device
        self._scheduler = Scheduler(max_batch, _kv_budget(model, info.context, max_batch))
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
        context: int | None = None,
        max_batch: int = 8,
        threads: int | None = None,
        progress: Callable[[int, int], None] = lambda loaded, to_load: None,
    ) -> Engine:
        """Load a checkpoint folder and start the engine's thread.

        `auto` takes an NVIDIA GPU where there is one, in bf16 (fp16 before compute capability 8.0), else the CPU in
        int8 (bf16 for a model that int8 cannot run). `context`, in tokens, cuts the model's own, and with it the memory
        that must be free. `threads` is for reading files and for prompts on the CPU, by default as many as there are
        CPUs; decoding takes half of them.
        `progress` gets bytes, in this thread, and ends the loading by raising.

        Raises `ModelError` for a checkpoint that is broken and, before any memory is taken, for one that does not fit
        into what is free; `ConfigurationError` for a device that is not there and a context below 1.
        """
        if context is not None and context < 1:
            raise ConfigurationError(f"context = {context}: must be at least 1 token; None is all that the model has")
        target = choose_device(device)
        threads = threads or available_cpus()
        checkpoint = open_checkpoint(folder)
        args = checkpoint.args
        chosen = choose_precision(precision, target, args)
        if context is not None:
            args = replace(args, context=min(context, args.context))
        kind: Device = "cuda" if target.type == "cuda" else "cpu"
        check_fits(args, chosen, args.context, kind, free_memory(target), free_memory(torch.device("cpu")))
        readers = max(MIN_READERS, min(threads, MAX_READERS))
        weights = load_weights(checkpoint, chosen, target, progress, threads=readers)
        torch.set_num_threads(threads)
        name = torch.cuda.get_device_name(target) if kind == "cuda" else f"CPU, {threads} threads"
        info = EngineInfo(
            model=folder.name,
            device=name,
            precision=chosen,
            context=args.context,
            vocab_size=args.vocab_size,
            threads=threads,
            kernels=mistral_nb_kernels.kernels_in_use(),
        )
        return cls(Transformer(args, weights), info, max_batch=max_batch)

    @property
    def active(self) -> int:
        """Generations that wait or run."""
        with self._wake:
            return sum(generation.finish_reason is None for generation in self._scheduler.all())

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
        constraint: Constraint | None = None,
    ) -> Generation:
        """Queue a generation; its tokens go to `on_token`, on the engine's thread, or to whoever iterates it.

        `max_tokens` is cut to what the context leaves; `constraint` is this generation's own. Raises `ContextOverflow`
        when the context leaves nothing, `InvalidRequest` for an empty prompt, an id outside the vocabulary or
        `max_tokens` below 1, `EngineError` once closed.
        """
        if max_tokens < 1:
            raise InvalidRequest("max_tokens", max_tokens, "must be at least 1")
        ids = list(prompt_ids)
        if not ids:
            raise InvalidRequest("prompt", "0 tokens", "must hold at least one token")
        outside = next((i for i in ids if not 0 <= i < self.info.vocab_size), None)
        if outside is not None:
            raise InvalidRequest("prompt", outside, f"token ids go from 0 to {self.info.vocab_size - 1}")
        room = self.info.context - len(ids)
        if room < 1:
            raise ContextOverflow(len(ids), self.info.context)
        sampler = Sampler(sampling, ids, self.info.vocab_size, self._device, constraint)
        generation = Generation(ids, sampler, min(max_tokens, room), stop_ids, on_token, self._notify)
        with self._wake:
            if self._closing or self._failure:
                raise EngineError(f"the engine has ended ({self._failure or 'closed'}); start it again")
            self._scheduler.submit(generation)
            self._wake.notify()
        return generation

    def close(self) -> None:
        """End every generation as cancelled and let the model go. May be called more than once, and from `on_token`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _loop(self) -> None:
        failure = "its loop ended on an error of its own"
        try:
            while self._step():
                pass
            failure = ""
        finally:
            with self._wake:
                self._failure = failure
                left = self._scheduler.all()
            del self._model
            for generation in left:
                generation.finish("error" if failure else "cancelled", error=failure)

    def _step(self) -> bool:
        """Schedule, run, hand out; False once closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or len(self._scheduler))
            if self._closing:
                return False
            step = self._scheduler.schedule()
        for generation in step.cancelled:
            generation.finish("cancelled")
        if step.prefill is not None:
            self._run(self._prefill, [step.prefill])
        if step.decode:
            self._run(self._decode, step.decode)
        return True

    def _run(self, part: Callable[[Sequence[Generation]], None], generations: Sequence[Generation]) -> None:
        """Run a part of a step; when the model fails, as out of memory, end the generations of that part."""
        try:
            part(generations)
        except RuntimeError as error:
            log.exception("a step of the model failed")
            first = str(error).partition("\n")[0]
            for generation in generations:
                generation.finish("error", error=f"the model failed ({first}); if memory is short, lower max_tokens")

    def _prefill(self, generations: Sequence[Generation]) -> None:
        """The next chunk of a prompt; the first token after the last one."""
        (generation,) = generations
        torch.set_num_threads(self.info.threads)
        if generation.cache is None:
            generation.cache = self._model.new_cache(generation.kv_tokens)
        start = generation.cache.length
        span = Span(generation.prompt_ids[start : start + PREFILL_CHUNK], generation.cache)
        try:
            logits = self._model.forward([span], cancelled=generation.cancelled.is_set)
        except Cancelled:
            return
        if generation.cache.length == generation.prompt_tokens:
            _choose(generation, logits[0])

    def _decode(self, generations: Sequence[Generation]) -> None:
        torch.set_num_threads(max(1, self.info.threads // 2))
        spans = []
        for generation in generations:
            assert generation.cache is not None
            assert generation.last_token is not None
            spans.append(Span([generation.last_token], generation.cache))
        logits = self._model.forward(spans)
        for generation, row in zip(generations, logits, strict=True):
            _choose(generation, row)


def _choose(generation: Generation, logits: torch.Tensor) -> None:
    try:
        token = generation.sampler.next(logits)
    except FloatingPointError as error:
        generation.finish("error", error=f"the model's numbers broke down ({error}); try another precision")
    except EngineError as error:
        generation.finish("error", error=str(error))
    else:
        generation.take(token)


def _kv_budget(model: Transformer, context: int, max_batch: int) -> int:
    """Tokens that all caches may hold: by the free memory, at least one full context, at most one for each place."""
    free = free_memory(model.device)
    if free is None:
        return context
    fits = int(free * KV_SHARE) // KVCache.bytes_per_token(model.args, model.dtype)
    return min(max(fits, context), max_batch * context)
