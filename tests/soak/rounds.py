"""Rounds of requests at once: each answer is the one that the same request gets alone, and everything comes back."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mistral_nb.engine import Engine
from tests.soak.asking import Kind, Request, Stream, cut

__all__ = ["AT_ONCE", "Soak"]

AT_ONCE = 64
TIMEOUT_S = 300
CANCELLED, TIMED = 0.2, 0.15
"""Shares of the requests that are cancelled at one of their tokens, and after some time, wherever they are then."""
GAPS_S = (0.0, 0.0, 0.005, 0.03)
LIMITS_S = (0.0, 0.02, 0.2, 1.0, 3.0)


class Soak:
    """An engine and what it is asked. `alone`: what was answered to each kind by itself, for which it is asked once, by
    whichever engine of the same model is first.
    """

    def __init__(
        self, engine: Engine, kinds: Sequence[Kind], stream: Stream, seed: int, alone: dict[Kind, list[int]]
    ) -> None:
        self.engine = engine
        self.seen: Counter[str] = Counter()
        self._stream = stream
        self._chance = random.Random(seed)
        self._asked: list[tuple[Kind, list[int]]] = []
        for i, kind in enumerate(kinds):
            if kind not in alone:
                alone[kind] = self._alone(kind)
            tokens = alone[kind]
            self._asked.append(cut(kind, tokens, stream, self._chance) if i % 4 == 3 else (kind, tokens))

    def round(self, at_once: int = AT_ONCE) -> None:
        """`AssertionError` where an answer is not the one alone, or where it was cancelled, the beginning of that."""
        chance, requests = self._chance, []
        due: list[tuple[float, int, Callable[[], object], Request]] = []
        at = time.monotonic()
        for number in range(at_once):
            kind, alone = chance.choice(self._asked)
            cancelled = chance.random() < CANCELLED
            request = Request(kind, self._stream, chance.randrange(kind.max_tokens) if cancelled else None)
            requests.append((request, alone))
            at += chance.choice(GAPS_S)
            heapq.heappush(due, (at, number, partial(request.submit, self.engine), request))
            if chance.random() < TIMED:
                heapq.heappush(due, (at + chance.choice(LIMITS_S), number + at_once, request.cancel, request))
        while due:
            when, _, act, request = heapq.heappop(due)
            if not request.over.wait(max(0.0, when - time.monotonic())):
                act()
        for request, alone in requests:
            self._judge(request, alone)
        self.seen["rounds"] += 1
        self.came_back()

    def _alone(self, kind: Kind) -> list[int]:
        """With nothing of its prompt in the pages."""
        self.came_back()
        request = Request(kind, self._stream)
        request.submit(self.engine)
        assert request.over.wait(TIMEOUT_S), "a request alone does not end"
        assert request.end() == "whole"
        return request.tokens

    def _judge(self, request: Request, alone: list[int]) -> None:
        assert request.over.wait(TIMEOUT_S), "an answer does not end"
        end = request.end()
        expected = alone[: len(request.tokens)] if end == "cancelled" else alone
        assert request.tokens == expected, f"{request.kind}, {end}: {request.tokens} instead of {expected}"
        assert request.generation is not None
        self.seen[end] += 1
        self.seen["reused"] += request.generation.reused

    def came_back(self) -> None:
        """All places, pages and slots, once nothing runs; the prefixes that are kept are given up."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.engine.active or any(_held(self.engine).values()):
            assert time.monotonic() < deadline, f"not given back: {_held(self.engine)}"
            time.sleep(0.005)
        pool = self.engine._runner.pool
        pool.forget()
        assert not any(pool._holders), "pages are held by nobody"
        assert len(pool._free_pages) == len(pool._holders), "pages are lost"
        assert len(pool._free_places) == len(pool.table), "places are lost"


def _held(engine: Engine) -> dict[str, int]:
    """What generations have of the engine."""
    runner: Any = engine._runner
    return {
        "generations": len(engine._scheduler),
        "places": len(runner.pool._taken),
        "copies put off": len(runner.pool._copies),
        "slots": sum(len(one.holders) for one in list(runner.adapters._residents.values())),
        "slots that load": sum(one.loading for one in list(runner.adapters._residents.values())),
        "states": len(getattr(runner, "_samplers", ())) + len(getattr(runner, "_saved", ())),
    }
