"""What happens in a chat, as events, and their delivery: one at a time, in order, by a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mistral_nb.answer import Result
from mistral_nb.chat.turns import Turn

__all__ = ["Event", "Events", "Rearranged", "StatusSaid", "TextAdded", "TurnEnded", "TurnStarted"]

_LOG = logging.getLogger(__name__)
# Seconds without an event after which the thread ends.
_LINGER = 2.0


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """A question is on its way. A turn that was there already, and failed without an answer, starts anew."""

    turn: Turn


@dataclass(frozen=True, slots=True)
class TextAdded:
    """The answer has grown by `text`, which begins at its character `start`."""

    turn_id: str
    text: str
    start: int


@dataclass(frozen=True, slots=True)
class StatusSaid:
    """What is being waited for, before the first text."""

    turn_id: str
    status: str


@dataclass(frozen=True, slots=True)
class TurnEnded:
    """The turn as it stays. `result` is None where nobody was asked; the turn may have been deleted meanwhile."""

    turn: Turn
    result: Result | None


@dataclass(frozen=True, slots=True)
class Rearranged:
    """The turns are others, or in another order: `why` is "select", "delete", "clear", "load" or "undo"."""

    why: str


Event = TurnStarted | TextAdded | StatusSaid | TurnEnded | Rearranged
Listener = Callable[[Event], None]


class Events:
    """Hands events to listeners in a thread of its own, which is there while there are any: nobody waits for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[Event] = deque()
        self._listeners: dict[object, Listener] = {}
        self._thread: threading.Thread | None = None
        self._at_it = False

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Call `callback` with each event from now on. What it raises is logged. Returns how to end it."""
        key = object()
        with self._changed:
            self._listeners = {**self._listeners, key: callback}

        def end() -> None:
            with self._changed:
                self._listeners = {each: one for each, one in self._listeners.items() if each is not key}

        return end

    def put(self, event: Event) -> None:
        """Have an event handed out. The caller may hold locks."""
        with self._changed:
            self._queue.append(event)
            self._awake()
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all is handed out. In a listener that is at once."""
        if threading.current_thread() is self._thread:
            return True
        with self._changed:
            if self._queue and not self._awake():
                return False
            return self._changed.wait_for(lambda: not self._queue and not self._at_it, timeout)

    def _awake(self) -> bool:
        """Have a thread. False where none is to be had now, as at the interpreter's end: the next event tries again."""
        if self._thread is None:
            thread = threading.Thread(target=self._hand_out, name="mistral-nb chat events", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _hand_out(self) -> None:
        while True:
            with self._changed:
                self._at_it = False
                self._changed.notify_all()
                if not self._changed.wait_for(lambda: self._queue, _LINGER):
                    self._thread = None
                    return
                self._at_it = True
                event = self._queue.popleft()
                listeners = list(self._listeners.values())
            for callback in listeners:
                try:
                    callback(event)
                except BaseException:  # somebody else's code; in this thread nobody else could hear of it
                    _LOG.exception("a listener of a chat failed at %s", type(event).__name__)
