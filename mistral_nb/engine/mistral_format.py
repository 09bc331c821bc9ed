"""The chat formats of Mistral-7B-Instruct, part by part as mistral-common encodes them.

v1 (v0.1 and v0.2) writes its marks as text; in v3 (v0.3) they are control tokens:

    v1   <s> "[INST] system\\n\\nuser [/INST]" "assistant" </s> "[INST] user [/INST]"
    v3   <s> [INST] "user" [/INST] "assistant" </s> [INST] "system\\n\\nuser" [/INST]

The system text goes before the first user turn in v1, and before the last one in v3. Neighbouring turns of one role
are joined with a blank line. Each part is tokenised by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mistral_nb.errors import InvalidRequest
from mistral_nb.types import Message

__all__ = ["BEGIN_INST", "BOS", "EOS", "Control", "MistralFormat", "Part", "refuse_turn"]


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, by the text that it is shown as."""

    token: str


Part = str | Control
"""A piece of a prompt: user-side text, in which nothing is a control token, or one control token."""

BOS, EOS = Control("<s>"), Control("</s>")
BEGIN_INST, END_INST = Control("[INST]"), Control("[/INST]")
_BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """v1 or v3. Takes and refuses the conversations that mistral-common takes and refuses; tool turns are refused."""

    version: Literal["v1", "v3"]

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The prompt up to where the assistant's answer begins. `InvalidRequest` names the turn that is wrong."""
        _check(messages)
        system = _join([message.content for message in messages if message.role == "system"])
        turns = _merge(messages)
        users = [index for index, (role, _) in enumerate(turns) if role == "user"]
        with_system = users[0] if self.version == "v1" else users[-1]
        parts: list[Part] = [BOS]
        for index, (role, text) in enumerate(turns):
            if role == "user":
                parts += self._user(f"{system}{_BLANK_LINE}{text}" if system and index == with_system else text)
            else:
                parts += [text if self.version == "v1" else text.rstrip(" "), EOS]
        return parts

    def _user(self, text: str) -> list[Part]:
        return [f"[INST] {text} [/INST]"] if self.version == "v1" else [BEGIN_INST, text, END_INST]

    def render(self, parts: Sequence[Part]) -> str:
        """The parts as one text, which as a raw prompt gives the same ids unless a part holds a control token."""
        text = ""
        for part in parts:
            if isinstance(part, Control):
                text += part.token
            elif part:
                text += part if text.endswith((BOS.token, EOS.token)) else f" {part}"
        return text


def _join(texts: Sequence[str]) -> str:
    return _BLANK_LINE.join(text for text in texts if text)


def _merge(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """User and assistant turns as (role, text), the first of them a user's, which is empty if need be."""
    turns = [
        (role, _join([message.content for message in group]))
        for role, group in itertools.groupby(messages, key=lambda message: message.role)
        if role != "system"
    ]
    return turns if turns and turns[0][0] == "user" else [("user", ""), *turns]


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("messages", [], "must hold at least one turn")
    for index, message in enumerate(messages):
        if message.role == "tool":
            raise refuse_turn(messages, index, "this model's chat format takes no tool turns")
        if message.role == "assistant" and not message.content:
            raise refuse_turn(messages, index, "an assistant turn must not be empty")
        if message.role == "system" and index and messages[index - 1].role == "assistant":
            raise refuse_turn(messages, index, "a system turn must not follow an assistant turn")
    if messages[-1].role == "assistant":
        raise refuse_turn(messages, len(messages) - 1, "the last turn must be the user's, for the model to answer it")


def refuse_turn(messages: Sequence[Message], index: int, problem: str) -> InvalidRequest:
    """An error that names the turn by its number, counted from 1, and its role."""
    return InvalidRequest("messages", f"turn {index + 1} of {len(messages)} ({messages[index].role})", problem)
