"""Which sequences run next: admission, prefill in chunks, decoding in batches, cancellation."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

from mistral_nb.engine.kv_cache import KVCache
from mistral_nb.engine.sampling import Sampler

__all__ = ["Generation", "Scheduler", "Step", "Token"]

log = logging.getLogger(__name__)

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
    """

    def __init__(
        self,
        prompt_ids: list[int],
        sampler: Sampler,
        max_tokens: int,
        stop_ids: frozenset[int],
        on_token: Callable[[Token], None] | None,
        on_cancel: Callable[[], None],
    ) -> None:
        self.prompt_ids = prompt_ids
        self.max_tokens = max_tokens
        self.completion_tokens = 0
        self.sampler = sampler
        self.cache: KVCache | None = None
        self.last_token: int | None = None
        self.finish_reason: EndReason | None = None
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
        """Cache entries that the whole generation needs."""
        return self.prompt_tokens + self.max_tokens

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
        """Engine thread: the model chose `token`."""
        if token in self._stop_ids:
            self.finish("stop")
            return
        self.last_token = token
        self.completion_tokens += 1
        if self.completion_tokens == self.max_tokens:
            self.finish("length", token)
        else:
            self._emit(Token(token))

    def finish(self, reason: EndReason, token: int | None = None, error: str = "") -> None:
        """Engine thread: the last event. The cache is let go."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.cache = None
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
            self.cache = None


@dataclass(frozen=True, slots=True)
class Step:
    """What comes next: `cancelled` are told so; one sequence's prompt goes on; each of `decode` gets a token."""

    cancelled: tuple[Generation, ...]
    prefill: Generation | None
    decode: tuple[Generation, ...]


class Scheduler:
    """First come, first served, while there are places in the batch and room for the whole sequence in the cache."""

    def __init__(self, max_batch: int, max_kv_tokens: int) -> None:
        self._max_batch = max_batch
        self._max_kv_tokens = max_kv_tokens
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []

    def submit(self, generation: Generation) -> None:
        self._waiting.append(generation)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def all(self) -> list[Generation]:
        return [*self._running, *self._waiting]

    def schedule(self) -> Step:
        """Drop what has ended or was cancelled, admit what fits, and choose the next step."""
        cancelled = tuple(g for g in self.all() if g.finish_reason is None and g.cancelled.is_set())
        over = {g for g in self.all() if g.finish_reason is not None}.union(cancelled)
        self._waiting = deque(g for g in self._waiting if g not in over)
        self._running = [g for g in self._running if g not in over]
        self._admit()
        prefill = next((g for g in self._running if g.last_token is None), None)
        return Step(cancelled, prefill, tuple(g for g in self._running if g.last_token is not None))

    def _admit(self) -> None:
        used = sum(g.kv_tokens for g in self._running)
        while self._waiting and len(self._running) < self._max_batch:
            used += self._waiting[0].kv_tokens
            if used > self._max_kv_tokens:
                return
            self._running.append(self._waiting.popleft())
