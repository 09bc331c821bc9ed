"""Functions in the text of a prompt, for chat formats that have no tokens of their own for them.

The functions stand at the end of the system turn, or before the first user turn where there is none:

    You can call functions. Each line describes one, with its parameters as a JSON schema:
    {"name": "add", "description": "Adds.", "parameters": {...}}

    To call functions, answer with a JSON list of the calls and nothing else:
    [{"name": "NAME", "arguments": {...}}]
    The results come in the next turn. Where no function helps, answer in plain words.

Calls in the conversation are the assistant's turns as they are, on a line of their own below what was said before them;
results are a user's turn:

    Results of the functions:
    {"name": "add", "content": 3}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mistral_nb.errors import InvalidRequest
from mistral_nb.functions import Tool, tools_of
from mistral_nb.types import MAX_TEXT, Function, Message

__all__ = ["NOTHING", "Offer", "as_json", "in_words"]

MODES = ("auto", "none", "required")

_INTRODUCTION = "You can call functions. Each line describes one, with its parameters as a JSON schema:"
_FORM = """To call functions, answer with a JSON list of the calls and nothing else:
[{"name": "NAME", "arguments": {...}}]
The results come in the next turn. """
_BLANK_LINE = "\n\n"
_RESULTS = "Results of the functions:\n"


@dataclass(frozen=True, slots=True)
class Offer:
    """The functions that the model is told of, whether it must call one, and whether it may call several.

    `choice` is `auto`, `required`, or the name of the one function that must be called, once.
    """

    tools: tuple[Tool, ...]
    choice: str = "auto"
    single: bool = False

    @classmethod
    def of(cls, functions: Sequence[Function] | None, choice: str = "auto", *, single: bool = False) -> Offer:
        """Raises `InvalidRequest` for a function that cannot be offered, and for a choice that is none.

        `none` offers nothing, once the functions have been read.
        """
        tools = tools_of(functions or ())
        if choice not in ("auto", "none") and not tools:
            raise InvalidRequest("tool_choice", choice, "needs functions to choose from; send functions too")
        if choice not in MODES and all(tool.name != choice for tool in tools):
            names = ", ".join(tool.name for tool in tools)
            raise InvalidRequest("tool_choice", choice, f"must be {', '.join(MODES)}, or one of {names}")
        return NOTHING if choice == "none" else cls(tools, choice, single or choice not in MODES)


NOTHING = Offer(())


def in_words(messages: Sequence[Message], offer: Offer) -> list[Message]:
    """The conversation without tool turns, and with the functions in its text. See the top of this file."""
    turns: list[Message] = []
    for index, message in enumerate(messages):
        after_result = index > 0 and messages[index - 1].role == "tool"
        if message.role == "tool":
            result = json.dumps({"name": message.name, "content": as_json(message.content)}, ensure_ascii=False)
            _say(turns, f"\n{result}" if after_result else f"{_BLANK_LINE}{_RESULTS}{result}")
        elif message.role == "user" and after_result:
            _say(turns, f"{_BLANK_LINE}{message.content}")
        elif message.role == "assistant" and _follows(turns, messages[index + 1 : index + 2]):
            turns[-1] = _longer(turns[-1], f"{turns[-1].content}\n{message.content}")
        else:
            turns.append(message)
    return _with_functions(turns, offer) if offer.tools else turns


def _follows(turns: Sequence[Message], after: Sequence[Message]) -> bool:
    """Whether a turn stands between another of the assistant's and a result: templates want the roles to alternate."""
    return bool(turns and turns[-1].role == "assistant" and after and after[0].role == "tool")


def as_json(content: str) -> Any:
    """What a text says as JSON; the text itself where it is none, or none that can be written again."""
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return content
    return value


def _say(turns: list[Message], text: str) -> None:
    """More of the user's turn that is last, or a turn of its own: templates want the roles to alternate."""
    if turns and turns[-1].role == "user":
        turns[-1] = _longer(turns[-1], turns[-1].content + text)
    else:
        turns.append(_longer(Message("user", ""), text.lstrip("\n")))


def _with_functions(turns: list[Message], offer: Offer) -> list[Message]:
    described = "\n".join(json.dumps(tool.to_dict(), ensure_ascii=False) for tool in offer.tools)
    text = f"{_INTRODUCTION}\n{described}{_BLANK_LINE}{_FORM}{_last_words(offer)}"
    for role in ("system", "user"):
        for index, turn in enumerate(turns):
            if turn.role == role:
                parts = [turn.content, text] if role == "system" else [text, turn.content]
                joined = _BLANK_LINE.join(part for part in parts if part)
                return [*turns[:index], _longer(turn, joined), *turns[index + 1 :]]
    return [Message("user", text), *turns]


def _last_words(offer: Offer) -> str:
    if offer.choice == "auto":
        return "Where no function helps, answer in plain words."
    return "Call at least one now." if offer.choice == "required" else f"Call {offer.choice} now."


def _longer(turn: Message, content: str) -> Message:
    if len(content) > MAX_TEXT:
        problem = f"a turn holds at most {MAX_TEXT}, with the functions and their results in it; shorten them"
        raise InvalidRequest("functions", f"{len(content)} characters", problem)
    return replace(turn, content=content)
