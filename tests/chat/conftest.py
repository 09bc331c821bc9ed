"""A chat with a peer that plays scripts over a real socket, and with the embedded model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.chat import (
    ChatSession,
    Choice,
    Conversation,
    Event,
    Rearranged,
    StatusSaid,
    TextAdded,
    TurnEnded,
    TurnStarted,
)
from mistral_nb.config import load_settings
from tests.backends.scripted import PATIENCE, TOKEN, Peer, body, frame, head

ACCOUNT = "0123456789abcdef0123456789abcdef"
CLOUD = Choice(backend="cloudflare")


class Heard:
    """Every event of a session, in order, and ways to wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def until(self, kind: type[Event], count: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.of(kind)) >= count, PATIENCE), self.events

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def about(self, turn_id: str) -> list[str]:
        """The kinds of the events of one turn."""
        return [
            type(event).__name__
            for event in self.events
            if (isinstance(event, TurnStarted | TurnEnded) and event.turn.id == turn_id)
            or (isinstance(event, TextAdded | StatusSaid) and event.turn_id == turn_id)
        ]

    @property
    def whys(self) -> list[str]:
        return [event.why for event in self.of(Rearranged)]

    def text(self, turn_id: str) -> str:
        """The text as it was added, each piece where the one before ended."""
        text = ""
        for event in self.of(TextAdded):
            if event.turn_id == turn_id:
                assert event.start == len(text)
                text += event.text
        return text


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def make(peer: Peer) -> Iterator[Callable[..., ChatSession]]:
    """Makes a session whose answers come from `peer`, as if it were Cloudflare. At the end all are at rest."""
    made: list[ChatSession] = []

    def make(conversation: Conversation | None = None, **settings: Any) -> ChatSession:
        given = {
            "cloudflare_account_id": ACCOUNT,
            "cloudflare_api_token": TOKEN,
            "cloudflare_base_url": peer.url,
            "cloudflare_trust_base_url": True,
            "retry_deadline": 0.0,
            **settings,
        }
        made.append(ChatSession(conversation, CLOUD, settings=lambda: load_settings(given)))
        return made[-1]

    yield make
    for session in made:
        session.stop()
        assert session.wait(PATIENCE)


@pytest.fixture
def session(make: Callable[..., ChatSession]) -> ChatSession:
    return make()


@pytest.fixture
def heard(session: ChatSession) -> Heard:
    heard = Heard()
    session.listen(heard)
    return heard


@pytest.fixture
def real(embedded: Path) -> ChatSession:
    return ChatSession(choice=Choice(backend="local", fields={"temperature": 0, "max_tokens": 12}))


def says(*texts: str) -> list[Any]:
    """A whole answer in pieces."""
    usage = {"prompt_tokens": 30, "completion_tokens": len(texts)}
    end = frame({"response": "", "usage": usage, "finish_reason": "stop"})
    return [head(), *(frame({"response": text}) for text in texts), end, frame("[DONE]")]


def fails(code: int, message: str, status: str = "400 Bad Request") -> list[Any]:
    return body({"errors": [{"message": message, "code": code}], "success": False}, status)


def too_long(tokens: int, limit: int) -> list[Any]:
    """A refusal as Cloudflare words it."""
    told = (
        f"The estimated number of input and maximum output tokens ({tokens}) exceeded this model context window "
        f"limit ({limit})."
    )
    return fails(5021, f"AiError: {told}", "413 Too Large")
