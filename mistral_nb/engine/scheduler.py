"""Which sequences run next: admission, prefill in chunks, decoding in batches, cancellation."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

from mistral_nb.engine.adapters import AdapterSource, Applied
from mistral_nb.engine.grammar import Constraint
from mistral_nb.engine.kv_pool import KVPool, Swapped
from mistral_nb.engine.prefixes import Cut, Prefix, Prompt
from mistral_nb.engine.sampling import Sampling
from mistral_nb.errors import AdapterError

__all__ = ["Generation", "Scheduler", "Step", "Token"]

log = logging.getLogger(__name__)

MARGIN = 256
"""Tokens that each sequence can still grow by when another is admitted, unless it ends before."""

EndReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. The last one has a `finish_reason`, and no id where it ends without a further token."""

    id: int | None
    finish_reason: EndReason | None = None
    error: str = ""


class Generation:
    """One sequence from submission to its last token.

    Events go to `on_token` on the engine's thread; without one, iterate. `cancel` may be called from any thread.
    `refusal` is there at the end where its adapter is why it failed.
    The engine's own: its `place` in the batch; its adapter as it is `applied`, from before it has a place to its end;
    tokens `cached` in the pages, of which `reused` were there before; tokens `drawn`, which where steps run ahead are
    more than those that came; `swapped` instead of the place while others have its pages; its `number` in the order of
    submission.
    """

    def __init__(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        max_tokens: int,
        stop_ids: frozenset[int],
        on_token: Callable[[Token], None] | None,
        on_cancel: Callable[[], None],
        constraint: Constraint | None = None,
        adapter: AdapterSource | None = None,
        lora_scale: float = 1.0,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.constraint = constraint
        self.adapter = adapter
        self.lora_scale = lora_scale
        self.applied: Applied | None = None
        self.place: int | None = None
        self.swapped: Swapped | None = None
        self.number = 0
        self.cached = 0
        self.reused = 0
        self.drawn = 0
        self.completion_tokens = 0
        self.last_token: int | None = None
        self.finish_reason: EndReason | None = None
        self.refusal: AdapterError | None = None
        self.cancelled = threading.Event()
        self._stop_ids = stop_ids
        self._on_cancel = on_cancel
        self._events: SimpleQueue[Token] | None = None if on_token else SimpleQueue()
        self._on_token = on_token
        self._read_to_end = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def kv_tokens(self) -> int:
        """Tokens that the whole generation may have in the pages."""
        return self.prompt_tokens + self.max_tokens

    @property
    def variant(self) -> Hashable:
        """What keys and values depend on beside the tokens."""
        return (self.adapter.key, self.lora_scale) if self.adapter is not None and self.lora_scale else None

    @property
    def ready(self) -> bool:
        """Whether its adapter is in a slot, if it has one."""
        return self.adapter is None or self.applied is not None

    @property
    def prefilling(self) -> bool:
        return self.cached < self.prompt_tokens

    @property
    def decoding(self) -> bool:
        return 0 < self.drawn < self.max_tokens

    def prompt(self, cut: Cut) -> Prompt:
        return Prompt(self.variant, self.prompt_ids, cut)

    def prefix(self, cut: Cut) -> Prefix:
        """What of its prompt is in the pages, in whole pieces."""
        return Prefix(self.prompt(cut), cut.whole(min(self.cached, self.prompt_tokens), self.prompt_tokens))

    def next_piece(self, cut: Cut) -> list[int]:
        """Tokens of the prompt that come next."""
        return self.prompt_ids[self.cached : cut.end(self.cached, self.prompt_tokens)]

    def cancel(self) -> None:
        """End after the token that is being computed, if any. Does nothing once the generation has ended."""
        self.cancelled.set()
        self._on_cancel()

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come, each once. `RuntimeError` where `on_token` takes them."""
        if self._events is None:
            raise RuntimeError("the tokens go to on_token; submit without it to iterate")
        while not self._read_to_end:
            token = self._events.get()
            self._read_to_end = token.finish_reason is not None
            yield token

    def take(self, token: int) -> None:
        """Engine thread: the model chose `token`. One that was drawn ahead of the last one is dropped."""
        if self.finish_reason is not None:
            return
        if token in self._stop_ids:
            self.finish("stop")
            return
        self.last_token = token
        self.completion_tokens += 1
        if self.completion_tokens == self.max_tokens:
            self.finish("length", token)
        else:
            self._emit(Token(token))

    def refuse(self, error: AdapterError) -> None:
        """Engine thread: end, as its adapter cannot be applied."""
        self.refusal = error
        self.finish("error", error=str(error))

    def finish(self, reason: EndReason, token: int | None = None, error: str = "") -> None:
        """Engine thread: the last event."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self._emit(Token(token, reason, error))

    def _emit(self, token: Token) -> None:
        if self._events is not None:
            self._events.put(token)
            return
        assert self._on_token is not None
        try:
            self._on_token(token)
        except Exception:  # somebody else's code: whatever it raises ends this generation and no other
            log.exception("the on_token of a generation failed, which ends it")
            self.finish_reason = self.finish_reason or "error"


@dataclass(frozen=True, slots=True)
class Step:
    """What comes next: `cancelled` are told so; `over` have left, and the places that they had; `paused` leave theirs,
    and their pages may be others' already; `resumed` have new ones; one sequence's prompt goes on; each of `decode`
    gets a token.
    """

    cancelled: tuple[Generation, ...]
    over: tuple[Generation, ...]
    paused: tuple[Generation, ...]
    resumed: tuple[Generation, ...]
    prefill: Generation | None
    decode: tuple[Generation, ...]


class Scheduler:
    """First come, first served, while there is a place, with pages for the prompt and `MARGIN` tokens more. One whose
    adapter is not there yet lets those behind it by.

    Prompts take turns, piece by piece. Where the pages of those that grow run out, the youngest is paused; those that
    are paused come before those that wait, the oldest first. The oldest of all always goes on.
    """

    def __init__(self) -> None:
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._paused: list[Generation] = []
        self._prompts: deque[Generation] = deque()
        self._submitted = 0

    def submit(self, generation: Generation) -> None:
        self._submitted += 1
        generation.number = self._submitted
        self._waiting.append(generation)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._paused)

    def all(self) -> list[Generation]:
        return [*self._running, *self._paused, *self._waiting]

    @property
    def waiting(self) -> tuple[Generation, ...]:
        """Those that never ran, the oldest first."""
        return tuple(self._waiting)

    def schedule(self, pool: KVPool, cut: Cut) -> Step:
        """Drop what has ended or was cancelled, admit what fits into `pool`, and choose the next step."""
        cancelled = tuple(g for g in self.all() if g.finish_reason is None and g.cancelled.is_set())
        over = self._drop(pool, cancelled)
        paused: list[Generation] = []
        for generation in [g for g in self._running if g.decoding]:
            if generation not in paused:
                victims = [g for g in self._running if g.number >= generation.number]
                self._grow(generation, generation.cached + 1, pool, victims, paused)
        resumed = [] if paused else self._resume(pool)
        if not paused and not self._paused:
            self._admit(pool, cut)
        prefill = self._turn(pool, cut, resumed, paused)
        decode = tuple(g for g in self._running if g.decoding)
        return Step(cancelled, over, tuple(paused), tuple(resumed), prefill, decode)

    def _drop(self, pool: KVPool, cancelled: tuple[Generation, ...]) -> tuple[Generation, ...]:
        """Those that have ended; what they read of their prompts is kept."""
        ended = {g for g in self.all() if g.finish_reason is not None}.union(cancelled)
        over = tuple(g for g in self.all() if g in ended)
        for generation in over:
            generation.swapped = None
            if generation.place is not None:
                pool.give_back(generation.place, keep=generation.finish_reason != "error")
        self._waiting = deque(g for g in self._waiting if g not in ended)
        self._running = [g for g in self._running if g not in ended]
        self._paused = [g for g in self._paused if g not in ended]
        return over

    def _grow(
        self, generation: Generation, tokens: int, pool: KVPool, victims: list[Generation], paused: list[Generation]
    ) -> bool:
        """Whether its place can hold so many tokens. While there are no pages for them, the youngest of `victims` are
        paused, one by one; it may be one of them.
        """
        assert generation.place is not None
        for victim in sorted(victims, key=lambda g: -g.number):
            if pool.grow(generation.place, tokens):
                return True
            assert victim.place is not None
            victim.swapped, victim.place = pool.swap_out(victim.place, victim.cached), None
            self._running.remove(victim)
            self._paused.append(victim)
            paused.append(victim)
            if victim is generation:
                return False
        return pool.grow(generation.place, tokens)

    def _resume(self, pool: KVPool) -> list[Generation]:
        """Those that were paused, the oldest first, while there is room."""
        resumed = []
        for generation in sorted(self._paused, key=lambda g: g.number):
            if not self._fits(generation, pool):
                break
            generation.place = pool.take(generation.cached + generation.decoding)
            if generation.place is None:
                break
            resumed.append(generation)
            self._running.append(generation)
        self._paused = [g for g in self._paused if g not in resumed]
        self._running.sort(key=lambda g: g.number)
        return resumed

    def _admit(self, pool: KVPool, cut: Cut) -> None:
        for generation in [g for g in self._waiting if g.ready]:
            if self._fits(generation, pool):
                generation.place = (
                    pool.take(0) if pool.grows else pool.take(generation.kv_tokens, generation.prompt(cut))
                )
            if generation.place is None:
                break
            self._waiting.remove(generation)
            self._running.append(generation)
        self._running.sort(key=lambda g: g.number)

    def _fits(self, generation: Generation, pool: KVPool) -> bool:
        """Whether it leaves to those that run what they soon grow by."""
        if not pool.grows:
            return True
        soon = [pool.lacks(g.place, _soon(g)) for g in self._running if g.place is not None]
        return sum(soon) - (-_soon(generation) // pool.page) <= pool.room

    def _turn(self, pool: KVPool, cut: Cut, resumed: list[Generation], paused: list[Generation]) -> Generation | None:
        """Whose prompt goes on: each in turn, unless there are no pages for it."""
        prompts = [g for g in self._running if g.prefilling]
        turns = [g for g in self._prompts if g in prompts]
        self._prompts = deque(turns + [g for g in prompts if g not in turns])
        for _ in range(len(self._prompts)):
            generation = self._prompts.popleft()
            if generation in paused:
                continue
            self._prompts.append(generation)
            if generation.cached == 0:
                assert generation.place is not None
                generation.reused = pool.reuse(generation.place, generation.prompt(cut))
                generation.cached = generation.reused
            end = cut.end(generation.cached, generation.prompt_tokens)
            younger = [g for g in self._running if g.number > generation.number and g not in resumed]
            if self._grow(generation, end, pool, younger, paused):
                return generation
        return None


def _soon(generation: Generation) -> int:
    """Tokens that it has before long."""
    return min(generation.kv_tokens, max(generation.prompt_tokens, generation.cached) + MARGIN)
