"""`AI().run(...)`: the Worker binding in Python, on a scripted peer and on the local engine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import AI, ConfigurationError, ContextOverflow, InvalidRequest, MistralError, StreamTruncated
from mistral_nb.binding import EventStream
from tests.backends.scripted import TOKEN, Peer, body, eventually, frame, head

MODEL = "@hf/mistral/mistral-7b-instruct-v0.2"
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
CALLS = [{"name": "weather", "arguments": {"city": "Zürich"}}]


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def ai(peer: Peer) -> AI:
    return AI(
        cloudflare_account_id="0123456789abcdef0123456789abcdef",
        cloudflare_api_token=TOKEN,
        cloudflare_base_url=peer.url,
        cloudflare_trust_base_url=True,
        retry_deadline=0,
    )


def events(stream: Iterator[bytes]) -> list[Any]:
    """The data of each event; whatever is no event of one line fails."""
    found = []
    for event in stream:
        assert event.startswith(b"data: ")
        assert event.endswith(b"\n\n")
        assert event.count(b"\n") == 2
        data = event.removeprefix(b"data: ").decode()
        found.append(data.strip() if data == "[DONE]\n\n" else json.loads(data))
    return found


def test_half_a_character_is_no_failure(ai: AI, peer: Peer) -> None:
    calls = b'data: {"tool_calls":[{"name":"f","arguments":{"x":"\\ud83d"}}]}\n\n'
    peer.scripts = [
        [head(), b'data: {"response":"\\ud83d"}\n\ndata: {"response":"\\ude00"}\n\n', calls, frame("[DONE]")],
    ]
    end = {"response": "", "tool_calls": [{"name": "f", "arguments": {"x": "�"}}]}
    assert events(ai.run(MODEL, {"prompt": "Hi", "stream": True})) == [{"response": "😀"}, end, "[DONE]"]


def test_the_inputs_go_to_the_model_that_is_named_as_they_are(ai: AI, peer: Peer) -> None:
    peer.scripts = [body({"result": {"response": "Hello", "usage": USAGE}, "success": True})]
    inputs = {"messages": [{"role": "user", "content": "Grüezi"}], "raw": "true", "lora": "mine", "seed": 7}
    assert ai.run(MODEL, inputs) == {"response": "Hello", "usage": USAGE}
    seen = peer.seen[0]
    assert seen.line.startswith(f"POST /client/v4/accounts/0123456789abcdef0123456789abcdef/ai/run/{MODEL} ")
    assert {name: seen.json[name] for name in inputs} == {**inputs, "raw": True}
    assert seen.json["stream"] is False


def test_calls_of_functions_are_in_the_answer(ai: AI, peer: Peer) -> None:
    peer.scripts = [body({"result": {"response": None, "tool_calls": CALLS}, "success": True})]
    functions = [{"name": "weather", "code": "def weather(city: str): ..."}]
    assert ai.run(MODEL, {"prompt": "Weather?", "functions": functions}) == {"response": "", "tool_calls": CALLS}
    assert peer.seen[0].json["functions"] == functions


@pytest.mark.parametrize("wanted", [True, "true"])
def test_a_stream_is_the_bytes_of_its_events(ai: AI, peer: Peer, wanted: Any) -> None:
    end = {"response": "", "tool_calls": CALLS, "usage": USAGE}
    peer.scripts = [[head(), *(frame({"response": text, "p": "ab"}) for text in "Aé🦊"), frame(end), frame("[DONE]")]]
    stream = ai.run(MODEL, {"prompt": "Hi", "stream": wanted})
    assert isinstance(stream, EventStream)
    assert events(stream) == [*({"response": text} for text in "Aé🦊"), end, "[DONE]"]
    assert list(stream) == []


def test_an_openai_compatible_server_gives_the_same_bytes(peer: Peer) -> None:
    pieces = [{"index": 0, "id": "a", "function": {"name": "weather", "arguments": ""}}]
    pieces += [{"index": 0, "function": {"arguments": part}} for part in ('{"city":', ' "Zürich"}')]
    deltas = [{"content": "Let me look."}, *({"tool_calls": [piece]} for piece in pieces)]
    usage = frame({"choices": [], "usage": USAGE})
    peer.scripts = [[head(), *(frame({"choices": [{"delta": delta}]}) for delta in deltas), usage, frame("[DONE]")]]
    ai = AI("openai", "mistral-7b", openai_base_url=f"http://127.0.0.1:{peer.port}/v1")
    assert events(ai.run(MODEL, {"prompt": "Weather?", "stream": True})) == [
        {"response": "Let me look."},
        {"response": "", "tool_calls": CALLS, "usage": USAGE},
        "[DONE]",
    ]
    assert peer.seen[0].json["model"] == "mistral-7b"


@pytest.mark.parametrize("leave", ["close", "with", "drop"])
def test_leaving_a_stream_cancels_it(ai: AI, peer: Peer, leave: str) -> None:
    peer.scripts = [[head(), "drip"]]
    stream = ai.run(MODEL, {"prompt": "Hi", "stream": True})
    assert next(stream).startswith(b"data: ")
    if leave == "close":
        stream.close()
        assert "[DONE]" not in events(stream)
    elif leave == "with":
        with stream:
            next(stream)
    else:
        del stream
    assert eventually(peer.gone.is_set, 1.0)


def test_a_stream_that_breaks_off_raises_after_its_text(ai: AI, peer: Peer) -> None:
    peer.scripts = [[head(), frame({"response": "so far"})]]
    stream = ai.run(MODEL, {"prompt": "Hi", "stream": True})
    assert next(stream) == b'data: {"response":"so far"}\n\n'
    with pytest.raises(StreamTruncated) as caught:
        next(stream)
    assert caught.value.result
    assert caught.value.result.text == "so far"
    assert list(stream) == []


@pytest.mark.parametrize(
    ("inputs", "field"),
    [
        ({}, "prompt"),
        ({"prompt": "Hi", "max_token": 3}, "max_token"),
        ({"prompt": "Hi", "lora": None}, "lora"),
        ("Hi", "inputs"),
        ({"prompt": "Hi", "stop": ["."]}, "stop"),
    ],
)
def test_wrong_inputs_are_named_before_anything_is_sent(ai: AI, peer: Peer, inputs: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ai.run(MODEL, inputs)
    assert caught.value.field == field
    assert peer.seen == []


def test_wrong_settings_and_models_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="'retry_deadlin' in AI is not a setting; did you mean"):
        AI(retry_deadlin=3)
    with pytest.raises(ConfigurationError, match="CLOUDFLARE_ACCOUNT_ID"):
        AI().run(MODEL, {"prompt": "Hi"})


def test_the_token_shows_nowhere(ai: AI, peer: Peer) -> None:
    peer.scripts = [body({"errors": [{"message": "no", "code": 10000}], "success": False}, "401 Unauthorized")]
    with pytest.raises(MistralError) as caught:
        ai.run(MODEL, {"prompt": "Hi"})
    assert peer.seen[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in f"{ai!r}{vars(ai)}{caught.value!r}{vars(caught.value)}"
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(ai)


def test_code_for_cloudflare_runs_on_the_local_engine(embedded: Path) -> None:
    ai = AI("local", "embedded")
    whole = ai.run(
        MODEL, {"prompt": "What is the capital of France? Answer in one sentence.", "temperature": 0, "max_tokens": 12}
    )
    assert "Paris" in whole["response"]
    assert whole["usage"]["completion_tokens"] <= 12
    *pieces, last, done = events(
        ai.run(
            MODEL,
            {
                "prompt": "What is the capital of France? Answer in one sentence.",
                "temperature": 0,
                "max_tokens": 12,
                "stream": True,
            },
        )
    )
    assert "".join(piece["response"] for piece in pieces) == whole["response"]
    assert last == {"response": "", "usage": whole["usage"]}
    assert done == "[DONE]"
    with pytest.raises(ContextOverflow):
        ai.run(MODEL, {"prompt": "word " * 20_000})
