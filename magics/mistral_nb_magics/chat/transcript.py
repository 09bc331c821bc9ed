"""The transcript under a chat, which a saved notebook shows where the chat itself cannot be."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from IPython.core.displaypub import CapturingDisplayPublisher

from mistral_nb.chat import Conversation, Turn
from mistral_nb.chat.references import own_references
from mistral_nb.safe_markdown import literal, plain_text, safe_markdown
from mistral_nb_magics.chat.projection import shown

__all__ = ["MARK", "Transcript", "bundle", "metadata"]

MARK = "mistral-nb-transcript"
"""The fragment of the link in its first line: by that the live chat finds it, and hides it."""

MAX_PLAIN = 2_000
"""Characters of its plain form, which few front ends show: its end, where it is longer."""


class Transcript:
    """The outputs that hold the transcript; each has a display id, since a chat may be shown in several places."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._publisher: Any = None
        self._ids: list[str] = []
        self._last: dict[str, str] | None = None
        self._written: dict[str, tuple[Turn, str]] = {}
        self._lock = threading.RLock()

    def show(self, publisher: Any) -> None:
        """Put one more below; `publisher` is the shell's display publisher."""
        with self._lock:
            display_id = uuid.uuid4().hex
            self._ids.append(display_id)
            self._last = self.bundle()
            if not isinstance(publisher, CapturingDisplayPublisher):  # `%%capture` only keeps what it gets
                self._publisher = publisher
            publisher.publish(data=self._last, metadata=metadata(), transient={"display_id": display_id})

    def update(self) -> dict[str, str] | None:
        """Write what has changed into all of them. Returns it; None where nothing has."""
        with self._lock:
            now = self.bundle()
            if now == self._last:
                return None
            self._last = now
            for display_id in self._ids if self._publisher is not None else ():
                transient = {"display_id": display_id}
                self._publisher.publish(data=now, metadata=metadata(), transient=transient, update=True)
            return now

    def bundle(self) -> dict[str, str]:
        """As `bundle`, with the turns that have not changed as they were written before."""
        with self._lock:
            before, self._written = self._written, {}
            return bundle(self._conversation, lambda turn: self._write(turn, before))

    def _write(self, turn: Turn, before: Mapping[str, tuple[Turn, str]]) -> str:
        same, text = before.get(turn.id, (None, ""))
        self._written[turn.id] = (turn, text if same is turn else _markdown(turn))
        return self._written[turn.id][1]


def metadata() -> dict[str, Any]:
    return {"mistral_nb": {"transcript": True}}


def bundle(conversation: Conversation, write: Callable[[Turn], str] | None = None) -> dict[str, str]:
    """The path that is shown, with what is compared, as Markdown that holds nothing that acts, and as plain text."""
    turns = shown(conversation)
    plain = "\n\n".join(map(_plain, turns)) or "(a chat in which nothing was asked yet)"
    texts = {
        "text/markdown": "\n\n".join([f"[Transcript of a chat](#{MARK})", *map(write or _markdown, turns)]),
        "text/plain": plain if len(plain) <= MAX_PLAIN else f"(the end of a longer chat)\n{plain[-MAX_PLAIN:]}",
    }
    return {kind: text.encode("utf-8", "replace").decode() for kind, text in texts.items()}


def _markdown(turn: Turn) -> str:
    question = "\n".join(f"> {literal(line)}  " for line in plain_text(turn.prompt).split("\n"))
    error = f"**{literal(turn.error)}**" if turn.error else ""
    footer = f"<small>{literal(_footer(turn))}</small>" if _footer(turn) else ""
    return "\n\n".join(part for part in ("**You**", question, _answer(turn), error, footer) if part)


def _answer(turn: Turn) -> str:
    if turn.answer.strip():
        return safe_markdown(own_references(plain_text(turn.answer), turn.id))
    return "*(the answer is being written)*" if turn.running else "*(no answer)*"


def _plain(turn: Turn) -> str:
    answer = plain_text(turn.answer).strip("\n") or ("(the answer is being written)" if turn.running else "(no answer)")
    parts = (f"You: {plain_text(turn.prompt)}", answer, turn.error and plain_text(turn.error), _footer(turn))
    return "\n\n".join(part for part in parts if part)


def _footer(turn: Turn) -> str:
    names = ", ".join(each.name for each in turn.attachments)
    return plain_text(" · ".join(part for part in (turn.footer, f"attached: {names}" if names else "") if part))
