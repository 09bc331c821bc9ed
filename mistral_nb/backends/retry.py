"""Which failures before the first text are tried again, and after how long: full jitter, Retry-After, one deadline.

Source of the rule for the waits: "Exponential Backoff And Jitter", AWS Architecture Blog, full jitter.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from mistral_nb.backends.pump import Emit, HungUp, Line
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ConnectionFailed,
    MistralError,
    RequestTimeout,
    StreamTruncated,
)
from mistral_nb.types import Chunk

__all__ = ["NotListening", "Retries", "patiently"]

T = TypeVar("T")

# Seconds: the first wait is up to BASE, each next one up to twice as much, none longer than LONGEST.
BASE = 0.5
LONGEST = 8.0
# For what a second try seldom mends.
FEW = 2
_TIMED_OUT = (3007, 3008, 3046)
_NO_CAPACITY = 3040
_THROTTLED = 971
# No daily allowance, no route.
_FINAL = (3036, 4006, 7000, 7003)
# The user's own random numbers stay what their seed makes them.
_RANDOM = random.SystemRandom()


class NotListening(ConnectionFailed):
    """Nobody took the connection, so nothing of the request was sent."""


@dataclass(slots=True)
class Retries:
    """The tries of one request. `deadline` is in seconds from now, 0 for one try; the last wait ends before it."""

    deadline: float
    tries: int = 1
    _started: float = field(default_factory=time.monotonic)

    def next(self, error: MistralError) -> tuple[float, str] | None:
        """Seconds to wait before the next try, and the line that says so; None where `error` is the end.

        The error's message then tells how often was tried, and of a wait that is too long.
        """
        reason, most = _reason(error)
        if not reason or not self.deadline:
            return None
        asked = error.retry_after if isinstance(error, BackendError) else None
        left = self.deadline - (time.monotonic() - self._started)
        wait = _RANDOM.uniform(0, min(LONGEST, BASE * 2 ** (self.tries - 1)))
        if asked is not None:
            wait = max(asked, min(left, asked + wait))
        if self.tries > most or wait > left:
            error.args = (self._told(error, asked if wait > left else None),)
            return None
        self.tries += 1
        return wait, f"{reason}; trying again in {math.ceil(wait)} s"

    def _told(self, error: MistralError, asked: float | None) -> str:
        told = str(error) if self.tries == 1 else f"after {self.tries} tries: {error}"
        if asked is None:
            return told
        return (
            f"{told}. It asks for a wait of {math.ceil(asked)} s, and retry_deadline is {self.deadline:g} s: "
            "ask again after that, or raise retry_deadline"
        )


def patiently(attempt: Callable[[], T], deadline: float, line: Line, emit: Emit) -> T:
    """What `attempt` gives, tried again within `deadline` seconds where its `MistralError` may mend.

    A status is emitted before each wait. What fails leaves no deadline on `line` for what comes after. Ends with
    `HungUp` once `line` is hung up.
    """
    retries = Retries(deadline)
    while True:
        try:
            return attempt()
        except MistralError as error:
            line.release()
            again = None if line.hung_up else retries.next(error)
            if again is None:
                raise
        wait, status = again
        emit(Chunk(status=status))
        if line.wait(wait):
            raise HungUp


def _reason(error: MistralError) -> tuple[str, float]:
    """Why to try again, in words, and how often at most; empty where another try would fail alike."""
    if not isinstance(error, BackendError) or isinstance(error, AuthenticationError) or error.code in _FINAL:
        return "", 0
    if error.code in _TIMED_OUT or (isinstance(error, RequestTimeout) and error.status == 408):
        return "Timed out", FEW
    if error.code == _NO_CAPACITY:
        return "No capacity", math.inf
    if error.code == _THROTTLED or error.status == 429:
        return "Too many requests", math.inf
    if isinstance(error, NotListening):
        return "Not reachable", FEW
    if isinstance(error, ConnectionFailed | StreamTruncated):
        return "The connection broke", math.inf
    if error.status is not None and error.status >= 500:
        return f"Server error {error.status}", math.inf
    return "", 0
