"""What the user does in a chat's view, done: messages from the page are checked here, and each is answered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from IPython.core.error import UsageError

from mistral_nb.chat import Attachment, ChatError, ChatSession, Choice, presets
from mistral_nb.errors import MistralError
from mistral_nb.types import MAX_TEXT
from mistral_nb_magics.chat.attach import attach, candidates
from mistral_nb_magics.interpolate import interpolate

__all__ = ["Desk", "Screen"]

_LOG = logging.getLogger(__name__)

MAX_ATTACHMENTS = 20
MAX_ERROR = 2_000
"""Characters of what a page is told of an error; the message may name a value of any size."""

BRACES = "--no-interpolate leaves braces as they are"
ESCAPE = "\\{{name}} leaves braces as they are"
EXPORTS = {"md": ("chat.md", "text/markdown"), "json": ("chat.json", "application/json")}

Message = Mapping[str, Any]


class Screen(Protocol):
    """Where a chat is shown: what a message can change besides the conversation."""

    def put(self, message: Message) -> None:
        """Send a message, after those that were put before."""

    def choose(self, choice: Choice) -> None:
        """Show another choice of who answers and how."""

    def open_panel(self, is_open: bool) -> None: ...

    def greeted(self, writes: bool) -> None:
        """A page has come; it can write into the notebook's file, or not."""


class Desk:
    """Does what a message says and puts the answer: "done" or "refused", or what was asked for, with the same "ref"."""

    def __init__(self, session: ChatSession, screen: Screen, namespace: Callable[[], Mapping[str, Any]]) -> None:
        self._session = session
        self._screen = screen
        self._namespace = namespace
        self._doings: dict[str, Callable[[Message], Message | None]] = {
            "hello": self._hello,
            "send": self._send,
            "edit": self._edit,
            "stop": lambda message: session.stop(_text(message, "id", "") or None),
            "regenerate": lambda message: _nothing(session.regenerate(_text(message, "id"))),
            "retry": lambda message: _nothing(session.retry(_text(message, "id"))),
            "delete": lambda message: session.conversation.delete(_text(message, "id")),
            "select": lambda message: session.conversation.select(_text(message, "id")),
            "clear": lambda message: session.conversation.clear(),
            "undo": lambda message: _nothing(session.conversation.undo()),
            "export": self._export,
            "text": lambda message: {"type": "text", "text": session.conversation.turn(_text(message, "id")).answer},
            "names": self._names,
            "panel": lambda message: screen.open_panel(message.get("open") is True),
            "preset": self._preset,
            "system": self._system,
        }

    def receive(self, message: Message) -> None:
        """Never raises: whatever goes wrong is told to the page."""
        kind = str(message["type"])
        try:
            if kind not in self._doings:
                raise ChatError(f"the chat's page asks for {kind[:40]!r}, which is not known here: reload the page")
            answer = self._doings[kind](message) or {"type": "done"}
        except (MistralError, UsageError) as error:
            answer = {"type": "refused", "error": str(error)[:MAX_ERROR].replace(BRACES, ESCAPE)}
        except Exception as error:  # in a comm's handler it would be seen by nobody
            _LOG.exception("a chat could not do %r", kind[:40])
            answer = {"type": "refused", "error": f"{type(error).__name__}: {error}"[:MAX_ERROR]}
        self._screen.put({**answer, "ref": _ref(message)})

    def _hello(self, message: Message) -> Message:
        self._screen.greeted(message.get("writes") is True)
        return {"type": "snapshot"}

    def _send(self, message: Message) -> None:
        text = _text(message, "text")
        attachments = self._attachments(message.get("attach") or [])
        self._session.send(
            text, sent=self._filled(text), attachments=attachments, compare=message.get("compare") is True
        )

    def _edit(self, message: Message) -> None:
        text = _text(message, "text")
        self._session.edit(_text(message, "id"), text, sent=self._filled(text))

    def _filled(self, text: str) -> str | None:
        """The text with the values of `{{names}}`, and `{{` for `\\{{`; None where it holds neither."""
        if len(text) > MAX_TEXT:
            return None
        namespace = self._namespace()
        filled = "{{".join(interpolate(part, namespace) for part in text.split("\\{{"))
        return filled if filled != text else None

    def _attachments(self, wanted: Any) -> tuple[Attachment, ...]:
        if not isinstance(wanted, list) or len(wanted) > MAX_ATTACHMENTS:
            raise ChatError(f"at most {MAX_ATTACHMENTS} things can be attached to one question")
        namespace = self._namespace()
        return tuple(attach(_text(each, "kind"), _text(each, "name"), namespace) for each in wanted)

    def _export(self, message: Message) -> Message | None:
        wanted = _text(message, "format")
        conversation = self._session.conversation
        if wanted == "cells":
            self._screen.put({"type": "cells", "cells": conversation.to_cells(), "ref": _ref(message)})
            return None
        if wanted not in EXPORTS:
            raise ChatError(f"a chat is exported as cells, {' or '.join(EXPORTS)}, and not as {wanted[:40]!r}")
        name, mime = EXPORTS[wanted]
        text = conversation.to_json() if wanted == "json" else conversation.to_markdown()
        self._screen.put({"type": "file", "name": name, "mime": mime, "text": text, "ref": _ref(message)})
        return None

    def _names(self, message: Message) -> Message:
        kinds = message.get("kinds") or []
        if not isinstance(kinds, list):
            raise ChatError("the chat's page sent no list of kinds: reload the page")
        found = candidates(_text(message, "prefix", ""), self._namespace(), [str(kind) for kind in kinds])
        return {
            "type": "names",
            "names": [{"kind": each.kind, "name": each.name, "detail": each.detail} for each in found],
        }

    def _preset(self, message: Message) -> None:
        name, known = _text(message, "name"), presets()
        if name not in known:
            raise ChatError(f"there is no preset {name[:40]!r}; there are {', '.join(known)}")
        self._screen.choose(known[name].applied(self._session.choice))

    def _system(self, message: Message) -> None:
        old = self._session.choice
        self._screen.choose(Choice(old.backend, old.model, _text(message, "text", ""), old.fields))


def _ref(message: Message) -> Any:
    """By what the page knows its question again."""
    ref = message.get("ref")
    return ref if isinstance(ref, int | float) or (isinstance(ref, str) and len(ref) <= 100) else None


def _text(message: Any, key: str, default: str | None = None) -> str:
    value = message.get(key, default) if isinstance(message, Mapping) else None
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ChatError(f"the chat's page sent no text as {key!r}: reload the page")
    return value


def _nothing(_value: object) -> None:
    return None
