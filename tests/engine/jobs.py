"""What an engine is asked alone and together, on the CPU and on a GPU: prompts, ways to draw, limits, constraints."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from mistral_nb.engine import Engine, Generation, Sampling
from mistral_nb.errors import EngineError

__all__ = ["TIMEOUT", "Thirds", "check_stop_and_cancel", "held", "ids", "jobs", "wait_until"]

TIMEOUT = 180


class Thirds:
    """A constraint: ids that are 0, 1, 2, 0, ... modulo 3. After `fails_after` tokens it cannot be followed."""

    def __init__(self, vocab: int, fails_after: int | None = None) -> None:
        self._ids = torch.arange(vocab)
        self._fails_after = fails_after
        self._taken = 0

    def allowed(self) -> Tensor:
        if self._taken == self._fails_after:
            raise EngineError("no token fits; give the functions simpler schemas")
        return self._ids % 3 == self._taken % 3

    def take(self, token: int) -> None:
        assert token % 3 == self._taken % 3
        self._taken += 1


def jobs(vocab: int, seed: int = 2) -> list[tuple[Any, ...]]:
    """Twelve times what `Engine.submit` takes: of many lengths, drawn in many ways, some with a constraint."""
    random = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, vocab, (1 + 7 * i,), generator=random).tolist(),
            Sampling(
                temperature=(0.0, 0.8, 1.5)[i % 3],
                seed=2**33 + i,
                top_k=(0, 5)[i % 2],
                top_p=(1.0, 0.7)[i // 2 % 2],
                repetition_penalty=(1.0, 1.3)[i // 3 % 2],
                frequency_penalty=(0.0, 0.2)[i // 4 % 2],
            ),
            (40, 3, 1, 25)[i % 4],
            frozenset(),
            None,
            Thirds(vocab) if i % 5 == 3 else None,
        )
        for i in range(12)
    ]


def ids(generation: Generation) -> list[int]:
    return [token.id for token in generation if token.id is not None]


def check_stop_and_cancel(engine: Engine) -> None:
    """Neither gives a token that was drawn ahead, and all places come back."""
    sampling = Sampling(temperature=1.0, seed=5)
    text = ids(engine.submit([1, 2, 3], sampling, 60))
    stop = text[20]
    stopped = engine.submit([1, 2, 3], sampling, 60, frozenset({stop}))
    assert ids(stopped) == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    cancelled = engine.submit([1, 2, 3], sampling, 60)
    tokens = iter(cancelled)
    first = [next(tokens).id for _ in range(5)]
    cancelled.cancel()
    rest = list(tokens)
    assert rest[-1].finish_reason == "cancelled"
    assert first + [token.id for token in rest[:-1]] == text[: len(first) + len(rest) - 1]
    assert ids(engine.submit([1, 2, 3], sampling, 60)) == text
    assert wait_until(lambda: engine._runner.pool.used == 0)


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """No step begins before the end of this, by which all have asked."""
    go, usual = threading.Event(), engine._apply

    def apply(waiting: Any) -> None:
        assert go.wait(TIMEOUT)
        usual(waiting)

    with mock.patch.object(engine, "_apply", apply):
        try:
            yield
        finally:
            go.set()


def wait_until(condition: Callable[[], bool]) -> bool:
    """Whether `condition` holds within the time limit; asked over and over."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.001)
    return True
