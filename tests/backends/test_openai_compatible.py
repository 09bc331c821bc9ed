"""The client of OpenAI's wire on a scripted peer: what it sends, what it reads, and errors in each server's words."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from mistral_nb.answer import Answer
from mistral_nb.backends.openai_wire import assemble
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ConfigurationError,
    ConnectionFailed,
    InvalidRequest,
    MistralError,
    StreamTruncated,
)
from mistral_nb.types import Chunk, GenerationRequest
from tests.backends.openai_peer import HELLO, MODEL, USAGE, delta, make, models, stream
from tests.backends.scripted import TOKEN, Peer, body, frame, head

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture
def ask(peer: Peer) -> Callable[..., list[Chunk]]:
    def ask(request: GenerationRequest = HELLO, model: str | None = MODEL, **settings: Any) -> list[Chunk]:
        return list(make(peer, model, **settings).stream(request))

    return ask


def test_a_prompt_is_a_turn_and_unset_fields_are_left_out(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [stream(delta("Hel"), delta("lo 🦊"), delta(None, "stop"))]
    *text, last = ask()
    assert [chunk.text for chunk in text] == ["Hel", "lo 🦊"]
    assert (last.finish_reason, last.usage and last.usage.to_dict()) == ("stop", USAGE)
    seen = peer.seen[0]
    assert seen.line == "POST /v1/chat/completions HTTP/1.1"
    assert seen.headers["authorization"] == f"Bearer {TOKEN}"
    assert seen.json == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 256,
        "temperature": 0.6,
    }


def test_every_field_goes_by_the_name_that_the_servers_know(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [body({"choices": [{"message": {"content": "Hi"}, "finish_reason": "length"}], "usage": USAGE})]
    request = GenerationRequest.from_dict(
        {
            "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
            **{"stream": False, "max_tokens": 9, "temperature": 1.5, "top_p": 1.7, "top_k": 5, "seed": 3},
            **{"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.3},
            **{"stop": ["\n"], "lora": "my-adapter"},
        }
    )
    assert [chunk.text for chunk in ask(request)] == ["Hi", ""]
    assert peer.seen[0].json == {
        "model": "my-adapter",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}],
        **{"stream": False, "max_tokens": 9, "temperature": 1.5, "top_p": 1.0, "top_k": 5, "seed": 3},
        **{"repetition_penalty": 1.1, "repeat_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.3},
        "stop": ["\n"],
    }


def test_edge_values_mean_what_they_mean_elsewhere(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [stream(delta("x", "stop"))]
    ask(HELLO.with_(top_p=0, repetition_penalty=0))
    sent = peer.seen[0].json
    assert sent["temperature"] == 0
    assert not {"top_p", "repetition_penalty", "repeat_penalty"} & set(sent)


@pytest.mark.parametrize(
    "given",
    [{"prompt": "[INST] A [/INST]"}, {"messages": [{"role": "user", "content": c} for c in ("[INST] A ", "[/INST]")]}],
)
def test_raw_is_a_completion_of_the_text_alone(ask: Callable[..., list[Chunk]], peer: Peer, given: Any) -> None:
    text = [frame({"choices": [{"text": text, "finish_reason": None}]}) for text in ("One", " two")]
    end = frame({"choices": [{"text": "", "finish_reason": "stop"}], "usage": USAGE})
    peer.scripts = [[head(), *text, end, frame("[DONE]")]]
    assert "".join(chunk.text for chunk in ask(GenerationRequest.from_dict({**given, "raw": True}))) == "One two"
    assert peer.seen[0].line.startswith("POST /v1/completions ")
    assert peer.seen[0].json["prompt"] == "[INST] A [/INST]"
    assert "messages" not in peer.seen[0].json


def test_the_only_model_is_found_and_adapters_do_not_count(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [models({"id": MODEL, "parent": None}, {"id": "mine", "parent": MODEL}), stream(delta("x", "stop"))]
    client = make(peer, None)
    answer = Answer(client, HELLO)
    list(answer)
    assert answer.result.footer.startswith(f"{MODEL} · openai on 127.0.0.1:{peer.port}")
    assert peer.seen[0].line == "GET /v1/models HTTP/1.1"
    assert peer.seen[0].headers["authorization"] == f"Bearer {TOKEN}"
    list(client.stream(HELLO))
    assert [seen.line.split()[0] for seen in peer.seen] == ["GET", "POST", "POST"]
    assert {seen.json["model"] for seen in peer.seen[1:]} == {MODEL}


@pytest.mark.parametrize("name", ["a\x1b[31mb\n\rc", "half \ud800", "x" * 100_000])
def test_a_name_that_is_not_fit_to_be_shown_is_shown_clean(peer: Peer, name: str) -> None:
    sent = name.replace("\ud800", "\ufffd")
    answering = frame({"model": sent, "choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]})
    peer.scripts = [models({"id": name}), [head(), answering, frame("[DONE]")]]
    answer = Answer(make(peer, None), HELLO)
    assert "".join(chunk.text for chunk in answer) == "Hi"
    assert peer.seen[1].json["model"] == sent
    for shown in (answer.result.footer, answer.result.served_by.model):
        assert shown.isprintable()
        assert len(shown) < 300
    assert "stand-in" not in answer.result.footer


@pytest.mark.parametrize(
    ("script", "kind", "told"),
    [
        (models({"id": "a"}, {"id": "b"}), ConfigurationError, r"several models. Name one with --model: a, b$"),
        (models(), BackendError, "lists no model. Start it with one, or name one: --model NAME"),
        (models({"id": ""}, {"id": 1}), BackendError, "lists no model"),
        (body({"detail": "Not Found"}, "404 Not Found"), BackendError, "openai_base_url, which ends with the version"),
        (body({"error": "no key"}, "401 Unauthorized"), AuthenticationError, r"no key \(HTTP 401\). Check openai_api"),
        ([head(kind="text/html") + b"<html>"], BackendError, "lists no model. Start it"),
        (body({"data": "none"}, "404 Not Found"), BackendError, "it does not list its models.*openai_base_url"),
    ],
)
def test_a_list_of_models_that_leaves_it_open_is_told(
    ask: Callable[..., list[Chunk]], peer: Peer, script: Any, kind: type[MistralError], told: str
) -> None:
    peer.scripts = [script]
    with pytest.raises(kind, match=told) as caught:
        ask(model=None)
    assert TOKEN not in repr(caught.value)
    assert len(peer.seen) == 1


def named(model: str, text: str) -> bytes:
    return frame({"model": model, "choices": [{"delta": {"content": text}}]})


@pytest.mark.parametrize("told", [MODEL, f"{MODEL}-2024-05", "Mistral-7B-Instruct-v0.2"])
def test_a_model_by_a_longer_or_shorter_name_is_the_one_that_was_asked(peer: Peer, told: str) -> None:
    peer.scripts = [stream(named(told, "Hi"), delta(None, "stop"))]
    answer = Answer(make(peer), HELLO)
    list(answer)
    assert (answer.result.model, answer.result.served_by.stand_in_for) == (MODEL, "")


@pytest.mark.parametrize("streamed", [True, False])
def test_another_model_that_answers_is_named(peer: Peer, streamed: bool) -> None:
    whole = {"model": "/models/tiny.gguf", "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}]}
    peer.scripts = [stream(named("/models/tiny.gguf", "Hi"), delta(None, "stop")) if streamed else body(whole)]
    answer = Answer(make(peer), HELLO.with_(stream=streamed))
    list(answer)
    assert answer.result.footer.startswith(f"tiny.gguf (stand-in for {MODEL}) · openai on ")


def test_an_adapter_that_the_server_does_not_heed_is_refused(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [stream(named(MODEL, "Hi")), stream(named("mine", "Hi"), delta(None, "stop"))]
    chunks: list[Chunk] = []
    with pytest.raises(InvalidRequest, match=f"has no such adapter and answers with {MODEL}"):
        chunks.extend(make(peer).stream(HELLO.with_(lora="mine")))
    assert chunks == []
    answer = Answer(make(peer), HELLO.with_(lora="mine"))
    list(answer)
    assert (answer.result.model, answer.result.adapter) == (MODEL, "mine")


@pytest.mark.parametrize(
    ("lora", "told", "heeded"),
    [
        (f"{MODEL}-pirate", MODEL, False),
        ("Mistral", MODEL, False),
        ("me/pirate", "pirate", True),
        ("pirate", "me/pirate", True),
        ("pirate", "pirate-2024", True),
        (MODEL, MODEL, True),
    ],
)
def test_an_adapter_that_is_called_after_its_model_is_not_the_model(
    peer: Peer, lora: str, told: str, heeded: bool
) -> None:
    peer.scripts = [stream(named(told, "Hi"), delta(None, "stop"))]
    answer = Answer(make(peer), HELLO.with_(lora=lora))
    if heeded:
        assert [chunk.text for chunk in answer if chunk.text] == ["Hi"]
        assert answer.result.adapter == lora
    else:
        with pytest.raises(InvalidRequest, match=f"^lora = '{lora}'.* answers with {told}"):
            list(answer)
        assert answer.text == ""


def test_functions_are_tools_by_what_their_code_says(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [stream(delta("x", "stop"))]
    python = 'def weather(city: str):\n    """Tells the weather."""\n    raise SystemExit'
    functions = [
        {"name": "given", "code": json.dumps({"description": "Weather", "parameters": SCHEMA})},
        {"name": "weather", "code": python},
        {"name": "other", "code": "function other() {}"},
    ]
    ask(GenerationRequest.from_dict({"prompt": "Weather?", "functions": functions}))
    tools = peer.seen[0].json["tools"]
    assert {tool["type"] for tool in tools} == {"function"}
    given, weather, other = (tool["function"] for tool in tools)
    assert (given["name"], given["description"]) == ("given", "Weather")
    assert given["parameters"].items() >= SCHEMA.items()
    assert (weather["name"], weather["description"]) == ("weather", "Tells the weather.")
    assert weather["parameters"].items() >= SCHEMA.items()
    assert other["parameters"] == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"lora_scale": 0.5}, "lora_scale"),
        ({"lora": "/home/me/secret/tone"}, "lora"),
        ({"lora": "./tone"}, "lora"),
        ({"functions": [{"name": "f", "code": "{}"}, {"name": "g", "code": "[1]"}]}, r"functions\[1\]"),
        ({"functions": [{"name": "f", "code": "{}"}], "raw": True}, "functions"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "Sure!"}, {"role": "tool", "content": "1"}]}, "messages"),
    ],
)
def test_what_the_wire_cannot_say_is_refused_before_anything_is_sent(peer: Peer, fields: Any, field: str) -> None:
    prompt = {} if "messages" in fields else {"prompt": "Hi"}
    with pytest.raises(InvalidRequest, match=f"^{field} = "):
        make(peer).stream(GenerationRequest.from_dict({**prompt, **fields}))
    assert peer.seen == []


def test_results_of_tools_name_the_calls_that_they_answer(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [stream(delta("x", "stop"))]
    calls = [{"name": "f", "arguments": {"ä": 1}}, {"name": "g", "arguments": {}}, {"name": "f", "arguments": {}}]
    tools = [("g", "G"), ("f", "first"), ("f", "second")]
    ask(
        GenerationRequest.from_dict(
            {
                "messages": [
                    {"role": "user", "content": "Go"},
                    {"role": "assistant", "content": json.dumps(calls)},
                    *({"role": "tool", "name": name, "content": content} for name, content in tools),
                    {"role": "user", "content": "And?"},
                ]
            }
        )
    )
    _, called, *results, last = peer.seen[0].json["messages"]
    assert called["content"] is None
    assert [call["function"] for call in called["tool_calls"]] == [
        {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)} for call in calls
    ]
    ids = [call["id"] for call in called["tool_calls"]]
    assert len(set(ids)) == 3
    assert all(len(its_id) == 9 and its_id.isalnum() for its_id in ids)
    assert [(result["tool_call_id"], result["content"]) for result in results] == [
        (ids[1], "G"),
        (ids[0], "first"),
        (ids[2], "second"),
    ]
    assert last == {"role": "user", "content": "And?"}


def piece(index: int | None, arguments: Any, its_id: str | None = None, name: str | None = None) -> dict[str, Any]:
    told = {"index": index, "id": its_id, "function": {"name": name, "arguments": arguments}}
    return {key: value for key, value in told.items() if value is not None}


def test_calls_that_come_in_pieces_are_put_together(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    pieces = [
        piece(0, "", "call1", "weather"),
        piece(0, '{"city": "Zü'),
        piece(1, '{"a', "call2", "add"),
        piece(0, 'rich"}'),
        piece(1, '": {"b": [1, "🦊"]}}'),
    ]
    peer.scripts = [stream(*(delta(tool_calls=[one]) for one in pieces), delta(None, "tool_calls"))]
    [last] = ask()
    assert last.finish_reason == "tool_calls"
    assert last.tool_calls == (
        {"name": "weather", "arguments": {"city": "Zürich"}},
        {"name": "add", "arguments": {"a": {"b": [1, "🦊"]}}},
    )


@pytest.mark.parametrize(
    ("pieces", "calls"),
    [
        ([piece(None, "{}", "a", "f"), piece(None, '{"x": 1}', "b", "f")], [("f", {}), ("f", {"x": 1})]),
        ([piece(0, "{}", "a", "f"), piece(0, "{}", "b", "g")], [("f", {}), ("g", {})]),
        ([piece(0, "{", "a", "f"), piece(0, "}", "a", "f")], [("f", {})]),
        ([piece(0, {"x": 1}, "a", "f")], [("f", {"x": 1})]),
        ([piece(0, None, "a", "f")], [("f", {})]),
        ([piece(0, '{"x": ', "a", "f")], [("f", '{"x": ')]),
        ([piece(0, "[1]", "a", "f")], [("f", "[1]")]),
        ([{"name": "f", "arguments": {"x": 1}}], [("f", {"x": 1})]),
        ([piece(1, "{}", "b", "g"), piece(0, "{}", "a", "f")], [("f", {}), ("g", {})]),
        ([piece(None, "{}", "c", "h"), piece(10**400, "{}", "a", "f")], [("f", {}), ("h", {})]),
        ([piece(0, {"x": 1}, "a", "f"), piece(0, "}")], [("f", {"x": 1})]),
        ([piece(0, 5, "a", "f"), piece(0, "{}")], [("f", {})]),
        ([{"function": {"name": ["f"], "arguments": "{}"}}], [("", {})]),
        ([{"function": {"name": 7}, "index": True, "id": [1]}], [("", {})]),
        ([piece(0, "[" * 100_000, "a", "f")], [("f", "[" * 100_000)]),
        ([piece(0, '{"x": %s}' % ("9" * 5000), "a", "f")], [("f", '{"x": %s}' % ("9" * 5000))]),
        ([piece(0, '{"x": "\ud83d', "a", "f"), piece(0, '\ude00"}')], [("f", {"x": "😀"})]),
        ([piece(0, '{"x": "\\ud83d"}', "a", "f\ude00")], [("f�", {"x": "�"})]),
    ],
)
def test_calls_come_in_many_shapes(pieces: Any, calls: Any) -> None:
    assert [(call["name"], call["arguments"]) for call in assemble(pieces)] == calls


def test_a_list_of_models_with_other_things_in_it(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    odd = body({"data": [{"id": 7}, {"id": None}, "x", {"id": MODEL}]})
    peer.scripts = [odd, stream(frame({"model": 7, "choices": [{"delta": {"content": "Hi"}}]}))]
    text, last = ask(model=None)
    assert (text.text, last.model) == ("Hi", None)
    assert peer.seen[1].json["model"] == MODEL


def test_what_a_list_of_models_says_is_shown_plain(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [
        models({"id": "a\x1b[31m" + "b" * 5000}, {"id": "c"}),
        body({"error": {"message": f"\x1b[31mno {TOKEN}"}}, "400 Bad Request"),
    ]
    for _ in range(2):
        with pytest.raises(MistralError) as caught:
            ask(model=None)
        told = str(caught.value)
        assert len(told) < 500
        assert "\x1b" not in told
        assert TOKEN not in told


def test_a_call_that_was_cut_off_is_none(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [stream(delta("Let me see. "), delta(None, "length", tool_calls=[piece(0, '{"ci', "a", "f")]))]
    *_, last = ask(HELLO.with_(max_tokens=3))
    assert (last.finish_reason, last.tool_calls) == ("length", ())


def test_an_error_within_the_stream_keeps_the_text(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [[head(), delta("so far"), frame({"error": {"message": "CUDA out of memory", "code": 500}})]]
    answer = Answer(make(peer), HELLO)
    with pytest.raises(BackendError, match="CUDA out of memory"):
        list(answer)
    assert answer.text == "so far"


def test_a_stream_without_its_end_mark_is_truncated(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [[head(), delta("so far")]]
    with pytest.raises(StreamTruncated):
        ask()


def test_a_server_that_is_not_there_is_named(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.stop_listening()
    with pytest.raises(ConnectionFailed, match=f"127.0.0.1:{peer.port}"):
        ask()
    with pytest.raises(ConnectionFailed, match=f"127.0.0.1:{peer.port} cannot be reached"):
        ask(model=None)


def test_without_a_key_none_is_sent(ask: Callable[..., list[Chunk]], peer: Peer) -> None:
    peer.scripts = [stream(delta("x", "stop"))]
    ask(openai_api_key=None)
    assert "authorization" not in peer.seen[0].headers
