"""Functions in a prompt, against mistral-common where the format has tokens for them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.engine.functions import NOTHING, Offer, in_words
from mistral_nb.engine.tokenizer import Tokenizer
from mistral_nb.errors import InvalidRequest
from mistral_nb.functions import parse_calls
from mistral_nb.types import Function, Message

FORECAST = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "größe 😀"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ADD = Function("add", 'def add(a: int, b: int = 1):\n    "Adds."')


def turn(role: str, content: Any, name: str | None = None) -> Message:
    return Message(role, content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), name)


CALLS = [{"name": "add", "arguments": {"a": 1}}, {"name": "say", "arguments": {"s": "ü 😀"}}]
HISTORY = [
    turn("system", "Be terse."),
    turn("user", "one"),
    turn("assistant", CALLS),
    turn("tool", "said", "say"),
    turn("tool", {"sum": 3}, "add"),
    turn("assistant", "It is 3. "),
    turn("user", "two"),
    turn("assistant", CALLS[:1]),
    turn("tool", "", "add"),
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": FORECAST}}]


def theirs(messages: list[Message], numbers: dict[int, str]) -> list[int]:
    """mistral-common's ids. `numbers` are the ids of the calls that tool turns answer, by the turn's index."""
    count, turns = 0, []
    for index, message in enumerate(messages):
        data: dict[str, Any] = message.to_dict()
        if index in numbers:
            data["tool_call_id"] = numbers[index]
        if calls := parse_calls(message.content):
            data = {"role": "assistant", "tool_calls": []}
            for call in calls:
                function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
                data["tool_calls"].append({"id": f"call{count:05}", "function": function})
                count += 1
        turns.append(data)
    request = ChatCompletionRequest(messages=turns, tools=TOOLS)
    return MistralTokenizer.v3(is_tekken=False).encode_chat_completion(request).tokens


@pytest.mark.parametrize("kind", ["v3", "v3-json"])
@pytest.mark.parametrize("length", [2, 5, 7, 9])
def test_v3_ids_equal_mistral_common(mistral: dict[str, Tokenizer], kind: str, length: int) -> None:
    functions = [Function("add", json.dumps({"description": "Adds.", "parameters": FORECAST}))]
    numbers = {3: "call00001", 4: "call00000", 8: "call00002"}
    ids = mistral[kind].encode_chat(HISTORY[:length], functions)
    assert ids == theirs(HISTORY[:length], numbers)
    shown = mistral[kind].render_chat(HISTORY[:length], functions)
    assert mistral[kind].encode_raw(shown) == ids


def test_v3_takes_results_that_no_call_asked_for(mistral: dict[str, Tokenizer]) -> None:
    shown = mistral["v3"].render_chat([turn("user", "a"), turn("tool", "1"), turn("assistant", "b"), turn("tool", "c")])
    assert shown == (
        '<s>[INST] a[/INST][TOOL_RESULTS] {"content": 1, "call_id": "call00000"}[/TOOL_RESULTS] b</s>'
        '[TOOL_RESULTS] {"content": "c", "call_id": "call00001"}[/TOOL_RESULTS]'
    )


TOLD = """You can call functions. Each line describes one, with its parameters as a JSON schema:
{"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, \
"b": {"type": "integer", "default": 1}}, "required": ["a"], "additionalProperties": false}}

To call functions, answer with a JSON list of the calls and nothing else:
[{"name": "NAME", "arguments": {...}}]
The results come in the next turn. Where no function helps, answer in plain words."""
RESULTS = 'Results of the functions:\n{"name": "say", "content": "said"}\n{"name": "add", "content": {"sum": 3}}'


def test_the_form_in_words() -> None:
    offer = Offer.of([ADD])
    assert in_words([turn("user", "Hi")], offer) == [turn("user", f"{TOLD}\n\nHi")]
    told = in_words(HISTORY[:5], offer)
    assert told == [
        turn("system", f"Be terse.\n\n{TOLD}"),
        turn("user", "one"),
        turn("assistant", CALLS),
        turn("user", RESULTS),
    ]
    assert in_words([*HISTORY[:5], turn("user", "So?")], NOTHING)[-1] == turn("user", f"{RESULTS}\n\nSo?")
    alone = in_words([turn("user", "a"), turn("tool", "NaN", "f")], NOTHING)
    assert alone == [turn("user", 'a\n\nResults of the functions:\n{"name": "f", "content": "NaN"}')]
    assert in_words([turn("assistant", "x")], offer)[0] == turn("user", TOLD)


def test_the_last_words_follow_the_choice() -> None:
    def last(choice: str) -> str:
        return in_words([turn("user", "Hi")], Offer.of([ADD], choice))[0].content.split("next turn. ")[-1]

    assert last("required") == "Call at least one now.\n\nHi"
    assert last("add") == "Call add now.\n\nHi"
    assert in_words([turn("user", "Hi")], Offer.of([ADD], "none")) == [turn("user", "Hi")]


def test_a_template_and_v1_are_told_in_words(smol: Tokenizer, mistral: dict[str, Tokenizer]) -> None:
    words = in_words(HISTORY, Offer.of([ADD]))
    for tokenizer in (smol, mistral["v1"], mistral["v1-json"]):
        assert tokenizer.encode_chat(HISTORY, [ADD]) == tokenizer.encode_chat(words)
        assert tokenizer.render_chat(HISTORY, [ADD]) == tokenizer.render_chat(words)


def test_what_cannot_be_offered(smol: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"tool_choice = 'sub'.*auto, none, required, or one of add"):
        smol.encode_chat([turn("user", "Hi")], [ADD], "sub")
    with pytest.raises(InvalidRequest, match=r"tool_choice = 'required'.*needs functions"):
        smol.encode_chat([turn("user", "Hi")], None, "required")
    with pytest.raises(InvalidRequest, match=r"functions\[0\]"):
        smol.encode_chat([turn("user", "Hi")], [Function("f", "[]")], "none")
    long = Function("long", json.dumps({"description": "x" * 130_000}))
    with pytest.raises(InvalidRequest, match=r"functions = '\d+ characters'.*shorten"):
        smol.encode_chat([turn("user", "y" * 3000)], [long])
