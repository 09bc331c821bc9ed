"""One answer on its way into a conversation: read by a thread, ended once, by whoever comes first."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mistral_nb.answer import Answer, Result
from mistral_nb.chat.context import more_left_out
from mistral_nb.chat.conversation import Conversation
from mistral_nb.chat.events import Events, StatusSaid, TextAdded, TurnEnded
from mistral_nb.chat.turns import Turn
from mistral_nb.config import Settings
from mistral_nb.errors import ContextOverflow, MistralError
from mistral_nb.types import Chunk, FinishReason, GenerationRequest

__all__ = ["Run"]

_LOG = logging.getLogger(__name__)


class Run:
    """The answer of one turn, which is `asked` as it was and `turn` as it is. Calls `on_end` at its end.

    `left_out` is how many of the oldest turns are known not to fit. `done` is set after the end; `result` and `error`
    are then what it left. It ends at once where it is cancelled: what the peer says after that is not heard.
    """

    def __init__(
        self,
        turn: Turn,
        conversation: Conversation,
        settings: Callable[[], Settings],
        events: Events,
        on_end: Callable[[Run, TurnEnded], None],
        left_out: int = 0,
    ) -> None:
        self.asked = turn
        self.turn = turn
        self.turn_id = turn.id
        self.begun = False
        self.done = threading.Event()
        self.result: Result | None = None
        self.error: MistralError | None = None
        self._conversation = conversation
        self._settings = settings
        self._events = events
        self._on_end = on_end
        self._known = left_out
        self._lock = threading.RLock()
        self._answer: Answer | None = None
        self._text = ""

    def run(self) -> None:
        """Ask and read to the end, in a thread of its own."""
        self.begun = True
        try:
            self._read()
        except MistralError as error:
            self._end("error", error)
        except Exception as error:  # a turn must not stay "running" for ever
            _LOG.exception("an answer of a chat failed")
            self._end("error", MistralError(f"{type(error).__name__}: {error}. Ask again"))

    def fail(self, error: MistralError) -> None:
        """End it, where it could not even be begun."""
        self._end("error", error)

    def cancel(self) -> None:
        """End it, from any thread."""
        self._end("cancelled")
        answer = self._answer
        if answer is not None:
            answer.close()

    def _read(self) -> None:
        from mistral_nb.backends import resolve

        choice = self.turn.choice
        backend = resolve(self._settings(), backend=choice.backend, model=choice.model).backend
        left_out = self._known
        if left_out:
            self._leave_out(left_out)
        while not self.done.is_set():
            request = GenerationRequest(messages=self._conversation.asking(self.turn_id, left_out), **choice.fields)
            try:
                with Answer(backend, request) as answer:
                    self._follow(answer)
                return self._end(answer.result.finish_reason or "truncated")
            except ContextOverflow as error:
                more = None if self._text else more_left_out(error, request, left_out)
                if more is None:
                    raise
                left_out = more
                self._leave_out(left_out)

    def _follow(self, answer: Answer) -> None:
        with self._lock:
            self._answer = answer
            if self.done.is_set():
                return answer.close()
        for chunk in answer:
            self._take(chunk)

    def _take(self, chunk: Chunk) -> None:
        with self._lock:
            if self.done.is_set():
                return
            if chunk.status:
                self._events.put(StatusSaid(self.turn_id, chunk.status))
            if chunk.text:
                self._events.put(TextAdded(self.turn_id, chunk.text, len(self._text)))
                self._text += chunk.text
                self._change(answer=self._text)

    def _leave_out(self, count: int) -> None:
        with self._lock:
            if self.done.is_set():
                return
            self._change(left_out=count)
            turns = "oldest turn" if count == 1 else f"{count} oldest turns"
            self._events.put(StatusSaid(self.turn_id, f"The context is full: leaving out the {turns}"))

    def _end(self, reason: FinishReason, error: MistralError | None = None) -> None:
        """The first end that is told stays."""
        with self._lock:
            if self.done.is_set():
                return
            result = error.result if error else None
            if result is None and self._answer is not None:
                result = self._answer.result
            told: dict[str, Any] = {}
            if result is not None:
                reason = (result.finish_reason if error else None) or reason
                result = replace(result, text=self._text, finish_reason=reason)
                told = {"footer": result.footer, "served": result.metadata()}
            if error is not None:
                error.result = result
            self.result, self.error = result, error
            self._change(finish_reason=reason, error=str(error) if error else None, **told)
            self._on_end(self, TurnEnded(self.turn, result))
            self.done.set()

    def _change(self, **changes: Any) -> None:
        """Also where the turn was deleted meanwhile: those who listen are told how it ended."""
        self.turn = self._conversation.write(self.turn_id, **changes) or replace(self.turn, **changes)
