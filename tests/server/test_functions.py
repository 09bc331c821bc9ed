"""Calls taken out of an answer's text, and answers of the embedded model where functions are offered."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.engine import Engine
from mistral_nb.engine.tokenizer import load_tokenizer
from mistral_nb.errors import InvalidRequest
from mistral_nb.server.calls import CallScanner
from mistral_nb.server.generation import Model, Piece
from mistral_nb.types import Function, GenerationRequest, Message, Usage
from tests.server.engines import EngineUnderTest, frames

WEATHER = Function("weather", 'def weather(city: str, days: int):\n    "The weather."')
EXAMPLE = '[{"name": "weather", "arguments": {"city": "Rome", "days": 2}}]'
CALL = {"name": "weather", "arguments": {"city": "Köln", "days": 3}}
# The embedded model, which was not trained for calls, imitates the one that it sees.
CHAT = (
    Message("user", "Weather in Rome for 2 days?"),
    Message("assistant", EXAMPLE),
    Message("user", "Weather in Köln for 3 days?"),
)

Scanned = tuple[str, str, tuple[dict[str, Any], ...]]


def scan(pieces: list[str]) -> Scanned:
    """What was passed on at once, the rest, and the calls."""
    scanner = CallScanner()
    return "".join(scanner.push(piece) for piece in pieces), *scanner.finish()


SPACED = '\n [ {\t"name" : "f" ,\r\n "arguments": {"a": "]}[{"}} ]'
TEXTS: list[tuple[str, Scanned]] = [
    (SPACED, ("", "", ({"name": "f", "arguments": {"a": "]}[{"}},))),
    ('[{"name":"f","argum', ("", '[{"name":"f","argum', ())),
    ('[{"name":1}] x', ("", '[{"name":1}] x', ())),
    (' [{"na', ("", ' [{"na', ())),
    ("", ("", "", ())),
    ('[{"named": 1}]', ('[{"named": 1}]', "", ())),
    ('[{"n ame": 1}]', ('[{"n ame": 1}]', "", ())),
    ("[1] " + SPACED, ("[1] " + SPACED, "", ())),
    ("日本", ("日本", "", ())),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS, ids=range(len(TEXTS)))
def test_however_the_text_is_cut(text: str, expected: Scanned) -> None:
    cuts = [(), tuple(range(len(text))), *itertools.combinations(range(len(text)), 2)]
    for places in cuts:
        assert scan([text[start:end] for start, end in itertools.pairwise((0, *places, len(text)))]) == expected


def test_text_is_held_back_only_while_it_may_become_calls() -> None:
    scanner = CallScanner()
    assert scanner.push('[{"na') == ""
    assert scanner.push("mes") == '[{"names'
    assert scanner.push('[{"name":') == '[{"name":'


@pytest.fixture(scope="module")
def model(embedded: Path) -> Iterator[Model]:
    model = Model(Engine.load(embedded), load_tokenizer(embedded))
    yield model
    model.engine.close()


async def _pieces(model: Model, request: GenerationRequest, choice: str) -> list[Piece]:
    answer = await model.start(request, choice)
    return [piece async for piece in answer.pieces()]


def ask(model: Model, choice: str = "auto", **fields: Any) -> list[Piece]:
    given = {"messages": CHAT, "functions": (WEATHER,), "temperature": 0, "max_tokens": 60, **fields}
    return asyncio.run(_pieces(model, GenerationRequest(**given), choice))


def test_a_call_is_not_sent_as_text(model: Model) -> None:
    (only,) = ask(model)
    assert only == Piece("", "tool_calls", only.usage, (CALL,))
    assert only.usage is not None
    assert only.usage.completion_tokens > 20


def test_half_a_call_is_text(model: Model) -> None:
    (only,) = ask(model, max_tokens=15)
    assert (only.finish_reason, only.tool_calls) == ("length", ())
    assert only.text.startswith('[{"name": "weather", "arguments": {"city": "K')
    (whole,) = ask(model)
    assert whole.usage is not None
    (exact,) = ask(model, max_tokens=whole.usage.completion_tokens)
    assert (exact.finish_reason, exact.tool_calls) == ("tool_calls", (CALL,))


def test_stop_texts_end_free_text_only(model: Model) -> None:
    assert ask(model, stop=("arguments", "}"))[-1].tool_calls == (CALL,)
    answers = [ask(model, "none", stop=("arguments", "}")) for _ in range(3)]
    for free in answers:
        assert free[-1].finish_reason == "stop"
        assert "".join(piece.text for piece in free) == '[{"name": "weather", "'
    assert max(map(len, answers)) > 1, "a reader that stands still gets one piece"


def test_after_a_result_the_model_answers_in_words(model: Model) -> None:
    turns = (*CHAT[:2], Message("tool", '"sunny"', "weather"))
    pieces = ask(model, messages=turns, max_tokens=12)
    assert not any(piece.tool_calls for piece in pieces)
    assert "".join(piece.text for piece in pieces)


def test_a_choice(model: Model) -> None:
    other = Function("add", json.dumps({"properties": {"a": {"enum": [1]}}, "required": ["a"]}))
    (only,) = ask(model, "add", functions=(WEATHER, other))
    assert only.tool_calls == ({"name": "add", "arguments": {"a": 1}},)
    with pytest.raises(InvalidRequest, match="tool_choice"):
        ask(model, "sub")
    with pytest.raises(InvalidRequest, match=r"functions\[1\] = 'bad'.*Invalid type"):
        ask(model, functions=(WEATHER, Function("bad", '{"properties": {"a": {"type": "strin"}}}')))


def test_the_prompt_that_is_shown_is_the_one_that_is_used(model: Model) -> None:
    request = GenerationRequest(messages=CHAT, functions=(WEATHER,), max_tokens=1)
    shown = model.prompt(request)
    assert "You can call functions." in shown.text
    assert model.tokenizer.encode_raw(shown.text) == shown.ids
    assert model.prompt(request, "none").text == model.prompt(request.with_(functions=None)).text
    usage = ask(model, max_tokens=1)[-1].usage
    assert usage == Usage(len(shown.ids), 1)


BODY = {
    "messages": [message.to_dict() for message in CHAT],
    "functions": [{"name": WEATHER.name, "code": WEATHER.code}],
    "temperature": 0,
}


def test_on_the_wire(engine: EngineUnderTest) -> None:
    result = engine.post(BODY).json()["result"]
    assert (result["tool_calls"], result["response"], result["finish_reason"]) == ([CALL], "", "tool_calls")
    *sent, done = frames(engine.post({**BODY, "stream": True}))
    assert done == "[DONE]"
    assert [json.loads(frame).get("tool_calls") for frame in sent] == [[CALL]]
    tokens = engine.client.post("/engine/tokenize", json=BODY).json()
    assert tokens["count"] == result["usage"]["prompt_tokens"]
    assert WEATHER.name in tokens["prompt"]


def test_a_bad_function_on_the_wire(engine: EngineUnderTest) -> None:
    answer = engine.post({**BODY, "functions": [{"name": "f", "code": '{"type": "objekt"}'}]})
    assert answer.status_code == 400
    (error,) = answer.json()["errors"]
    assert error["code"] == 5006
    assert "functions[0]" in error["message"]


def test_code_on_the_wire_is_never_run(engine: EngineUnderTest, tmp_path: Path) -> None:
    harm = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    code = f"import os\n{harm}\n@{harm}\ndef f(a: ({harm}) = {harm}):\n    {harm}\n"
    body = {**BODY, "functions": [{"name": "f", "code": code}], "max_tokens": 1}
    assert engine.post(body).status_code == 200
    assert not list(tmp_path.iterdir())
