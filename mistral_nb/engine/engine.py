"""The engine: token ids in, token ids out. One thread schedules, runs the model and hands out tokens."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import format_exception_only
from typing import Literal, NamedTuple

import torch

from mistral_nb.checkpoints.checkpoint import open_checkpoint
from mistral_nb.checkpoints.memory import Precision, check_fits, ran_out
from mistral_nb.engine.adapters import AdapterSource, Applied
from mistral_nb.engine.assembly import Plan, assemble
from mistral_nb.engine.device import (
    choose_device,
    choose_precision,
    device_kind,
    free_memory,
    give_back,
)
from mistral_nb.engine.grammar import Constraint
from mistral_nb.engine.info import EngineInfo, EngineUse, held_memory
from mistral_nb.engine.model import Cancelled
from mistral_nb.engine.packed_copy import CopyWriter
from mistral_nb.engine.prefixes import Cut
from mistral_nb.engine.random_weights import random_checkpoint
from mistral_nb.engine.runner import Drawn, Runner
from mistral_nb.engine.sampling import Sampling
from mistral_nb.engine.scheduler import Generation, Scheduler, Step, Token
from mistral_nb.engine.weights import let_go
from mistral_nb.errors import AdapterError, ConfigurationError, ContextOverflow, EngineError, InvalidRequest
from mistral_nb.hardware import available_cpus
from mistral_nb.types import FIELDS

__all__ = ["Engine", "EngineInfo", "EngineUse"]

log = logging.getLogger(__name__)

STEPS = 200
"""Of how many of its latest decoding steps an engine tells the speed."""

LOADING_S = 0.005
"""For how long a loop that has nothing else to do waits for an adapter before it looks whether there is."""

LARGEST = torch.finfo(torch.float32).max
"""A scale."""

_SEEDS = next(int(field.maximum or 0) for field in FIELDS if field.name == "seed")


class _Begun(NamedTuple):
    """A part of a step whose tokens nobody has read. `steady`: it decodes, and so did all since the one before."""

    generations: Sequence[Generation]
    drawn: Drawn
    steady: bool


class Engine:
    """Serves many generations at once from one model.

    A text does not depend on what runs beside it (int8 and int4 on the CPU, a GPU up to 8 at once): prompts are
    prefilled one sequence at a time in chunks of fixed bounds, of which whole ones are taken over where another prompt
    began with them, and every op of a decoding step works row by row.
    """

    def __init__(self, runner: Runner, info: EngineInfo) -> None:
        self.info = info
        self._runner = runner
        self._adapters = runner.adapters
        self._scheduler = Scheduler()
        self._unread: deque[_Begun] = deque()
        self._copying: CopyWriter | None = None
        self._steps: deque[tuple[float, int]] = deque(maxlen=STEPS)
        self._steady = False
        self._read_at = 0.0
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
        packed_copy: Path | None = None,
        random: bool = False,
        lora_rank: int | None = None,
    ) -> Engine:
        """Load a checkpoint folder and start the engine's thread.

        `auto` takes an NVIDIA GPU where there is one, and for the precision what `choose_precision` says. `context`, in
        tokens, cuts the model's own, and with it the memory that must be free. `threads` is for reading files and for
        prompts on the CPU, by default as many as there are CPUs; decoding takes half of them, or all where that is
        quicker. `progress` gets bytes, in this thread, and ends the loading by raising. `packed_copy` is a folder for
        what a loading converted: the next one reads it from there; it is written in the background.
        `lora_rank` is the largest of adapters, by default 64 on the CPU and 16 on a GPU, where every slot takes it all.
        With `random` only the folder's config is read, and weights in its shape are made, for measurements.

        Raises `ModelError` for a checkpoint that is broken, for one that does not fit into what is free, before any
        memory is taken, and where memory runs out nevertheless; `ConfigurationError` for a device that is not there and
        a context below 1.
        """
        if context is not None and context < 1:
            raise ConfigurationError(f"context = {context}: must be at least 1 token; None is all that the model has")
        target = choose_device(device)
        threads = threads or available_cpus()
        checkpoint = random_checkpoint(folder) if random else open_checkpoint(folder)
        chosen = choose_precision(precision, target, checkpoint, context)
        if chosen.why:
            log.info("auto is %s", chosen.why)
        need = replace(checkpoint.args, context=chosen.context), chosen.precision, chosen.context, device_kind(target)
        check_fits(*need, free_memory(target), free_memory(torch.device("cpu")))
        try:
            made = assemble(checkpoint, Plan(chosen, target, threads, max_batch, lora_rank, packed_copy), progress)
        except BaseException as error:
            let_go(error, target)
            if isinstance(error, torch.OutOfMemoryError):
                raise ran_out(*need, free_memory(target), free_memory(torch.device("cpu"))) from None
            raise
        engine = cls(made.runner, made.info)
        if made.write_copy:
            engine._copying = made.write_copy(lambda: engine.active > 0)
        return engine

    @property
    def active(self) -> int:
        """Generations that wait or run."""
        with self._wake:
            return sum(generation.finish_reason is None for generation in self._scheduler.all())

    @property
    def use(self) -> EngineUse | None:
        """What it takes; None once closed."""
        with self._wake:
            if self._closing or self._failure:
                return None
            pool = self._runner.pool
            steps = list(self._steps)
            seconds, tokens = sum(step[0] for step in steps), sum(step[1] for step in steps)
            memory = held_memory(pool.table.device)
            return EngineUse(memory, pool.used, pool.tokens, tokens / seconds if seconds else None)

    @property
    def failure(self) -> str:
        """Why the engine's loop ended on its own; empty while it serves."""
        return self._failure

    @property
    def _cut(self) -> Cut:
        return Cut(self._runner.chunk, self._runner.rest)

    @property
    def _ended(self) -> str:
        return f"the engine has ended ({self._failure or 'closed'}); start it again"

    def check_adapter(self, adapter: AdapterSource) -> None:
        """`AdapterError` for one that cannot be applied, as far as can be seen without its numbers.

        Reads its files, unless it was checked before: `submit` reads none of one that was.
        """
        self._adapters.check(adapter)

    def submit(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        max_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        on_token: Callable[[Token], None] | None = None,
        constraint: Constraint | None = None,
        adapter: AdapterSource | None = None,
        lora_scale: float = 1.0,
    ) -> Generation:
        """Queue a generation; its tokens go to `on_token`, on the engine's thread, or to whoever iterates it.

        `max_tokens` is cut to what the context leaves; `constraint` is this generation's own. `adapter` is applied
        `lora_scale` times as strongly as it was trained; 0 is as without it. Raises `ContextOverflow` when the context
        leaves nothing, `InvalidRequest` for an empty prompt, an id outside the vocabulary, `max_tokens` below 1 or a
        negative scale, `AdapterError` for an adapter that cannot be applied to this model, `EngineError` once closed.
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
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbelow(_SEEDS) + 1)
        if adapter is not None:
            self._adapters.check(adapter)
            if not 0 <= lora_scale < math.inf:
                raise InvalidRequest("lora_scale", lora_scale, "must be a finite number, 0 or more")
            adapter = adapter if lora_scale else None
        generation = Generation(
            ids, sampling, min(max_tokens, room), stop_ids, on_token, self._notify, constraint, adapter, lora_scale
        )
        with self._wake:
            if self._closing or self._failure:
                raise EngineError(self._ended)
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
        failure = ""
        try:
            while self._step():
                pass
        except BaseException as error:
            failure = f"its loop ended on an error of its own ({_first_line(format_exception_only(error)[0])})"
            raise
        finally:
            with self._wake:
                self._failure = failure
                left = self._scheduler.all()
            self._unread.clear()
            for generation in left:
                generation.finish("error" if failure else "cancelled", error=self._ended if failure else "")
            self._adapters.close()
            device = self._runner.pool.table.device
            del self._runner
            if self._copying is not None:
                self._copying.stop()
            give_back(device)

    def _step(self) -> bool:
        """Schedule, run, hand out; False once closed."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing or self._unread or len(self._scheduler))
            if self._closing:
                return False
            waiting = self._scheduler.waiting
        self._apply(waiting)
        with self._wake:
            step = self._scheduler.schedule(self._runner.pool, self._cut)
        begun = self._run(step)
        self._hand_out(keep=1 if begun and self._runner.ahead else 0)
        if step.prefill is None and not step.decode:
            self._adapters.wait(LOADING_S)
        return True

    def _apply(self, waiting: Sequence[Generation]) -> None:
        """Have the adapters of those who wait read, of the oldest first and of as many as there are slots. A slot is
        theirs from now to their end, also while they are paused: who runs never waits for one.
        """
        lack = (generation for generation in waiting if not (generation.ready or generation.cancelled.is_set()))
        lacking = list(itertools.islice(lack, self._adapters.slots))
        adapts = self._adapts(lacking)
        for generation in lacking:
            if generation.finish_reason is not None:
                continue
            assert generation.adapter is not None
            try:
                there = self._adapters.take(generation, generation.adapter)
            except AdapterError as error:
                generation.refuse(error)
            else:
                if there is not None and adapts:
                    generation.applied = Applied(there.slot, min(there.scale * generation.lora_scale, LARGEST))

    def _adapts(self, lacking: Sequence[Generation]) -> bool:
        """Whether those who lack adapters may have them. Until then each step makes one more kind of step ready: those
        who run stand still for no more than one at a time.
        """
        if lacking and not self._runner.adapts():
            self._hand_out(keep=0)
            self._steady = False
            try:
                self._runner.prepare()
            except RuntimeError as error:
                _give_up(lacking, error)
        return self._runner.adapts()

    def _run(self, step: Step) -> bool:
        """Begin what `step` asks for; whether there was anything that a token comes of.

        Decoding is first: a sequence whose prompt ends in this step is not in its batch yet.
        """
        for generation in step.cancelled:
            generation.finish("cancelled")
        for generation in step.over:
            self._runner.end(generation)
        self._swap(step)
        begun = False
        if step.decode:
            if not self._runner.ready(step.decode):
                self._hand_out(keep=0)
            going = [generation for generation in step.decode if generation.finish_reason is None]
            if going:
                begun = self._begin(going, partial(self._runner.decode, going), self._steady)
            if not self._runner.ahead:
                self._hand_out(keep=0)
        self._steady = step.prefill is None
        going_on = step.prefill if step.prefill and step.prefill.finish_reason is None else None
        if going_on is not None:
            begun |= self._begin([going_on], partial(self._prefill, going_on), steady=False)
        return begun

    def _prefill(self, generation: Generation) -> Drawn | None:
        try:
            drawn = self._runner.prefill(generation)
        except Cancelled:
            return None
        assert generation.place is not None
        self._runner.pool.wrote(generation.place, generation.prefix(self._cut))
        return drawn

    def _swap(self, step: Step) -> None:
        """Those that are paused before those that are resumed, and before anything that has their pages now."""
        for move, generations in ((self._runner.pause, step.paused), (self._runner.resume, step.resumed)):
            for generation in generations:
                try:
                    move(generation)
                except RuntimeError as error:
                    _give_up([generation], error)

    def _begin(self, generations: Sequence[Generation], part: Callable[[], Drawn | None], steady: bool) -> bool:
        """Begin a part of a step, and whether tokens come of it; when the model fails, as out of memory, end the
        generations of that part.
        """
        try:
            drawn = part()
        except RuntimeError as error:
            _give_up(generations, error)
            return False
        if drawn is not None:
            self._unread.append(_Begun(generations, drawn, steady))
        return drawn is not None

    def _hand_out(self, keep: int) -> None:
        """Read the parts that were begun, but the last `keep`, and hand out their tokens."""
        while len(self._unread) > keep:
            generations, drawn, steady = self._unread.popleft()
            try:
                tokens = drawn()
            except RuntimeError as error:
                _give_up(generations, error)
                continue
            now = time.perf_counter()
            if steady:
                self._steps.append((now - self._read_at, len(tokens)))
            self._read_at = now
            for generation, token in zip(generations, tokens, strict=True):
                if isinstance(token, int):
                    generation.take(token)
                elif isinstance(token, AdapterError):
                    generation.refuse(token)
                else:
                    generation.finish("error", error=str(token))


def _give_up(generations: Sequence[Generation], error: RuntimeError) -> None:
    log.error("a step of the model failed", exc_info=error)
    advice = "see the engine's log"
    if isinstance(error, torch.OutOfMemoryError):
        advice = "free some of the GPU's memory, or start the engine with a smaller --context or --precision int4"
    for generation in generations:
        generation.finish("error", error=f"the model failed ({_first_line(str(error))}); {advice}")


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
