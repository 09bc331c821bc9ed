"""What a conversation is made of: a turn (a question and its answer), who was to answer it, and what was attached."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from mistral_nb.errors import InvalidRequest, MistralError
from mistral_nb.safe_markdown import fenced
from mistral_nb.types import FIELDS, FinishReason, GenerationRequest, Message

__all__ = ["CHAT_FIELDS", "Attachment", "ChatBusy", "ChatError", "Choice", "Turn", "compose", "new_id", "now"]

AttachmentKind = Literal["variable", "cell", "error"]
_NOT_IN_A_CHAT = {
    "prompt": "is what the chat is asked; a choice holds how to answer",
    "messages": "are the chat's own",
    "raw": "does not go with a conversation",
    "stream": "is always on in a chat",
    "functions": "are not run by a chat; use ask(..., call=True)",
}
CHAT_FIELDS = tuple(known for known in FIELDS if known.name not in _NOT_IN_A_CHAT)


class ChatError(MistralError):
    """A conversation has no such turn, or cannot be read or written."""


class ChatBusy(ChatError):
    """An answer is still being written."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """What goes with a question: a variable's value, a cell's source or an error, as text, and what it is called."""

    kind: AttachmentKind
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers and how. None and "" leave it to the settings; `fields` are those of `CHAT_FIELDS`, by name.

    Raises `InvalidRequest` naming the field. A field that is None is unset.
    """

    backend: str | None = None
    model: str | None = None
    system: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("backend", "model", "system"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidRequest(name, value, "must be a text")
            object.__setattr__(self, name, value if value and value.strip() else None)
        if self.system is not None:
            Message("system", self.system)
        if not isinstance(self.fields, Mapping):
            raise InvalidRequest("fields", self.fields, "must be a mapping of names to values")
        given = {name: value for name, value in self.fields.items() if value is not None}
        for name in given:
            if name in _NOT_IN_A_CHAT:
                raise InvalidRequest(name, given[name], _NOT_IN_A_CHAT[name])
        checked = GenerationRequest.from_dict({**given, "prompt": "."})
        object.__setattr__(self, "fields", {name: getattr(checked, name) for name in given})

    def with_fields(self, **fields: Any) -> Choice:
        """The same with some fields changed; None takes one away."""
        return replace(self, fields={**self.fields, **fields})


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. `parent` is the turn before: turns of one parent are branches of each other.

    `sent` is the prompt as it was sent, where that is not `prompt` itself: with the values and the attachments put in.
    `finish_reason` is None while the answer is being written; `error` is the message of what ended it early. `footer`
    and `served` are the `Result`'s footer and metadata. `left_out` counts the oldest turns that did not fit in the
    context. Turns of one `group` are one comparison: the same question to several. `asked_at` is ISO 8601, in UTC.
    """

    id: str
    parent: str | None
    prompt: str
    choice: Choice = field(default_factory=Choice)
    sent: str | None = None
    attachments: tuple[Attachment, ...] = ()
    answer: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    footer: str = ""
    served: Mapping[str, Any] | None = field(default=None, hash=False)
    left_out: int = 0
    group: str | None = None
    asked_at: str = ""

    @property
    def running(self) -> bool:
        return self.finish_reason is None

    @property
    def question(self) -> str:
        """What the model was asked."""
        return self.prompt if self.sent is None else self.sent


def new_id() -> str:
    """For a turn or a group: short, of letters and digits, the same nowhere else."""
    return secrets.token_hex(8)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_TITLES = {"variable": "The variable", "cell": "The cell", "error": "The error"}
_LANGUAGES = {"cell": "python"}


def compose(text: str, attachments: Iterable[Attachment]) -> str:
    """The question with its attachments under it, each in a fence that its own text cannot close."""
    parts = [text]
    for each in attachments:
        body = fenced(each.text.rstrip("\n"), _LANGUAGES.get(each.kind, ""))
        parts.append(f"{_TITLES[each.kind]} {each.name}:\n{body}")
    return "\n\n".join(part for part in parts if part.strip())
