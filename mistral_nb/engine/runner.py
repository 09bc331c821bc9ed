"""What runs the model's steps for generations that have a place, and draws their next tokens: on the CPU."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import AdapterRows, Transformer
from mistral_nb.engine.prefixes import Cut
from mistral_nb.engine.sampling import Sampler
from mistral_nb.engine.scheduler import Generation
from mistral_nb.engine.threads import DecodeThreads, PromptThreads
from mistral_nb.errors import AdapterError, EngineError
from mistral_nb_kernels import Dense, Rows

__all__ = ["DirectRunner", "Drawn", "Runner", "adapter_rows", "broken_down", "on_device"]

Drawn = Callable[[], list[int | EngineError | AdapterError]]
"""Waits for a step and gives each of its generations' token, or why there is none."""


class Runner(Protocol):
    """Steps of a model. `chunk`: the most tokens of a prompt between two tokens of everybody else; `rest`: those where
    no more than a chunk are left. Both are part of a text's rounding.

    `ahead`: a step may be begun before the one before has been read.
    """

    chunk: int
    rest: int
    ahead: bool
    pool: KVPool
    adapters: AdapterSlots

    def prefill(self, generation: Generation) -> Drawn | None:
        """The next chunk of its prompt; its first token after the last one. `Cancelled` leaves it as it was."""

    def decode(self, generations: Sequence[Generation]) -> Drawn:
        """One more token of each."""

    def ready(self, generations: Sequence[Generation]) -> bool:
        """Whether `decode` of these begins at once, and may do so before the step before has been read."""

    def adapts(self) -> bool:
        """Whether steps with adapters begin at once."""

    def prepare(self) -> None:
        """Make one more kind of them ready, once there are slots: a compilation or a capture, for which others wait."""

    def pause(self, generation: Generation) -> None:
        """Its place is given back, and its pages are others' from now on: what it had there goes to the host."""

    def resume(self, generation: Generation) -> None:
        """It has a place again, which is as it left the one before."""

    def end(self, generation: Generation) -> None:
        """Its place, if it has one, is given back."""


class DirectRunner:
    """Steps that are over when they return.

    Those of packed weights take half of the threads or all, whichever are quicker now: they are the same to the bit
    with any number of threads. With other weights a prompt's take all, and those of decoding half of them.
    """

    chunk = rest = 128
    ahead = False

    def __init__(self, model: Transformer, pool: KVPool, threads: int, adapters: AdapterSlots | None = None) -> None:
        self.pool = pool
        self.adapters = adapters or AdapterSlots(model.args, model.dtype, model.device)
        self._model = model
        packed = not isinstance(model.weights.layers[0].wqkv, Dense)
        half = max(1, threads // 2)
        self._prompts = (half, threads) if packed else (threads, threads)
        decodes = (half, threads) if packed else (half, half)
        self._threads = defaultdict[int, DecodeThreads](partial(DecodeThreads, *decodes))
        self._samplers: dict[Generation, Sampler] = {}

    def prefill(self, generation: Generation) -> Drawn | None:
        chosen = PromptThreads(*self._prompts)

        def given_up() -> bool:
            torch.set_num_threads(chosen.before_layer(time.perf_counter()))
            return generation.cancelled.is_set()

        tokens = generation.next_piece(Cut(self.chunk, self.rest))
        end = generation.cached + len(tokens)
        assert generation.place is not None
        x = self._model.forward(
            torch.tensor(tokens),
            Rows.of((len(tokens),), (end,)),
            self.pool.of([generation.place]),
            adapters=adapter_rows(self.adapters, [generation], self._model.device, len(tokens)),
            given_up=given_up,
        )
        generation.cached = end
        if end < generation.prompt_tokens:
            return None
        self._samplers[generation] = Sampler(
            generation.sampling,
            generation.prompt_ids,
            self._model.args.vocab_size,
            self._model.device,
            generation.constraint,
        )
        return self._drawn([generation], x[-1:])

    def decode(self, generations: Sequence[Generation]) -> Drawn:
        chosen, began = self._threads[len(generations)], time.perf_counter()
        limit = began + chosen.limit
        torch.set_num_threads(chosen.count)

        def given_up() -> bool:
            if time.perf_counter() > limit:
                torch.set_num_threads(chosen.few)
            return False

        tokens, places = [], []
        for generation in generations:
            assert generation.place is not None
            assert generation.last_token is not None
            generation.cached += 1
            tokens.append(generation.last_token)
            places.append(generation.place)
        rows = Rows.newest(torch.tensor([generation.cached for generation in generations], dtype=torch.int32))
        adapters = adapter_rows(self.adapters, generations, self._model.device)
        x = self._model.forward(
            torch.tensor(tokens),
            rows,
            self.pool.of(places),
            adapters=adapters,
            decoding=True,
            given_up=given_up,
        )
        drawn = self._drawn(generations, x)
        chosen.took(time.perf_counter() - began)
        return drawn

    def ready(self, generations: Sequence[Generation]) -> bool:
        return False

    def adapts(self) -> bool:
        return True

    def prepare(self) -> None:
        """There is nothing to do."""

    def pause(self, generation: Generation) -> None:
        assert generation.swapped is not None
        self.pool.save(generation.swapped)

    def resume(self, generation: Generation) -> None:
        assert generation.place is not None
        assert generation.swapped is not None
        self.pool.restore(generation.place, generation.swapped)
        generation.swapped = None

    def end(self, generation: Generation) -> None:
        self.adapters.give_back(generation)
        self._samplers.pop(generation, None)

    def _drawn(self, generations: Sequence[Generation], x: torch.Tensor) -> Drawn:
        tokens: list[int | EngineError | AdapterError] = []
        for generation, logits in zip(generations, self._model.logits(x), strict=True):
            generation.drawn += 1
            try:
                tokens.append(self._samplers[generation].next(logits))
            except FloatingPointError as error:
                tokens.append(broken_down(generation, str(error)))
            except EngineError as error:
                tokens.append(error)
        return lambda: tokens


def adapter_rows(
    adapters: AdapterSlots, generations: Sequence[Generation], device: torch.device, times: int = 1
) -> AdapterRows | None:
    """Those of a batch with so many rows of each generation; None where none has one."""
    applied = [generation.applied for generation in generations]
    if not any(applied):
        return None
    slots = torch.tensor([own.slot if own else -1 for own in applied for _ in range(times)], dtype=torch.int32)
    scale = torch.tensor([own.scale if own else 0.0 for own in applied for _ in range(times)])
    return AdapterRows(adapters.layers, on_device(device, slots), on_device(device, scale))


def on_device(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor on `device`, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def broken_down(generation: Generation, what: str) -> EngineError | AdapterError:
    if generation.adapter is not None:
        told = f"the model's numbers break down with it at {generation.lora_scale:g} ({what}); lower lora_scale"
        return AdapterError(told)
    return EngineError(f"the model's numbers broke down ({what}); try another precision")
