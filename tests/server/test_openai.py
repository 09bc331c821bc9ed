"""OpenAI's interface over a real socket: what is taken, what is refused by name, and how answers and errors look."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from mistral_nb.errors import InvalidRequest
from mistral_nb.server.answering import Ask
from mistral_nb.server.generation import Piece
from mistral_nb.server.openai import parse_chat, parse_completion
from mistral_nb.server.openai_answers import ChatShape, Head, openai_error
from mistral_nb.server.schemas import WireError, wire_error
from mistral_nb.types import Function, Message, Usage
from tests.server.engines import DEADLINE, MODEL, STAND_IN, EngineUnderTest, eventually, frames

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
USER = [{"role": "user", "content": "Write one sentence about the sea."}]
SHORT: dict[str, Any] = {"messages": USER, "temperature": 0, "max_tokens": 8}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
CITIES = ("Rome", "Oslo")
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}


def ask(engine: EngineUnderTest, path: str = CHAT, **body: Any) -> httpx.Response:
    return engine.client.post(path, json=body)


def text(engine: EngineUnderTest, **body: Any) -> str:
    """The text of an answer that is not streamed."""
    answer = ask(engine, **body)
    assert answer.status_code == 200, answer.text
    content: str = answer.json()["choices"][0]["message"]["content"]
    return content


def error_of(response: httpx.Response) -> tuple[int, str, str | None, str]:
    """Status, code, field and message of an error, which must come in OpenAI's envelope."""
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"], error["param"], error["message"]


def tokens(engine: EngineUnderTest, **body: Any) -> int:
    """Tokens of the prompt."""
    count: int = ask(engine, **{**SHORT, "max_tokens": 1, **body}).json()["usage"]["prompt_tokens"]
    return count


# Answers


def test_the_answer_is_that_of_the_other_wire(engine: EngineUnderTest) -> None:
    other = engine.post(SHORT).json()["result"]
    response = ask(engine, **SHORT)
    body = response.json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": other["response"], "refusal": None}
    assert body["usage"] == {**other["usage"], "prompt_tokens_details": {"cached_tokens": 0}}
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert response.headers["x-mistral-nb-model"] == body["model"] == MODEL


def test_a_stream_begins_with_the_role_and_ends_with_a_reason(engine: EngineUnderTest) -> None:
    response = ask(engine, **SHORT, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *data, done = frames(response)
    assert done == "[DONE]"
    chunks = [json.loads(each) for each in data]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[:-1]) == text(engine, **SHORT)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_the_usage_comes_in_a_chunk_of_its_own_when_asked_for(engine: EngineUnderTest, path: str) -> None:
    given = {"prompt": "one two"} if path == COMPLETIONS else {"messages": USER}
    response = ask(engine, path, **given, max_tokens=4, stream=True, stream_options={"include_usage": True})
    *chunks, last = [json.loads(each) for each in frames(response)[:-1]]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


def test_a_bare_prompt_has_no_template(engine: EngineUnderTest) -> None:
    raw = {"prompt": "one two three four", "temperature": 0, "max_tokens": 6}
    other = engine.post({**raw, "raw": True}).json()["result"]
    for prompt in (raw["prompt"], [raw["prompt"]]):
        body = ask(engine, COMPLETIONS, **{**raw, "prompt": prompt}).json()
        assert body["choices"] == [{"index": 0, "text": other["response"], "logprobs": None, "finish_reason": "length"}]
        assert body["usage"] == {**other["usage"], "prompt_tokens_details": {"cached_tokens": 0}}


def test_what_is_kept_of_a_prompt_is_told(engine: EngineUnderTest) -> None:
    """In whole pieces of 128 tokens, and in the log too."""
    prompt = " ".join(f"{number} green bottles," for number in range(60))
    first, again = (ask(engine, COMPLETIONS, prompt=prompt, temperature=0, max_tokens=4) for _ in range(2))
    told = [answer.json()["usage"] for answer in (first, again)]
    kept = told[0]["prompt_tokens"] // 128 * 128
    assert [usage["prompt_tokens_details"] for usage in told] == [{"cached_tokens": 0}, {"cached_tokens": kept}]
    assert kept > 0
    assert again.json()["choices"] == first.json()["choices"]
    eventually(lambda: f'"tokens_reused": {kept}' in engine.log(), "its line in the log")


@pytest.mark.parametrize("path", [CHAT, "/client/v4/accounts/any/ai/v1/chat/completions"])
@pytest.mark.parametrize("model", [MODEL, STAND_IN, STAND_IN.upper(), "embedded", None])
def test_names_that_it_answers_to(engine: EngineUnderTest, path: str, model: str | None) -> None:
    named = {} if model is None else {"model": model}
    assert ask(engine, path, **SHORT, **named).status_code == 200


# What is taken


@pytest.mark.parametrize(
    "extra",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"},
        {"n": 1, "logit_bias": {}, "logprobs": False, "response_format": {"type": "text"}, "modalities": ["text"]},
        {"n": None, "stop": None, "seed": None, "tools": None, "tool_choice": None, "stream_options": None},
        {"tools": [], "tool_choice": "none"},
        {"max_completion_tokens": 8},
        {"stop": [], "seed": 0},
    ],
)
def test_what_changes_nothing_is_taken(engine: EngineUnderTest, extra: dict[str, Any]) -> None:
    assert text(engine, **SHORT, **extra) == text(engine, **SHORT)


def test_sampling_is_that_of_the_other_wire(engine: EngineUnderTest) -> None:
    sampling = {
        **{"temperature": 1.2, "seed": 7, "top_p": 0.9, "top_k": 20, "max_tokens": 12},
        **{"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    }
    other = engine.post({"messages": USER, **sampling}).json()["result"]["response"]
    assert text(engine, messages=USER, **sampling) == other
    assert text(engine, messages=USER, **{**sampling, "seed": 8}) != other
    del sampling["repetition_penalty"]
    assert text(engine, messages=USER, **sampling, repeat_penalty=1.1) == other
    assert text(engine, messages=USER, **sampling) != other


def test_any_whole_number_is_a_seed() -> None:
    """The engine's own are taken as they are."""

    def taken(seed: Any) -> int | None:
        body = json.dumps({"messages": USER, "seed": seed}).encode()
        return parse_chat(body, MODEL, "id").request.seed

    largest = 9_999_999_999
    assert [taken(seed) for seed in (1, 7, largest, 0, -1, largest + 1)] == [1, 7, largest, largest, largest - 1, 1]
    for seed in (True, 0.5, "7"):
        with pytest.raises(InvalidRequest, match="seed"):
            taken(seed)


def test_stop_and_the_newer_name_of_the_limit(engine: EngineUnderTest) -> None:
    whole = text(engine, messages=USER, temperature=0, max_completion_tokens=8)
    assert whole == text(engine, **SHORT)
    stop = whole[4:7]
    body = ask(engine, **SHORT, stop=stop).json()["choices"][0]
    assert (body["message"]["content"], body["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_contents_in_parts_and_the_developers_role(engine: EngineUnderTest) -> None:
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    same = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts, "name": None}]
    assert tokens(engine, messages=same) == tokens(engine, messages=plain)
    assert text(engine, **{**SHORT, "messages": same}) == text(engine, **{**SHORT, "messages": plain})


def test_a_past_answer_as_a_client_keeps_it(engine: EngineUnderTest) -> None:
    kept = {
        "role": "assistant",
        "content": "Hi.",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    turns = [*USER, kept, *USER]
    plain = [*USER, {"role": "assistant", "content": "Hi."}, *USER]
    assert tokens(engine, messages=turns) == tokens(engine, messages=plain)


# What is refused

BAD_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": None}, "messages", "at least one entry"),
    ({"messages": []}, "messages", "at least one entry"),
    ({"messages": ["hello"]}, "messages[0]", "role and content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role", "system, user, assistant"),
    ({"messages": [{"role": "user", "content": ""}]}, "content", "must not be empty"),
    ({"messages": [{"role": "user", "content": 7}]}, "messages[0]", "content must be a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]", "content must be a text"),
    ({"messages": [{"role": "user", "content": "x", "mood": "glad"}]}, "messages[0]", "holds only content, name, role"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "call_9"}]}, "messages[0]", "tool_call_id"),
    ({"messages": [*USER, {"role": "assistant", "tool_calls": ["x"]}]}, "messages[1].tool_calls", "must read"),
    ({"n": 2}, "n", "must be 1"),
    ({"logprobs": True}, "logprobs", "must be false"),
    ({"top_logprobs": 3}, "top_logprobs", "must be 0"),
    ({"logit_bias": {"50256": -100}}, "logit_bias", "must be {}"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "must be true or false"),
    ({"response_format": {"type": "json_object"}}, "response_format", "left out"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "is not supported here"),
    ({"functions": [{"name": "f"}]}, "functions", "is not supported here"),
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"temperature": 5.1}, "temperature", "0 to 5"),
    ({"frequency_penalty": -0.5}, "frequency_penalty", "0 to 2"),
    ({"max_completion_tokens": 9}, "max_tokens", "is not max_completion_tokens"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"stream_options": {"include_usage": 1}}, "stream_options", "include_usage"),
    ({"stream_options": {"more": True}}, "stream_options", "include_usage"),
    ({"model": 7}, "model", "must be a text"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "must read"),
    ({"tools": [{"type": "function", "function": {"name": "f", "body": "x"}}]}, "tools[0]", "holds only"),
    ({"tools": {"f": {}}}, "tools", "must be a list"),
    ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice", "auto, none, required"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
        "none of the",
    ),
]


@pytest.mark.parametrize(("extra", "field", "expected"), BAD_CHAT)
def test_a_field_that_is_wrong_is_named(
    engine: EngineUnderTest, extra: dict[str, Any], field: str, expected: str
) -> None:
    status, code, param, message = error_of(ask(engine, **{**SHORT, **extra}))
    assert (status, code, param) == (400, "5006", field)
    assert expected in message


@pytest.mark.parametrize(
    ("extra", "field", "expected"),
    [
        ({"prompt": ["one", "two"]}, "prompt", "one request for each prompt"),
        ({"prompt": [1, 2, 3]}, "prompt", "must be one text"),
        ({"prompt": None}, "prompt", "must be one text"),
        ({"echo": True}, "echo", "must be false"),
        ({"best_of": 2}, "best_of", "must be 1"),
        ({"logprobs": 0}, "logprobs", "must be false"),
        ({"suffix": "end"}, "suffix", "left out"),
        ({"messages": USER}, "messages", "is not supported here"),
        ({"tools": [WEATHER]}, "tools", "is not supported here"),
    ],
)
def test_a_bare_prompts_field_that_is_wrong_is_named(
    engine: EngineUnderTest, extra: dict[str, Any], field: str, expected: str
) -> None:
    status, code, param, message = error_of(ask(engine, COMPLETIONS, **{"prompt": "x", **extra}))
    assert (status, code, param) == (400, "5006", field)
    assert expected in message


def test_no_error_repeats_what_is_long(engine: EngineUnderTest) -> None:
    """Nor looks for names like it."""
    long = "x" * (7 << 20)
    wrong = [
        {"model": long},
        {long: 1},
        {"messages": [{**USER[0], "role": long}]},
        {"messages": [{**USER[0], long: 1}]},
    ]
    for extra in wrong:
        answer = ask(engine, **{**SHORT, **extra})
        assert answer.is_client_error
        assert len(answer.content) < 5000
    assert len(engine.post({**SHORT, long: 1}).content) < 5000
    assert len(error_of(ask(engine, **{**SHORT, long: 1}))[2]) <= 200


def test_errors_have_the_statuses_of_this_interface(engine: EngineUnderTest) -> None:
    assert error_of(ask(engine, **SHORT, model="gpt-4o"))[:3] == (404, "model_not_found", "model")
    long = [{"role": "user", "content": "word " * 9000}]
    assert error_of(ask(engine, messages=long))[:3] == (400, "context_length_exceeded", "messages")
    assert error_of(ask(engine, COMPLETIONS, prompt="word " * 9000))[:3] == (400, "context_length_exceeded", "prompt")
    assert error_of(ask(engine, **SHORT, lora="nobodys"))[:3] == (404, "model_not_found", "lora")
    assert error_of(engine.client.post(CHAT, content=b"{"))[:2] == (400, "5006")
    assert error_of(engine.client.post(CHAT, content=b"[]"))[:2] == (400, "5006")
    assert error_of(engine.client.get(CHAT))[:2] == (405, "7001")
    assert error_of(engine.client.get("/v1/nothing"))[:2] == (404, "7000")
    stranger = httpx.get(f"{engine.record.base_url}/v1/models", timeout=DEADLINE, trust_env=False)
    assert error_of(stranger)[:2] == (401, "invalid_api_key")


# Bodies of any form, without an engine

ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, float("nan"), 10**30, "", "x", "\ud800", [], [[]], [None], ["x"], {}),
    *({"type": "text"}, {"type": "function"}, {"name": []}, {"role": "user"}),
)
FULL: dict[str, Any] = {
    "model": MODEL,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
    ],
    "tools": [WEATHER],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["a"],
}


def altered(value: Any, odd: Any) -> Iterator[Any]:
    """`value` with each of its parts, at any depth, replaced by `odd`."""
    yield odd
    if isinstance(value, dict):
        yield from ({**value, key: each} for key in value for each in altered(value[key], odd))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from ([*value[:index], each, *value[index + 1 :]] for each in altered(part, odd))


@pytest.mark.parametrize("several", [True, False])
def test_one_call_at_a_time(engine: EngineUnderTest, several: bool) -> None:
    """The model, which imitates what it sees, calls for two cities where it may."""
    told = {"properties": {"city": {"type": "string"}}, "required": ["city"]}
    two = [
        {**CALL, "id": city, "function": {"name": "weather", "arguments": f'{{"city": "{city}"}}'}} for city in CITIES
    ]
    turns = [
        {"role": "user", "content": "Weather in Rome and Oslo?"},
        {"role": "assistant", "tool_calls": two},
        *({"role": "tool", "tool_call_id": city, "content": "sunny"} for city in CITIES),
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Weather in Köln and Bonn?"},
    ]
    tool = {"type": "function", "function": {**WEATHER["function"], "parameters": told}}
    choice: dict[str, Any] = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": several}
    answer = ask(engine, messages=turns, temperature=0, max_tokens=100, **choice).json()["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert (len(answer["message"]["tool_calls"]) > 1) is several


@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_no_body_is_a_surprise(parse: Callable[[bytes, str, str], Ask]) -> None:
    """Whatever stands where: an answer or a refusal that can be sent."""
    full = FULL if parse is parse_chat else {"prompt": ["x"], "stream_options": {"include_usage": True}, "n": 1}
    refused = 0
    for odd in ODD:
        for body in (*altered(full, odd), {**full, "half \udc00": odd}):
            try:
                parse(json.dumps(body).encode(), MODEL, "id")
            except InvalidRequest as error:
                refused += 1
                status, told = openai_error(wire_error(error))
                assert status == 400
                json.dumps(told, ensure_ascii=False).encode()
    assert refused > 50


@pytest.mark.parametrize("arguments", ['{"x": NaN}', '{"x": 1e999}'])
def test_numbers_that_json_has_not_are_refused(arguments: str) -> None:
    """In a past call, which the model would imitate, and in a schema."""
    call = {**CALL, "function": {"name": "weather", "arguments": arguments}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "f", "parameters": json.loads(arguments)}}
    for body, field in (({"messages": turns}, r"messages\[1\]"), ({"messages": USER, "tools": [tool]}, r"tools\[0\]")):
        with pytest.raises(InvalidRequest, match=rf"^{field}.* not finite"):
            parse_chat(json.dumps(body).encode(), MODEL, "1")


def test_no_depth_is_a_surprise() -> None:
    """Neither in the body nor in the text of a past call's arguments."""
    for depth in range(800, 1000):
        for opened, closed in ("[]", ('{"a":', "}")):
            nested = f"{opened * depth}1{closed * depth}"
            call = {**CALL, "function": {"name": "weather", "arguments": f'{{"x": {nested}}}'}}
            tool = json.dumps({"type": "function", "function": {"name": "f", "parameters": {"x": 0}}})
            for body in (
                json.dumps({"messages": [*USER, {"role": "assistant", "tool_calls": [call]}]}),
                f'{{"messages": {json.dumps(USER)}, "tools": [{tool.replace("0", nested)}]}}',
                f'{{"messages": {nested}}}',
            ):
                with contextlib.suppress(WireError, InvalidRequest):
                    parse_chat(body.encode(), MODEL, "1")


def test_the_turns_that_the_model_is_shown() -> None:
    ask = parse_chat(json.dumps(FULL).encode(), MODEL, "id")
    assert ask.request.messages == (
        Message("user", "hi"),
        Message("assistant", '[{"name": "weather", "arguments": {"city": "Zürich"}}]'),
        Message("tool", "1", name="weather"),
    )
    assert ask.request.functions == (Function("weather", '{"parameters": {"type": "object"}, "description": ""}'),)
    assert (ask.choice, ask.model, ask.request.stream) == ("weather", MODEL, True)


def test_two_calls_are_told_apart() -> None:
    calls = tuple({"name": name, "arguments": {"x": "ü"}} for name in ("f", "g"))
    last = Piece("", "tool_calls", Usage(3, 4), calls)
    shape = ChatShape(Head("chatcmpl-1", MODEL))
    message = shape.whole("", last)["choices"][0]["message"]
    assert message["content"] is None
    called = json.loads(shape.frames(last).decode().partition("\n")[0].removeprefix("data: "))
    streamed = called["choices"][0]["delta"]["tool_calls"]
    for told in (message["tool_calls"], streamed):
        assert [call["function"] for call in told] == [{"name": name, "arguments": '{"x": "ü"}'} for name in "fg"]
        assert len({call["id"] for call in told}) == 2
    assert [call["index"] for call in streamed] == [0, 1]


def test_a_tool_without_parameters_takes_none() -> None:
    body = {"messages": USER, "tools": [{"type": "function", "function": {"name": "now"}}]}
    (function,) = parse_chat(json.dumps(body).encode(), MODEL, "id").request.functions or ()
    assert json.loads(function.code) == {"parameters": {"type": "object", "properties": {}}}
    named_so = {"type": "function", "function": {"name": "none"}}
    with pytest.raises(InvalidRequest, match="another name"):
        parse_chat(json.dumps({**body, "tools": [named_so], "tool_choice": named_so}).encode(), MODEL, "id")
