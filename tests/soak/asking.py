"""What a soak asks: kinds of requests, and one request as it runs, with its stop text, its limit and who cancels it."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mistral_nb.engine import AdapterSource, Engine, Generation, Sampling, Token
from mistral_nb.engine.detokenizer import Detokenizer
from mistral_nb.server.generation import StopScanner

__all__ = ["PAGE", "Kind", "Request", "cut", "kinds_of"]

PAGE = 16
"""Tokens of those engines that have pages."""

Stream = Callable[[], Detokenizer]
"""A new answer's detokenizer."""

End = Literal["whole", "stop text", "stop id", "cancelled"]


@dataclass(frozen=True)
class Kind:
    """What is asked, over and over. It ends before a token of `stop_ids`, and with the token that completes `stop`."""

    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    adapter: AdapterSource | None = None
    scale: float = 1.0
    stop: str = ""
    stop_ids: frozenset[int] = frozenset()


@dataclass
class Request:
    """One of a kind: cancelled at so many tokens of its own, or from outside; a stop text cancels it too, as in the
    server.
    """

    kind: Kind
    stream: Stream
    cancel_at: int | None = None

    def __post_init__(self) -> None:
        self.tokens: list[int] = []
        self.last: Token | None = None
        self.over = threading.Event()
        self.generation: Generation | None = None
        self._text = self.stream()
        self._scanner = StopScanner([self.kind.stop] if self.kind.stop else [])
        self._told = False

    def submit(self, engine: Engine) -> None:
        kind = self.kind
        self.generation = engine.submit(
            kind.prompt,
            kind.sampling,
            kind.max_tokens,
            kind.stop_ids,
            on_token=self._take,
            adapter=kind.adapter,
            lora_scale=kind.scale,
        )
        if self.cancel_at == 0 or self._told:
            self.generation.cancel()

    def cancel(self) -> None:
        """From outside, as one whose time is over or who has gone; when it takes effect is not known."""
        self._told = True
        if self.generation is not None:
            self.generation.cancel()

    def end(self) -> End:
        """How it ended; `AssertionError` for an end that nobody asked for."""
        assert self.last is not None, "it has not ended"
        if self._scanner.hit:
            return "stop text"
        reason = self.last.finish_reason
        assert reason != "error", self.last.error
        if reason == "cancelled":
            assert self._told or self.cancel_at is not None, "cancelled by nobody"
            return "cancelled"
        return "whole" if reason == "length" else "stop id"

    def _take(self, token: Token) -> None:
        """The engine's thread."""
        if token.id is not None and not self._scanner.hit:
            self.tokens.append(token.id)
            self._scanner.push(self._text.push(token.id))
        if token.finish_reason is not None:
            self.last = token
            self.over.set()
            return
        enough = self._scanner.hit or (self.cancel_at is not None and len(self.tokens) >= self.cancel_at)
        if enough and self.generation is not None:
            self.generation.cancel()


def cut(kind: Kind, tokens: Sequence[int], stream: Stream, chance: random.Random) -> tuple[Kind, list[int]]:
    """Of a kind and all its tokens one that ends in the midst of them, by a text or by an id, where that can be."""
    text, ends = stream(), [0]
    whole = ""
    for token in tokens:
        whole += text.push(token)
        ends.append(len(whole))
    if chance.random() < 0.5:
        id = chance.choice(tokens)
        return replace(kind, stop_ids=frozenset({id})), list(tokens[: tokens.index(id)])
    begin = chance.randrange(max(1, len(whole)))
    stop = whole[begin : begin + chance.randint(1, 6)]
    if not stop:
        return kind, list(tokens)
    end = whole.index(stop) + len(stop)
    return replace(kind, stop=stop), list(tokens[: next(i for i, reached in enumerate(ends) if reached >= end)])


def kinds_of(
    seed: int, count: int, vocab: int, adapters: Sequence[AdapterSource], longest: int, chunk: int
) -> list[Kind]:
    """Prompts of 5 tokens to `longest`, half of which begin alike by a chunk or more; two of three with an adapter,
    each in its turn; a quarter fills its last page, for which its prompt may be longer.
    """
    chance = random.Random(seed)
    shared = chance.choices(range(vocab), k=longest)
    own = [length for length in (5, chunk // 3, chunk + 2) if length < longest]
    kinds, turns = [], itertools.cycle(adapters)
    for i in range(count):
        prompt = chance.choices(range(vocab), k=chance.choice(own))
        if i % 2:
            begun = min(chance.choice((chunk + 2, chunk + chunk // 5, 2 * chunk + 7)), longest - len(prompt))
            prompt = [*shared[:begun], *prompt]
        sampling = Sampling(
            temperature=(0.0, 0.7, 1.2)[i % 3], seed=1000 + i, repetition_penalty=(1.0, 1.1)[i // 3 % 2]
        )
        adapter = next(turns) if adapters and i % 3 else None
        scale, most = chance.choice((0.5, 1.0, 2.0)), chance.choice((1, 6, 20, 48))
        if i % 4 == 2:
            prompt += chance.choices(range(vocab), k=-(len(prompt) + most - 1) % PAGE)
        kinds.append(Kind(tuple(prompt), sampling, most, adapter, scale))
    return kinds
