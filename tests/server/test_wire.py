"""The Workers AI wire over a real socket: answers, errors, names, and clients that do as they like."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mistral_nb.errors import InvalidRequest
from mistral_nb.server.generation import Piece
from mistral_nb.server.schemas import WireError, WorkersShape, parse_request
from mistral_nb.types import Usage
from tests.server.engines import DEADLINE, MODEL, STAND_IN, EngineUnderTest, frames, run_path, text_of

PROMPT = "Write one sentence about the sea."
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}


def error_of(response: httpx.Response) -> tuple[int, int, str]:
    """HTTP status, code and message of an error, which must come in the wire's envelope."""
    body = response.json()
    assert set(body) == {"errors", "success", "result", "messages"}
    assert (body["success"], body["result"], body["messages"]) == (False, {}, [])
    (error,) = body["errors"]
    return response.status_code, error["code"], error["message"]


# Answers


def test_without_stream_the_answer_is_one_envelope(engine: EngineUnderTest) -> None:
    response = engine.post(GREEDY)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-mistral-nb-model"] == MODEL
    assert (body["success"], body["errors"], body["messages"]) == (True, [], [])
    assert len(body["result"]["response"]) > 20
    assert body["result"]["finish_reason"] == "length"
    usage = body["result"]["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + 12


def test_a_stream_has_the_same_text_piece_by_piece(engine: EngineUnderTest) -> None:
    whole = engine.post(GREEDY).json()["result"]
    counts = []
    for _ in range(3):
        response = engine.post({**GREEDY, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-mistral-nb-model"] == MODEL
        *pieces, last, done = frames(response)
        assert done == "[DONE]"
        assert json.loads(last) == {"response": "", "usage": whole["usage"], "finish_reason": "length"}
        assert all(set(json.loads(piece)) == {"response"} for piece in pieces)
        assert text_of(response) == whole["response"]
        counts.append(len(pieces))
    assert max(counts) > 3, "what comes while the server stands still is one piece"


def test_messages_are_a_conversation(engine: EngineUnderTest) -> None:
    messages = [
        {"role": "system", "content": "Answer with one word."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    result = engine.post({"messages": messages, "temperature": 0, "max_tokens": 40}).json()["result"]
    assert "Paris" in result["response"]
    assert result["finish_reason"] == "stop"
    assert "<|im_end|>" not in result["response"]


def test_raw_sends_the_prompt_as_it_is(engine: EngineUnderTest) -> None:
    templated = engine.post(GREEDY).json()["result"]["usage"]["prompt_tokens"]
    for raw in (True, "true"):
        result = engine.post({"prompt": "one two three four", "raw": raw, "temperature": 0, "max_tokens": 3}).json()
        assert result["result"]["usage"]["prompt_tokens"] < 6 < templated


def test_a_seed_gives_the_same_text(engine: EngineUnderTest) -> None:
    body = {"prompt": PROMPT, "temperature": 1.5, "max_tokens": 16}
    texts = [engine.post({**body, "seed": seed}).json()["result"]["response"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_unicode_arrives_whole(engine: EngineUnderTest) -> None:
    """Tokens that hold a part of a character are held back until it is complete."""
    body = {"prompt": "🦊 naïve 東京\n" * 8, "raw": True, "temperature": 0, "max_tokens": 24}
    streamed = text_of(engine.post({**body, "stream": True}))
    assert streamed == engine.post(body).json()["result"]["response"]
    assert "🦊 naïve 東京" in streamed
    assert "\ufffd" not in streamed.rstrip("\ufffd"), "only the token limit may cut a character"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_text_ends_the_answer_before_it(engine: EngineUnderTest, streamed: bool) -> None:
    """The stop text is chosen from the answer so that it begins and ends inside tokens."""
    body = {**GREEDY, "max_tokens": 24}
    text: str = engine.post(body).json()["result"]["response"]
    at = len(text) // 2
    stop = text[at : at + 7]
    response = engine.post({**body, "stop": ["never there", stop], "stream": streamed})
    if streamed:
        assert text_of(response) == text[: text.index(stop)]
        assert json.loads(frames(response)[-2])["finish_reason"] == "stop"
    else:
        result = response.json()["result"]
        assert (result["response"], result["finish_reason"]) == (text[: text.index(stop)], "stop")
        assert 0 < result["usage"]["completion_tokens"] < 24
    engine.idle()


def test_text_that_only_begins_like_a_stop_text_is_not_lost(engine: EngineUnderTest) -> None:
    text: str = engine.post(GREEDY).json()["result"]["response"]
    almost = text[-3:] + "\x00"
    assert text_of(engine.post({**GREEDY, "stop": [almost], "stream": True})) == text


def test_calls_stand_beside_the_text() -> None:
    shape, calls = WorkersShape(), ({"name": "f", "arguments": {"a": "ü"}},)
    last = Piece("", "tool_calls", Usage(3, 4), calls)
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    usage |= {"prompt_tokens_details": {"cached_tokens": 0}}
    end = {"response": "", "tool_calls": list(calls), "usage": usage, "finish_reason": "tool_calls"}
    assert shape.whole("", last)["result"] == end
    frame, done, _ = shape.frames(last).decode().split("\n\n")
    assert json.loads(frame.removeprefix("data: ")) == end
    assert done == "data: [DONE]"


# Names


@pytest.mark.parametrize(
    "path",
    [
        run_path(MODEL.upper()),
        run_path("embedded"),
        run_path(MODEL) + "/",
        run_path(STAND_IN),
        run_path("@hf%2Fmistral%2Fmistral-7b-instruct-v0.2"),
        run_path("%40hf%2Fmistral%2Fmistral-7b-instruct-v0.2"),
        run_path(STAND_IN).replace("/local/", "/0123456789abcdef0123456789abcdef/"),
    ],
)
def test_names_that_it_answers_to(engine: EngineUnderTest, path: str) -> None:
    response = engine.client.post(path, json={**GREEDY, "max_tokens": 1})
    assert response.status_code == 200
    assert response.headers["x-mistral-nb-model"] == MODEL, "the header names the model that really answers"


@pytest.mark.parametrize("name", ["@hf/mistral/mistral-7b-instruct-v0.1", "/etc", "mistral-7b-instruct-v0.2"])
def test_a_model_that_it_does_not_hold(engine: EngineUnderTest, name: str) -> None:
    status, code, message = error_of(engine.post(GREEDY, model=name))
    assert (status, code) == (400, 5007)
    assert name in message
    assert MODEL in message
    assert f"--serve-as {name}" in message


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/nothing", (404, 7000)),
        ("POST", "/client/v4/accounts/local/ai/run", (404, 7000)),
        ("POST", "/client/v4/accounts/ai/run/" + MODEL, (404, 7000)),
        ("POST", "/engine/health/", (404, 7000)),
        ("GET", run_path(), (405, 7001)),
        ("POST", "/engine/health", (405, 7001)),
    ],
)
def test_a_route_that_is_not_there(engine: EngineUnderTest, method: str, path: str, expected: tuple[int, int]) -> None:
    status, code, message = error_of(engine.client.request(method, path, json=GREEDY))
    assert (status, code) == expected
    assert path in message


# Who may ask


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, (401, 10000)),
        ("Bearer wrong", (401, 10000)),
        ("bearer \xe9", (401, 10000)),
        ("Bearer", (400, 6003)),
        ("Basic dXNlcjpwYXNz", (400, 6003)),
    ],
)
@pytest.mark.parametrize("path", [run_path(), "/engine/health", "/engine/stop", "/no/such/route"])
def test_nothing_without_the_token(
    engine: EngineUnderTest, header: str | None, expected: tuple[int, int], path: str
) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    url = engine.record.base_url + path
    response = httpx.post(url, json=GREEDY, headers=headers, timeout=DEADLINE, trust_env=False)
    assert error_of(response)[:2] == expected


# Bodies

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": PROMPT, "messages": [{"role": "user", "content": "x"}]}, "exactly one of prompt and messages"),
    ({}, "exactly one of prompt and messages"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "  "}, "must not be empty"),
    ({"prompt": None}, "must not be null"),
    ({"prompt": PROMPT, "top_k": None}, "top_k = None: must not be null"),
    ({"prompt": PROMPT, "temprature": 1}, "did you mean 'temperature'"),
    ({"prompt": PROMPT, "temperature": 5.5}, "temperature = 5.5: must be a number from 0 to 5"),
    ({"prompt": PROMPT, "temperature": "hot"}, "temperature"),
    ({"prompt": PROMPT, "temperature": True}, "temperature"),
    ({"prompt": PROMPT, "max_tokens": 0}, "max_tokens"),
    ({"prompt": PROMPT, "max_tokens": 1.5}, "whole number"),
    ({"prompt": PROMPT, "top_k": 51}, "1 to 50"),
    ({"prompt": PROMPT, "seed": 0}, "seed"),
    ({"prompt": PROMPT, "raw": "yes"}, "raw"),
    ({"prompt": PROMPT, "stop": []}, "stop"),
    ({"prompt": 7}, "prompt"),
    ({"messages": []}, "at least one entry"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "system, user, assistant"),
    ({"messages": [{"role": "user"}]}, "'content'"),
    ({"messages": ["hello"]}, "role and content"),
    ({"prompt": "half \ud83d a fox"}, "lone surrogate"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "lone surrogate"),
    ({"prompt": PROMPT, "\udc00": 1}, "\\udc00"),
    ({"prompt": PROMPT, "functions": [{"name": "f"}]}, "name and code"),
    ({"prompt": PROMPT, "functions": [{"name": "f", "code": "1"}], "raw": True}, "functions"),
]


@pytest.mark.parametrize(("body", "expected"), BAD_FIELDS)
def test_a_field_that_is_wrong_is_named(engine: EngineUnderTest, body: dict[str, Any], expected: str) -> None:
    status, code, message = error_of(engine.post(content=json.dumps(body)))
    assert (status, code) == (400, 5006)
    assert expected in message


@pytest.mark.parametrize("form", ['{"messages":%s}', '{"messages":[%s]}', '{"prompt":%s}', '{"prompt":"a","x":%s}'])
def test_no_depth_is_a_surprise(form: str) -> None:
    """Between what can be shown and what cannot be read there are depths that can only be read."""
    for depth in range(700, 1100, 4):
        for opened, closed in ("[]", ('{"a":', "}")):
            body = form % f"{opened * depth}1{closed * depth}"
            with pytest.raises((WireError, InvalidRequest)):
                parse_request(body.encode())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "line 1, column 1"),
        (b'{"prompt": "x",\n "raw": tru}', "line 2, column 9"),
        (b'{"prompt": "x"} trailing', "line 1, column 17"),
        (b'{"prompt": "\xff\xfe"}', "byte 12"),
        (b'["prompt"]', "body = 'list': must be a JSON object"),
        (b'"prompt"', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "x", "seed": ' + b"9" * 400 + b"}", "seed"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_body_that_is_wrong_says_where(engine: EngineUnderTest, body: bytes, expected: str) -> None:
    status, code, message = error_of(engine.post(content=body))
    assert (status, code) == (400, 5006)
    assert expected in message


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"lora": "my-adapter"}, (404, 3037)),
        ({"lora": "00000000-0000-0000-0000-000000000", "raw": "true"}, (404, 3037)),
        ({"lora": "../../etc", "lora_scale": 1, "stream": True}, (400, 5006)),
        ({"lora_scale": 0.5}, (400, 5006)),
    ],
)
def test_an_adapter_is_refused_not_dropped(
    engine: EngineUnderTest, extra: dict[str, Any], expected: tuple[int, int]
) -> None:
    status, code, message = error_of(engine.post({**GREEDY, **extra}))
    assert (status, code) == expected
    assert repr(extra["lora"]) in message if "lora" in extra else "lora_scale: there is no adapter" in message


def test_a_prompt_over_the_context(engine: EngineUnderTest) -> None:
    status, code, message = error_of(engine.post({**GREEDY, "prompt": "word " * 9000, "stream": True}))
    assert (status, code) == (413, 5021)
    assert "8192" in message


def test_a_body_over_the_limit(engine: EngineUnderTest) -> None:
    """A client that sends all of it before it reads gets the answer too."""
    body = json.dumps({"prompt": "x" * (16 << 20)}).encode()
    connection = http.client.HTTPConnection(engine.record.host, engine.record.port, timeout=DEADLINE)
    connection.request("POST", run_path(), body, {"authorization": f"Bearer {engine.record.token}"})
    answer = connection.getresponse()
    (error,) = json.loads(answer.read())["errors"]
    connection.close()
    assert (answer.status, error["code"]) == (413, 3006)
    assert str(8 << 20) in error["message"]


def test_a_chunked_body_over_the_limit(engine: EngineUnderTest) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"prompt": "'
        yield from [b"x" * 65_536] * 140
        yield b'"}'

    assert error_of(engine.post(content=parts()))[:2] == (413, 3006)


def test_a_long_body_within_the_limit_is_read(engine: EngineUnderTest) -> None:
    """The greatest prompt, its characters escaped with 12 bytes each."""
    body = json.dumps({"prompt": "🦊" * 131_072})
    assert len(body) > 12 * 131_072
    status, code, _ = error_of(engine.post(content=body))
    assert (status, code) == (413, 5021)


# Clients that do as they like


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded", "text/plain", "nonsense"])
def test_the_content_type_does_not_matter(engine: EngineUnderTest, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = engine.post(content=json.dumps({**GREEDY, "max_tokens": 1}), headers=headers)
    assert response.status_code == 200


def test_a_request_written_by_hand(engine: EngineUnderTest) -> None:
    body = json.dumps({**GREEDY, "max_tokens": 2}).encode()
    head = f"POST {run_path()} HTTP/1.1\nContent-Length: {len(body)}\nConnection: close"
    with engine.raw(head, body) as connection, connection.makefile("rb") as answer:
        lines = answer.read().split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert json.loads(lines[-1])["result"]["usage"]["completion_tokens"] == 2


def test_expect_continue_with_a_body_over_the_limit_is_answered_before_the_body(engine: EngineUnderTest) -> None:
    head = f"POST {run_path()} HTTP/1.1\nContent-Length: 9999999\nExpect: 100-continue"
    with engine.raw(head) as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_what_is_not_http_is_no_harm(engine: EngineUnderTest) -> None:
    with engine.raw("\x00\x01 nonsense") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert engine.health()["state"] == "ready"


# Health and tokens


def test_health_tells_what_it_is(engine: EngineUnderTest) -> None:
    health = engine.health()
    assert health["protocol"] == 1
    assert health["model"] == MODEL
    assert health["serve_as"] == [STAND_IN]
    assert (health["state"], health["error"], health["active"]) == ("ready", "", 0)
    assert health["pid"] == engine.process.pid
    assert health["context"] == 8192
    assert health["log"] == engine.record.log
    assert health["device"]
    assert health["precision"]
    if health["precision"] == "int4":
        assert health["why"] == "int4, since its weights are 4-bit blocks already"
    served = health["served"]
    engine.post({**GREEDY, "max_tokens": 1})
    assert engine.health()["served"] == served + 1
    for refused in ({**GREEDY, "temperature": 9}, {**GREEDY, "prompt": "word " * 9000}, {}):
        engine.post(refused)
    engine.post(GREEDY, model="another")
    assert engine.health()["served"] == served + 1


def test_tokenize_tells_what_the_model_would_be_given(engine: EngineUnderTest) -> None:
    body = {"messages": [{"role": "user", "content": "Hello <|im_end|> there"}]}
    answer = engine.client.post("/engine/tokenize", json=body).json()
    assert answer["context"] == 8192
    assert answer["count"] == len(answer["tokens"])
    assert "Hello" in answer["prompt"]
    usage = engine.post({**body, "max_tokens": 1}).json()["result"]["usage"]
    assert usage["prompt_tokens"] == answer["count"]
    raw = engine.client.post("/engine/tokenize", json={"prompt": "Hello there", "raw": True}).json()
    assert raw["prompt"] == "Hello there"
    assert raw["count"] < answer["count"]


def test_tokenize_counts_what_is_over_the_context(engine: EngineUnderTest) -> None:
    answer = engine.client.post("/engine/tokenize", json={"prompt": "word " * 9000}).json()
    assert answer["count"] > answer["context"] == 8192


@pytest.mark.parametrize("extra", [{"temperature": 9}, {"functions": [{"name": "a b", "code": "1"}]}, {"lora": "x"}])
def test_tokenize_refuses_what_a_run_refuses(engine: EngineUnderTest, extra: dict[str, Any]) -> None:
    refused = error_of(engine.client.post("/engine/tokenize", json={"prompt": PROMPT, **extra}))
    assert refused[:2] == ((404, 3037) if "lora" in extra else (400, 5006))
    assert refused == error_of(engine.post({"prompt": PROMPT, **extra}))


def test_the_log_holds_no_prompt_and_no_token(engine: EngineUnderTest) -> None:
    """After everything above: errors, overflows and answers."""
    secret = "xyzzy-the-prompt"
    engine.post({"prompt": secret, "max_tokens": 2})
    engine.post({"prompt": secret, "temperature": 77})
    engine.post({"prompt": secret * 20_000, "stream": True})
    log = engine.log()
    assert secret not in log
    assert PROMPT not in log
    assert engine.record.token not in log
    assert "ready after" in log
    assert "Traceback" not in log, log
