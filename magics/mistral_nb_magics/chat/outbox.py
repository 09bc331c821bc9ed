"""What a chat's view is sent, in order and by one thread: turns at once, text at intervals that grow."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from mistral_nb.chat import Conversation, Event, Rearranged, StatusSaid, TextAdded, Turn, TurnEnded, TurnStarted
from mistral_nb.rendering import BlockStream
from mistral_nb_magics.chat.projection import BlockCache, recent_prompts, shown, turn_view

__all__ = ["INTERVAL", "SLOWEST", "Outbox", "interval"]

_LOG = logging.getLogger(__name__)

INTERVAL = 1 / 12
"""Seconds between two patches of a short answer."""

SLOWEST = 1.0
"""Seconds between two patches of an answer that has been streaming for long: its reader is far behind by then.

A message costs 350 bytes besides its text, so that 8,000 tokens in two minutes would else cost more than they hold.
"""

IDLE = 10.0
"""Seconds without anything to say after which the thread ends; what is put then starts another."""

COST_SHARE = 5
"""Rendering takes at most one part in this many of the time."""

Message = Mapping[str, Any]
_TICK: Message = {"type": "tick"}


def interval(seconds: float) -> float:
    """How long to wait between two patches of an answer that has been streaming for `seconds`."""
    return min(SLOWEST, max(INTERVAL, seconds / 30))


@dataclass(slots=True)
class _Growing:
    """An answer on the page that is being written; `due` is when its next patch may go, on `time.monotonic`'s clock."""

    stream: BlockStream = field(default_factory=BlockStream)
    length: int = 0
    began: float = 0.0
    due: float = 0.0
    waiting: bool = False

    def add(self, event: TextAdded) -> None:
        """Text that a snapshot had already is not added again."""
        new = event.text[max(0, self.length - event.start) :]
        if not new:
            return
        self.began = self.began or time.monotonic()
        self.stream.add(new)
        self.length += len(new)
        self.waiting = True


class Outbox:
    """Takes a session's events and messages from any thread, and says them to the view.

    `state` makes the part of a snapshot that is not the turns; what of it has changed is said alone. Before a page has
    asked for a snapshot there is nobody to show an answer to, and none is rendered. A snapshot may be ahead of the
    events that wait: each of these is then either in it, or is said to no harm.

    `settled` is called when answers have ended or turns were rearranged, and nothing else waits: then the saved
    transcript is written again.
    """

    def __init__(
        self,
        conversation: Conversation,
        say: Callable[[Message], None],
        state: Callable[[], Message],
        settled: Callable[[], None],
    ) -> None:
        self._conversation = conversation
        self._say = say
        self._state = state
        self._settled = settled
        self._items: SimpleQueue[Event | Message | threading.Event | None] = SimpleQueue()
        self._cache = BlockCache()
        self._has_page = False
        self._on_page: list[str] = []
        self._growing: dict[str, _Growing] = {}
        self._running: set[str] = set()
        self._known: Message = {}
        self._unsettled = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def put(self, item: Event | Message) -> None:
        """An event of the session, or a message; the messages "snapshot" and "state" are filled in when they are said.

        Nothing is taken after `close`.
        """
        with self._lock:
            if self._is_closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mistral-nb chat view", daemon=True)
                self._thread.start()
            self._items.put(item)

    def flush(self, timeout: float) -> None:
        """Wait until what was put before is said, and the transcript written; `timeout` is in seconds."""
        said = threading.Event()
        with self._lock:
            if self._is_closed or self._thread in (None, threading.current_thread()):
                return
            self._items.put(said)
        said.wait(timeout)

    def close(self) -> None:
        """Say what was put before, and end."""
        with self._lock:
            self._is_closed = True
            self._items.put(None)
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            due = min((each.due for each in self._growing.values() if each.waiting), default=None)
            try:
                item = self._items.get(timeout=IDLE if due is None else max(0.0, due - time.monotonic()))
            except Empty:
                if due is None and self._rest():
                    return
                item = _TICK
            if item is None:
                return
            try:
                self._take(item)
                self._flush()
                self._settle()
                if isinstance(item, threading.Event):
                    item.set()
            except Exception:  # the next event must still be shown
                _LOG.exception("a message of a chat could not be sent to its view")
                self._recover()

    def _rest(self) -> bool:
        """Have no thread, where nothing waits."""
        with self._lock:
            if self._items.empty():
                self._thread = None
            return self._thread is None

    def _recover(self) -> None:
        """The page may have missed a patch on which the next ones build."""
        try:
            if self._has_page:
                self._snapshot({})
        except Exception:
            _LOG.exception("a chat could not be sent to its view")

    def _take(self, item: Event | Message | threading.Event) -> None:
        match item:
            case threading.Event():
                self._settle(at_once=True)
            case TurnStarted(turn):
                self._running.add(turn.id)
                self._start(turn)
            case TextAdded(turn_id):
                if turn_id in self._growing:
                    self._growing[turn_id].add(item)
            case StatusSaid(turn_id, status):
                if turn_id in self._growing:
                    self._say({"type": "status", "id": turn_id, "text": status})
            case TurnEnded(turn):
                self._running.discard(turn.id)
                self._end(turn)
                self._unsettled = True
            case Rearranged():
                self._unsettled = True
                if self._has_page:
                    self._snapshot({})
            case {"type": "tick"}:
                pass
            case {"type": "snapshot"}:
                self._has_page = True
                self._snapshot(item)
            case {"type": "state"}:
                self._send_state()
            case _:
                self._say(item)

    def _start(self, turn: Turn) -> None:
        """A turn below the others is sent alone; where others make way for it, all are."""
        if not self._has_page:
            return
        if turn.id in self._on_page:
            self._start_again(turn)
            return
        now = [each.id for each in shown(self._conversation)]
        if turn.id not in now:
            return  # it was deleted, or another branch is shown: that event comes
        if now[: len(self._on_page) + 1] != [*self._on_page, turn.id]:
            self._snapshot({})
            return
        self._on_page.append(turn.id)
        self._growing[turn.id] = _Growing()
        self._say({"type": "turn", "turn": turn_view(turn, self._conversation, [])})
        self._send_state()

    def _start_again(self, turn: Turn) -> None:
        """It is tried again, or a snapshot that was ahead has it, running or at its end, already."""
        if turn.id in self._growing or not self._is_running(turn.id):
            return
        self._growing[turn.id] = _Growing()
        self._say({"type": "turn", "turn": turn_view(turn, self._conversation, [])})
        self._send_state()

    def _end(self, turn: Turn) -> None:
        growing = self._growing.pop(turn.id, None)
        if turn.id in self._on_page:
            if growing is None or growing.length != len(turn.answer):
                parts = self._cache.blocks(turn)
                self._say({"type": "turn", "turn": turn_view(turn, self._conversation, parts)})
            else:
                patch = growing.stream.end()
                if patch is not None:
                    self._say({"type": "patch", "id": turn.id, **patch})
                self._say({"type": "turn", "turn": turn_view(turn, self._conversation)})
        self._send_state()

    def _settle(self, at_once: bool = False) -> None:
        if self._unsettled and not self._running and (at_once or self._items.empty()):
            self._unsettled = False
            self._settled()

    def _flush(self) -> None:
        now = time.monotonic()
        for turn_id, growing in self._growing.items():
            if not growing.waiting or growing.due > now:
                continue
            growing.waiting = False
            patch = growing.stream.patch()
            if patch is not None:
                self._say({"type": "patch", "id": turn_id, **patch})
            cost = time.monotonic() - now
            growing.due = now + max(interval(now - growing.began), COST_SHARE * cost)

    def _snapshot(self, message: Message) -> None:
        """All that stands on the page, with what of running answers was read by now."""
        turns = shown(self._conversation)
        views, running = [], {}
        for turn in turns:
            if turn.running:
                growing = running[turn.id] = self._growing.get(turn.id) or _Growing()
                growing.add(TextAdded(turn.id, turn.answer, 0))
                growing.stream.patch()
                growing.waiting = False
                views.append(turn_view(turn, self._conversation, growing.stream.blocks))
            else:
                views.append(turn_view(turn, self._conversation, self._cache.blocks(turn)))
        self._growing = running
        self._on_page = [turn.id for turn in turns]
        self._known = self._state_now()
        history = recent_prompts(self._conversation)
        self._say({"type": "snapshot", **self._known, "history": history, "turns": views})
        if "ref" in message:
            self._say({"type": "done", "ref": message["ref"]})

    def _state_now(self) -> Message:
        return {**self._state(), "busy": any(turn.running for turn in self._conversation.turns)}

    def _send_state(self) -> None:
        """What has changed since it was sent last. The page counts the prompts and the answers that it sees itself."""
        if not self._has_page:
            return
        now = self._state_now()
        changed = {name: value for name, value in now.items() if value != self._known.get(name)}
        self._known = now
        if changed:
            self._say({"type": "state", **changed})

    def _is_running(self, turn_id: str) -> bool:
        with self._conversation.steady():
            return turn_id in self._conversation and self._conversation.turn(turn_id).running
