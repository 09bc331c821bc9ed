"""Decoding in CUDA graphs, and the state that they read and write on the device.

A graph runs one step of places 0 .. size - 1: embedding, layers, logits, draw. The token that it draws is the next
step's input where it lies, so a step may begin before the host has seen the one before; all the host waits for is the
copy of tokens that were drawn a step ago. Graphs are captured when they are first needed, one for each power of two;
those with adapters while the first adapter is read, one between two steps, before anybody has it (but those that are
constrained too).
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mistral_nb.engine.adapters import AdapterSlots, Applied
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import AdapterRows, Transformer
from mistral_nb.engine.prefixes import Cut
from mistral_nb.engine.runner import Drawn, adapter_rows, broken_down, on_device
from mistral_nb.engine.scheduler import Generation
from mistral_nb.errors import AdapterError, EngineError
from mistral_nb_kernels import Parameters, Penalties, Rows, compilation

__all__ = ["GraphRunner"]

log = logging.getLogger(__name__)

PARAMETERS = [field.name for field in fields(Parameters)]
PENALTIES = [field.name for field in fields(Penalties)]


@dataclass(frozen=True, slots=True)
class State:
    """What each place has on the device.

    drawn [places] int32: its newest token, which is not in the pages yet; -1 where the scores broke down. lengths
    [places] int32: tokens that are in the pages, 0 for a place that nobody decodes in.
    slots [places] int32, -1 for a place without an adapter, and scale [places] fp32: of the adapters.
    """

    drawn: Tensor
    lengths: Tensor
    slots: Tensor
    scale: Tensor
    parameters: Parameters
    penalties: Penalties

    @classmethod
    def of(cls, places: int, vocab: int, device: torch.device) -> State:
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((places, *shape), dtype=dtype, device=device)

        return cls(
            drawn=zeros(torch.int32),
            lengths=zeros(torch.int32),
            slots=torch.full((places,), -1, dtype=torch.int32, device=device),
            scale=zeros(torch.float32),
            parameters=Parameters(
                temperature=zeros(torch.float32),
                top_k=zeros(torch.int32),
                top_p=zeros(torch.float32),
                repetition_penalty=zeros(torch.float32),
                frequency_penalty=zeros(torch.float32),
                presence_penalty=zeros(torch.float32),
                seed=zeros(torch.int64),
                position=zeros(torch.int64),
            ),
            penalties=Penalties(
                counts=zeros(torch.int32, vocab),
                prompt=zeros(torch.bool, vocab),
                row=torch.full((places,), -1, dtype=torch.int32, device=device),
            ),
        )

    def cut(self, begin: int, end: int) -> State:
        """Views of the places from `begin` to `end`; penalties are looked up by row, and stay whole."""
        mine = slice(begin, end)
        parameters = Parameters(**{name: getattr(self.parameters, name)[mine] for name in PARAMETERS})
        penalties = Penalties(self.penalties.counts, self.penalties.prompt, self.penalties.row[mine])
        return State(self.drawn[mine], self.lengths[mine], self.slots[mine], self.scale[mine], parameters, penalties)

    def begin(self, generation: Generation) -> None:
        """The place of a generation whose prompt is in the pages, and which draws its first token.

        By `fill_`, which waits for nothing: to assign a number to an element of a GPU's tensor is a copy that does.
        """
        place, sampling = _place(generation), generation.sampling
        assert sampling.seed is not None
        self.lengths[place].fill_(generation.cached)
        self.adapt(place, generation.applied)
        for name in PARAMETERS:
            getattr(self.parameters, name)[place].fill_(0 if name == "position" else getattr(sampling, name))
        penalized = sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty
        self.penalties.row[place].fill_(place if penalized else -1)
        if penalized:
            self.penalties.counts[place].zero_()
            prompt = on_device(self.drawn.device, torch.tensor(generation.prompt_ids))
            self.penalties.prompt[place].zero_().index_fill_(0, prompt, True)

    def adapt(self, place: int, applied: Applied | None) -> None:
        slot, scale = applied or (-1, 0.0)
        self.slots[place].fill_(slot)
        self.scale[place].fill_(scale)

    def save(self, place: int) -> list[Tensor]:
        """What `load` takes; by then it may be another place."""
        return [row.clone() for row in self._rows(place)]

    def load(self, place: int, saved: list[Tensor]) -> None:
        for row, value in zip(self._rows(place), saved, strict=True):
            row.copy_(value)
        self.penalties.row[place].copy_(torch.where(self.penalties.row[place] < 0, -1, place))

    def empty(self, place: int) -> None:
        self.lengths[place].fill_(0)
        self.adapt(place, None)
        self.penalties.row[place].fill_(-1)

    def _rows(self, place: int) -> list[Tensor]:
        held = [self.drawn, self.lengths, *(getattr(self.parameters, name) for name in PARAMETERS)]
        return [tensor[place] for tensor in (*held, *(getattr(self.penalties, name) for name in PENALTIES))]


class _Kind(NamedTuple):
    """Of a step the places, and whether some of them have constraints or adapters."""

    size: int
    constrained: bool
    adapted: bool


@dataclass(frozen=True, slots=True)
class _Captured:
    """A step in a CUDA graph, which gives its logits. What the graph reads by address alone is kept alive here."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor
    reads: tuple[object, ...]

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.logits


class GraphRunner:
    """Steps that the device works on while the host reads those before."""

    chunk, rest = 512, 128
    ahead = True

    def __init__(self, model: Transformer, pool: KVPool, adapters: AdapterSlots | None = None) -> None:
        self.pool = pool
        self.adapters = adapters or AdapterSlots(model.args, model.dtype, model.device)
        self._model = model
        self._places = len(pool.table)
        self._state = State.of(self._places, model.args.vocab_size, model.device)
        self._steps: dict[_Kind, Callable[[], Tensor]] = {}
        self._saved: dict[Generation, list[Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle() if model.ops.capturable else None
        sizes = sorted({min(1 << power, self._places) for power in range(self._places.bit_length() + 1)})
        kinds = [_Kind(size, constrained=False, adapted=True) for size in sizes]
        self._unprepared: deque[Callable[[], object]] = deque(
            partial(self._compile_prompts, rows) for rows in (self.rest, self.rest // 2)
        )
        self._unprepared += [partial(self._step, kind) for kind in kinds]

    def adapts(self) -> bool:
        return not self._unprepared

    @compilation()
    @torch.inference_mode()
    def prepare(self) -> None:
        if self._unprepared and self.adapters.begun:
            self._unprepared[0]()
            self._unprepared.popleft()

    def pause(self, generation: Generation) -> None:
        assert generation.swapped is not None
        place = generation.swapped.place
        try:
            if generation.drawn:
                self._saved[generation] = self._state.save(place)
        finally:
            self._state.empty(place)
        self.pool.save(generation.swapped)

    def resume(self, generation: Generation) -> None:
        assert generation.swapped is not None
        self.pool.restore(_place(generation), generation.swapped)
        generation.swapped = None
        if generation.drawn:
            self._state.load(_place(generation), self._saved.pop(generation))
            self._state.adapt(_place(generation), generation.applied)

    def end(self, generation: Generation) -> None:
        self.adapters.give_back(generation)
        self._saved.pop(generation, None)
        if generation.place is not None:
            self._state.empty(generation.place)

    @compilation()
    @torch.inference_mode()
    def prefill(self, generation: Generation) -> Drawn | None:
        device, place = self._model.device, _place(generation)
        tokens = generation.next_piece(Cut(self.chunk, self.rest))
        end = generation.cached + len(tokens)
        x = self._model.forward(
            on_device(device, torch.tensor(tokens)),
            Rows.of((len(tokens),), (end,), device),
            self.pool.of(slice(place, place + 1)),
            adapters=adapter_rows(self.adapters, [generation], device, len(tokens)),
            given_up=generation.cancelled.is_set,
        )
        generation.cached = end
        if end < generation.prompt_tokens:
            return None
        generation.drawn = 1
        self._state.begin(generation)
        state = self._state.cut(place, place + 1)
        failed = self._draw_constrained(self._model.logits(x[-1:]), state, {0: generation})
        return self._read([generation], failed)

    @compilation()
    @torch.inference_mode()
    def decode(self, generations: Sequence[Generation]) -> Drawn:
        kind = self._kind(generations)
        logits = self._step(kind)()
        failed = {}
        if kind.constrained:
            rows = {_place(generation): generation for generation in generations}
            failed = self._draw_constrained(logits, self._state.cut(0, kind.size), rows)
        for generation in generations:
            generation.cached += 1
            generation.drawn += 1
        return self._read(generations, failed)

    def ready(self, generations: Sequence[Generation]) -> bool:
        kind = self._kind(generations)
        return kind in self._steps and not kind.constrained

    def _kind(self, generations: Sequence[Generation]) -> _Kind:
        return _Kind(
            size=min(1 << max(map(_place, generations)).bit_length(), self._places),
            constrained=any(generation.constraint for generation in generations),
            adapted=any(generation.applied for generation in generations),
        )

    def _step(self, kind: _Kind) -> Callable[[], Tensor]:
        if kind not in self._steps:
            self._steps[kind] = self._captured(kind)
        return self._steps[kind]

    def _compile_prompts(self, rows: int) -> None:
        """What adapters add to the pieces of prompts: kernels of up to 64 rows, and of any number above."""
        slots = torch.full((rows,), -1, dtype=torch.int32, device=self._model.device)
        adapters = AdapterRows(self.adapters.layers, slots, torch.zeros(rows, device=self._model.device))
        self._model.compile(rows, adapters)

    def _captured(self, kind: _Kind) -> Callable[[], Tensor]:
        """The step of a kind, which gives the logits [size, vocab]; where nothing is constrained it draws from them.

        Kernels are compiled before, in a run in which all places are empty. Where the ops may not be captured, it runs
        op by op.
        """
        size, device, kv = kind.size, self._model.device, self.pool.of(slice(0, kind.size))
        layers = self.adapters.layers if kind.adapted else None
        starts = torch.arange(size + 1, dtype=torch.int32, device=device)

        def step(state: State) -> Tensor:
            state.lengths.add_((state.lengths > 0).int())
            rows = Rows.newest(state.lengths, starts)
            tokens = state.drawn.clamp_min(0).long()
            adapters = None if layers is None else AdapterRows(layers, state.slots, state.scale)
            logits = self._model.logits(self._model.forward(tokens, rows, kv, adapters=adapters, decoding=True))
            if not kind.constrained:
                self._draw(logits, state)
            return logits

        state = self._state.cut(0, size)
        if not self._model.ops.capturable:
            return lambda: step(state)
        began = time.perf_counter()
        step(State.of(size, self._model.args.vocab_size, device))
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        compiled, free = time.perf_counter(), torch.cuda.mem_get_info(device)[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            logits = step(state)
        captured, taken = time.perf_counter(), free - torch.cuda.mem_get_info(device)[0]
        told = "captured a step of %d in %.2f s and %.0f MB, after %.2f s in which it was compiled and run (%s)"
        log.info(told, size, captured - compiled, taken / 1e6, compiled - began, kind)
        return _Captured(graph, logits, (kv, starts, layers))

    def _draw(self, logits: Tensor, state: State) -> None:
        """Each place's next token from its row of `logits`."""
        state.drawn.copy_(self._model.ops.sample(logits, state.parameters, state.penalties))
        state.parameters.position.add_(1)

    def _draw_constrained(
        self, logits: Tensor, state: State, rows: Mapping[int, Generation]
    ) -> dict[Generation, EngineError]:
        """The same, where generations may have constraints: what they forbid has no part in it. Which of them cannot be
        followed any further, and why.
        """
        failed = {}
        for row, generation in rows.items():
            if generation.constraint is not None:
                try:
                    allowed = generation.constraint.allowed()
                except EngineError as error:
                    failed[generation] = error
                else:
                    logits[row].masked_fill_(~on_device(logits.device, allowed), -math.inf)
        self._draw(logits, state)
        return failed

    def _read(self, generations: Sequence[Generation], failed: Mapping[Generation, EngineError]) -> Drawn:
        """Begin the copy of the newest tokens; the result waits for it. Who gets no more after these rests until its
        place is given back: it has no page for another, and its row of the table names somebody else's there.
        """
        places = [_place(generation) for generation in generations]
        tokens, wait = _copied(self._state.drawn)
        for generation in generations:
            if not generation.decoding:
                self._state.lengths[_place(generation)].fill_(0)

        def drawn() -> list[int | EngineError | AdapterError]:
            wait()
            return [
                failed.get(generation) or _accepted(generation, int(tokens[place]))
                for generation, place in zip(generations, places, strict=True)
            ]

        return drawn


def _place(generation: Generation) -> int:
    assert generation.place is not None
    return generation.place


def _accepted(generation: Generation, token: int) -> int | EngineError | AdapterError:
    """A drawn token, which the generation's constraint is told of."""
    if token < 0:
        return broken_down(generation, "the largest logit is no finite number")
    try:
        if generation.constraint is not None:
            generation.constraint.take(token)
    except EngineError as error:
        return error
    return token


def _copied(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the CPU, and what waits until it is there."""
    if tensor.device.type != "cuda":
        return tensor.clone(), lambda: None
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return copy, event.synchronize
