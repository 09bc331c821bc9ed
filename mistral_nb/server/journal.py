"""What a server knows of its requests: counters, and one line of JSON for each in the log, without prompts or texts."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from mistral_nb.server.generation import Answer

__all__ = ["REQUEST_LOG", "Entry", "Journal", "Journalled", "current"]

REQUEST_LOG = "mistral_nb.server.requests"
"""The logger of the lines of JSON."""

CLIENT_LEFT = 499
"""The status in the log of a request whose client left before it got one."""

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_UNLOGGED = ("/health", "/engine/health")
_LONGEST = 200


@dataclass(slots=True, eq=False)
class Entry:
    """One request under way. `seen_leaving` is how many tokens there were when its client was seen to have left."""

    id: str
    at: datetime = field(default_factory=lambda: datetime.now(UTC))
    started: float = field(default_factory=time.monotonic)
    status: int = CLIENT_LEFT
    complete: bool = False
    answer: Answer | None = None
    seen_leaving: int | None = None

    @property
    def end(self) -> str:
        """A finish reason, `error` or `cancelled`; for what has no answer `done`, `refused` or `cancelled`."""
        if not self.complete:
            return "cancelled"
        if self.answer is None:
            return "done" if self.status < 400 else "refused"
        return self.answer.finish_reason or "error"


current: ContextVar[Entry] = ContextVar("the request being answered")


class Journal:
    """Counters since the start. Lives on the event loop's thread."""

    def __init__(self) -> None:
        self.requests = self.refused = self.cancelled = self.failed = 0
        self.tokens_in = self.tokens_out = 0
        self.last_cancelled: dict[str, Any] | None = None

    def counters(self) -> dict[str, Any]:
        """Requests that have ended, those for health left out, and the tokens of all answers.

        Of the answer that was last cancelled by its client: how many tokens had been sent, how many there were when
        the client was seen to have left, and how many there were in the end.
        """
        names = ("requests", "refused", "cancelled", "failed", "tokens_in", "tokens_out", "last_cancelled")
        return {name: getattr(self, name) for name in names}

    async def close(self, entry: Entry, scope: Scope) -> None:
        """Take a request down that has ended, once the engine is done with it."""
        answer = entry.answer
        if answer is not None:
            await answer.settled()
            self.tokens_in += answer.prompt_tokens
            self.tokens_out += answer.generated
        if scope["path"] in _UNLOGGED and entry.status < 400:
            return
        end = entry.end
        self.requests += 1
        self.refused += end == "refused"
        self.cancelled += end == "cancelled"
        self.failed += end == "error"
        if answer is not None and entry.seen_leaving is not None and end == "cancelled":
            self.last_cancelled = {
                "request_id": entry.id,
                "tokens_sent": answer.sent,
                "tokens_when_seen": entry.seen_leaving,
                "tokens_generated": answer.generated,
            }
        logging.getLogger(REQUEST_LOG).info(json.dumps(_line(entry, scope)))


def _line(entry: Entry, scope: Scope) -> dict[str, Any]:
    """Paths have no query here, which may hold a prompt."""
    now = time.monotonic()
    route = scope.get("route")
    line: dict[str, Any] = {
        "time": entry.at.isoformat(timespec="milliseconds"),
        "request_id": entry.id,
        "method": scope["method"],
        "route": getattr(route, "path", None) or scope["path"][:_LONGEST],
        "status": entry.status,
    }
    asked = scope.get("path_params", {}).get("model")
    if asked:
        line["model"] = asked[:_LONGEST]
    answer = entry.answer
    if answer is not None:
        line |= {"tokens_in": answer.prompt_tokens, "tokens_out": answer.generated, "tokens_reused": answer.reused}
        if answer.adapter:
            line["adapter"] = answer.adapter[:_LONGEST]
        if answer.first_token_at is not None:
            line["first_token_ms"] = round((answer.first_token_at - entry.started) * 1e3, 1)
    return {**line, "ms": round((now - entry.started) * 1e3, 1), "end": entry.end}


class Journalled:
    """Gives every request an id, which the response carries, and takes it down in the journal when it has ended."""

    def __init__(self, app: ASGIApp, journal: Journal) -> None:
        self._app = app
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        entry = Entry(_request_id(scope))

        async def noting_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and entry.answer is not None and entry.seen_leaving is None:
                entry.seen_leaving = entry.answer.generated
            return message

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                ids = [(b"x-request-id", entry.id.encode()), (b"cf-ai-req-id", entry.id.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                entry.complete = True

        known = current.set(entry)
        try:
            await self._app(scope, noting_receive, noting_send)
        finally:
            current.reset(known)
            await self._journal.close(entry, scope)


def _request_id(scope: Scope) -> str:
    """The client's own where it can be logged and sent back, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _SANE_ID.fullmatch(given) else str(uuid.uuid4())
