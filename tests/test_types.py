"""The request and its table of fields."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from mistral_nb.errors import InvalidRequest
from mistral_nb.types import FIELDS, MAX_NAME, MAX_TEXT, Chunk, Function, GenerationRequest, Message, Usage

NUMBERS = [field for field in FIELDS if field.kind in ("int", "float")]


def request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "Hello", **fields})


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        request(**fields)
    return caught.value


def test_the_table_and_the_request_say_the_same() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(GenerationRequest)}
    assert {field.name: field.default for field in FIELDS} == defaults


def test_the_published_bounds() -> None:
    bounds = {field.name: (field.minimum, field.maximum) for field in NUMBERS}
    assert bounds["temperature"] == (0, 5)
    assert bounds["top_p"] == bounds["repetition_penalty"] == bounds["frequency_penalty"] == (0, 2)
    assert bounds["presence_penalty"] == (0, 2)
    assert bounds["top_k"] == (1, 50)
    assert bounds["seed"] == (1, 9_999_999_999)
    assert request().max_tokens == 256
    assert request().temperature == 0.6


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_numbers_are_bounded_inclusively_and_the_message_has_field_value_and_range(field: Any) -> None:
    for value in (field.minimum, field.maximum):
        assert getattr(request(**{field.name: value}), field.name) == value
    step = 1 if field.kind == "int" else 0.001
    for value in (field.minimum - step, field.maximum + step):
        error = refused(**{field.name: value})
        assert error.field == field.name
        assert str(error).startswith(f"{field.name} = {value!r}: ")
        assert field.bounds in str(error)


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
@pytest.mark.parametrize("value", [math.nan, math.inf, "1", True, [], 1j])
def test_numbers_are_numbers(field: Any, value: Any) -> None:
    assert refused(**{field.name: value}).field == field.name


@pytest.mark.parametrize("field", [field for field in NUMBERS if field.kind == "int"], ids=lambda field: field.name)
def test_whole_numbers_are_whole(field: Any) -> None:
    assert type(getattr(request(**{field.name: 3.0}), field.name)) is int
    assert "whole" in str(refused(**{field.name: 3.5}))


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
def test_an_empty_prompt_is_refused(prompt: str) -> None:
    assert "empty" in str(refused(prompt=prompt))


def test_a_prompt_has_a_longest_length_and_the_message_does_not_repeat_it() -> None:
    assert request(prompt="x" * MAX_TEXT).prompt
    message = str(refused(prompt="x" * (MAX_TEXT + 1)))
    assert str(MAX_TEXT) in message
    assert len(message) < 200
    with pytest.raises(InvalidRequest, match=str(MAX_TEXT)):
        Message("user", "x" * (MAX_TEXT + 1))


def test_exactly_one_of_prompt_and_messages() -> None:
    turn = Message("user", "Hello")
    assert "both" in str(refused(messages=[turn]))
    assert "neither" in str(refused(prompt=None))
    assert GenerationRequest(messages=(turn,)).messages == (turn,)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "at least one"),
        ("Hello", "must be a list"),
        ([{"role": "user"}], "lacks 'content'"),
        ([{"content": "Hi"}], "lacks 'role'"),
        ([{"role": "robot", "content": "Hi"}], "system, user, assistant, tool"),
        ([{"role": "user", "content": 5}], "must be a text"),
        ([{"role": "user", "content": "Hi", "mood": "good"}], "only role, content and name"),
        (["Hi"], "must be an object"),
    ],
)
def test_messages_are_checked(messages: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        GenerationRequest(messages=messages)


@pytest.mark.parametrize(
    "functions", [[], "f", [{"name": "f"}], [{"name": "f", "code": 1}], [{"name": "f", "code": "", "more": 1}]]
)
def test_functions_are_checked(functions: Any) -> None:
    assert refused(functions=functions).field == "functions"


@pytest.mark.parametrize(
    ("make", "field", "problem"),
    [
        (lambda text: Message("user", text), "content", ""),
        (lambda text: Message("user", "Hi", name=text), "name", ""),
        (lambda text: Function(text, ""), "functions", "the name "),
        (lambda text: Function("f", text), "functions", "the code "),
        (lambda text: request(prompt=text), "prompt", ""),
        (lambda text: request(lora=text), "lora", ""),
        (lambda text: request(stop=["a", text]), "stop", ""),
    ],
)
def test_every_text_can_be_encoded_and_is_bounded(make: Callable[[Any], object], field: str, problem: str) -> None:
    make("é🙂")
    for text, problems in (
        ("a\ud800", "holds a lone surrogate at character 1; remove it"),
        ("x" * (MAX_TEXT + 1), "must hold at most "),
        (5, "must be a "),
    ):
        with pytest.raises(InvalidRequest) as caught:
            make(text)
        assert caught.value.field == field
        assert caught.value.problem.startswith((problem + problems, "must be a list"))
        assert len(str(caught.value)) < 200


def test_names_are_short() -> None:
    name = "x" * MAX_NAME
    assert Message("user", "Hi", name).name == Function(name, "").name == name
    for make in (lambda: Message("user", "Hi", name + "x"), lambda: Function(name + "x", "")):
        with pytest.raises(InvalidRequest, match="must hold at most 1024 characters"):
            make()


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_the_last_turn_must_not_be_blank_if_it_is_the_users(blank: str) -> None:
    turns = [Message("user", blank), Message("assistant", "a")]
    with pytest.raises(InvalidRequest) as caught:
        GenerationRequest(messages=[*turns, Message("user", blank)])
    assert str(caught.value) == f"content = {blank!r}: must not be empty"
    for last in (Message("user", "b"), Message("assistant", blank), Message("system", blank), Message("tool", blank)):
        assert GenerationRequest(messages=[*turns, last]).messages == (*turns, last)


def test_functions_are_texts_and_nothing_else() -> None:
    made = request(functions=[{"name": "f", "code": "raise SystemExit"}])
    assert made.functions == (Function("f", "raise SystemExit"),)


@pytest.mark.parametrize("stop", [[], [""], ["a"] * 5, [1], 1])
def test_stops_are_one_to_four_texts(stop: Any) -> None:
    assert refused(stop=stop).field == "stop"


def test_one_stop_may_be_given_bare() -> None:
    assert request(stop="end").stop == ("end",)


def test_the_local_extensions_are_marked() -> None:
    assert {field.name for field in FIELDS if field.local_only} == {"stop", "lora_scale"}


def test_a_body_has_no_null_and_only_what_is_set() -> None:
    body = request(seed=3, lora="mine", stop=["a"]).to_dict()
    assert body == {
        "prompt": "Hello",
        "stream": True,
        "max_tokens": 256,
        "temperature": 0.6,
        "seed": 3,
        "lora": "mine",
        "stop": ["a"],
    }


def test_a_request_survives_json() -> None:
    full = GenerationRequest(
        messages=(Message("system", "Be brief."), Message("user", "Grüße 🙂", name="anna")),
        raw=True,
        stream=False,
        top_k=5,
        top_p=0.5,
        functions=(Function("f", "code"),),
        lora_scale=0.5,
    )
    assert GenerationRequest.from_dict(json.loads(json.dumps(full.to_dict()))) == full


def test_a_body_may_have_booleans_as_texts() -> None:
    made = GenerationRequest.from_dict({"prompt": "Hello", "raw": "true", "stream": "false"})
    assert (made.raw, made.stream) == (True, False)
    with pytest.raises(InvalidRequest, match="true or false"):
        GenerationRequest.from_dict({"prompt": "Hello", "raw": "yes"})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"prompt": "Hi", "temprature": 1}, "did you mean 'temperature'"),
        ({"prompt": "Hi", "xyzzy": 1}, "known fields are"),
        ({"prompt": "Hi", "seed": None}, "must not be null"),
        ([], "JSON object"),
    ],
)
def test_a_body_with_a_wrong_key_is_refused(body: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        GenerationRequest.from_dict(body)


def test_a_changed_copy_is_checked_again() -> None:
    made = request(top_k=5)
    assert made.with_(top_k=6).top_k == 6
    assert made.top_k == 5
    with pytest.raises(InvalidRequest):
        made.with_(top_k=51)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.top_k = 7  # type: ignore[misc]


def test_usage_and_chunks_as_text() -> None:
    assert Usage(3, 4).to_dict() == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert str(Chunk(text="Hi", status="Loading")) == "Hi"
