"""The chat formats of Mistral-7B-Instruct, part by part as mistral-common encodes them.

v1 (v0.1 and v0.2) writes its marks as text; in v3 (v0.3) they are control tokens:

    v1   <s> "[INST] system\\n\\nuser [/INST]" "assistant" </s> "[INST] user [/INST]"
    v3   <s> [INST] "user" [/INST] "assistant" </s> [INST] "system\\n\\nuser" [/INST]

The system text goes before the first user turn in v1, and before the last one in v3. Neighbouring turns of one role
are joined with a blank line. Each part is tokenised by itself.

v1 has functions in its text (`engine.functions`). v3 has tokens for them: the functions stand before the last user
turn, and an assistant turn that is a JSON list of calls is one of calls where a result follows it. Calls get numbers,
`call00000` and so on, and a result is for the first open call by its name, else for the first open one:

    v3   [AVAILABLE_TOOLS] "[{"type": "function", "function": {...}}]" [/AVAILABLE_TOOLS] [INST] "user" [/INST]
         [TOOL_CALLS] "[{"name": ..., "arguments": {...}, "id": ...}]" </s>
         [TOOL_RESULTS] "{"content": ..., "call_id": ...}" [/TOOL_RESULTS]
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mistral_nb.engine.functions import NOTHING, Offer, as_json, in_words
from mistral_nb.errors import InvalidRequest
from mistral_nb.functions import parse_calls
from mistral_nb.types import Message

__all__ = ["BEGIN_INST", "BOS", "EOS", "TOOL_CALLS", "Control", "MistralFormat", "Part", "refuse_turn"]


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, by the text that it is shown as."""

    token: str


Part = str | Control
"""A piece of a prompt: user-side text, in which nothing is a control token, or one control token."""

BOS, EOS = Control("<s>"), Control("</s>")
BEGIN_INST, END_INST = Control("[INST]"), Control("[/INST]")
BEGIN_TOOLS, END_TOOLS = Control("[AVAILABLE_TOOLS]"), Control("[/AVAILABLE_TOOLS]")
BEGIN_RESULTS, END_RESULTS = Control("[TOOL_RESULTS]"), Control("[/TOOL_RESULTS]")
TOOL_CALLS = Control("[TOOL_CALLS]")
_BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class MistralFormat:
    """v1 or v3. Takes and refuses the conversations that mistral-common takes and refuses.

    It also takes tool turns that do not follow calls, or not as many as there were calls.
    """

    version: Literal["v1", "v3"]

    @property
    def call_token(self) -> Control | None:
        return TOOL_CALLS if self.version == "v3" else None

    def parts(self, messages: Sequence[Message], offer: Offer = NOTHING) -> list[Part]:
        """The prompt up to where the assistant's answer begins. `InvalidRequest` names the turn that is wrong."""
        _check(messages)
        if self.version == "v1":
            messages, offer = in_words(messages, offer), NOTHING
        system = _join([message.content for message in messages if message.role == "system"])
        turns = _turns(messages)
        users = [index for index, (kind, _) in enumerate(turns) if kind == "user"]
        with_system = users[0] if self.version == "v1" else users[-1]
        parts: list[Part] = [BOS]
        for index, (kind, text) in enumerate(turns):
            match kind:
                case "user":
                    if offer.tools and index == users[-1]:
                        parts += [BEGIN_TOOLS, _described(offer), END_TOOLS]
                    parts += self._user(f"{system}{_BLANK_LINE}{text}" if system and index == with_system else text)
                case "calls":
                    parts += [TOOL_CALLS, text, EOS]
                case "tool":
                    parts += [BEGIN_RESULTS, text, END_RESULTS]
                case "assistant":
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


def _turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """What is not a system turn as (kind, text), the first of them a user's, which is empty if need be."""
    turns: list[tuple[str, str]] = []
    ledger = _Ledger()
    for kind, group in itertools.groupby(range(len(messages)), key=lambda index: _kind(messages, index)):
        same = [messages[index] for index in group]
        if kind == "calls":
            turns += [(kind, ledger.calls(message)) for message in same]
        elif kind == "tool":
            turns += [(kind, ledger.result(message)) for message in same]
        elif kind != "system":
            turns.append((kind, _join([message.content for message in same])))
    return turns if turns and turns[0][0] == "user" else [("user", ""), *turns]


def _kind(messages: Sequence[Message], index: int) -> str:
    role = messages[index].role
    answered = role == "assistant" and index + 1 < len(messages) and messages[index + 1].role == "tool"
    return "calls" if answered and parse_calls(messages[index].content) else role


class _Ledger:
    """Numbers the calls of a conversation, and finds which call a result is for."""

    def __init__(self) -> None:
        self._count = 0
        self._open: list[dict[str, Any]] = []

    def calls(self, message: Message) -> str:
        numbered = [{**call, "id": self._number()} for call in parse_calls(message.content) or ()]
        self._open += numbered
        return json.dumps(numbered, ensure_ascii=False)

    def result(self, message: Message) -> str:
        named = [call for call in self._open if call["name"] == message.name]
        call = next(iter(named or self._open), None)
        if call is not None:
            self._open.remove(call)
        number = self._number() if call is None else call["id"]
        return json.dumps({"content": as_json(message.content or "{}"), "call_id": number}, ensure_ascii=False)

    def _number(self) -> str:
        """Nine letters and digits, as v3 wants them."""
        self._count += 1
        return f"call{self._count - 1:05}"


def _described(offer: Offer) -> str:
    return json.dumps([{"type": "function", "function": tool.to_dict()} for tool in offer.tools], ensure_ascii=False)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("messages", [], "must hold at least one turn")
    for index, message in enumerate(messages):
        if message.role == "assistant" and not message.content:
            raise refuse_turn(messages, index, "an assistant turn must not be empty")
        before = messages[index - 1].role if index else ""
        if message.role == "system" and before in ("assistant", "tool"):
            name = "an assistant turn" if before == "assistant" else "a tool turn"
            raise refuse_turn(messages, index, f"a system turn must not follow {name}")
    if messages[-1].role == "assistant":
        raise refuse_turn(messages, len(messages) - 1, "the last turn must be the user's, for the model to answer it")


def refuse_turn(messages: Sequence[Message], index: int, problem: str) -> InvalidRequest:
    """An error that names the turn by its number, counted from 1, and its role."""
    return InvalidRequest("messages", f"turn {index + 1} of {len(messages)} ({messages[index].role})", problem)
