"""The wire's frames, split anywhere, as they were seen in the wild."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from mistral_nb.backends.wire import DONE, PeerFailure, Reading, frames
from mistral_nb.backends.workers_ai import WorkersAI
from mistral_nb.types import Chunk, GenerationRequest, Usage
from tests.backends.scripted import Peer, head

BODY = (
    'data: {"response":"Grüße","p":"abcdefgh"}\r\n\r\n'
    ": a comment\r\n\r\n"
    'data: {"response":" 日本 🙂"}\n\n'
    "event: message\ndata: [DONE]\n\ndata: [DONE]"
).encode()
DATA = ['{"response":"Grüße","p":"abcdefgh"}', '{"response":" 日本 🙂"}', DONE, DONE]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_frames_come_out_whole_whatever_the_size_of_the_parts(size: int) -> None:
    assert list(frames(BODY[at : at + size] for at in range(0, len(BODY), size))) == DATA


def test_frames_come_out_whole_wherever_they_are_split() -> None:
    for at in range(len(BODY) + 1):
        assert list(frames([BODY[:at], BODY[at:]])) == DATA, f"split at byte {at}"


def test_a_byte_order_mark_before_the_first_event_takes_nothing_from_it() -> None:
    data = b"\xef\xbb\xbf" + BODY
    for at in range(5):
        assert list(frames([data[:at], data[at:]])) == DATA, f"split at byte {at}"


KINDS = (
    {"response": "Hello", "p": "abcdefgh"},
    {"response": "", "tool_calls": [], "p": "abdef"},
    {"tool_calls": [], "p": "abdefgh"},
    {"response": 1},
    {"response": "é日🙂", "usage": {"prompt_tokens": 9, "completion_tokens": 1}},
    {"choices": [{"index": 0, "delta": {"content": " you"}, "finish_reason": None}], "object": "chat.completion.chunk"},
    {"response": "", "finish_reason": "length"},
    {"response": None, "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}},
)
WIRE = "".join(f"data: {json.dumps(kind, ensure_ascii=False)}\n\n" for kind in KINDS) + "data: [DONE]\n\ndata: [DONE]"
READ = ("Hello1é日🙂 you", Chunk(finish_reason="length", usage=Usage(9, 4)))


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_every_kind_of_frame_split_at_every_byte(end: str) -> None:
    data = WIRE.replace("\n", end).encode()
    for at in range(len(data) + 1):
        *read, done, again = frames([data[:at], data[at:]])
        assert (done, again) == (DONE, DONE)
        reading = Reading()
        assert ("".join(map(reading.frame, read)), reading.last(100)) == READ, f"split at byte {at}"


def test_the_same_over_a_socket(peer: Peer, client: Callable[..., WorkersAI]) -> None:
    """Two segments for each byte at which the answer can be split, its HTTP head included."""
    data = head() + WIRE.encode()
    peer.scripts = [[data[:at], data[at:]] for at in range(1, len(data))]
    backend = client()
    for at in range(1, len(data)):
        *texts, last = backend.stream(GenerationRequest(prompt="Hello"))
        assert ("".join(chunk.text for chunk in texts), last) == READ, f"split at byte {at}"
    assert len(peer.seen) == len(data) - 1


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"], ids=["one line", "LF", "CRLF", "CR"])
def test_an_event_without_an_end_is_given_up(end: bytes) -> None:
    with pytest.raises(PeerFailure, match="16 MiB"):
        list(frames(itertools.repeat(b"data: " + b"x" * (1 << 20) + end, 40)))


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_an_answer_of_many_events_may_be_longer(end: bytes) -> None:
    event = b"data: " + b"x" * (1 << 20) + end
    assert sum(1 for _ in frames(part for _ in range(18) for part in (event, end))) == 18


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (["\\ud83d", "\\ude00"], "😀"),
        (["a\\ud83d", "", "\\ude00b"], "a😀b"),
        (["\\ud83d", "b"], "�b"),
        (["\\ude00", "b"], "�b"),
        (["\\ud83d\\ud83d", "\\ude00"], "�😀"),
        (["a", "\\ud83d"], "a"),
    ],
)
def test_a_character_in_two_halves(parts: list[str], text: str) -> None:
    reading = Reading()
    assert "".join(reading.frame(f'{{"response":"{part}"}}') for part in parts) == text


def test_half_a_character_elsewhere() -> None:
    assert Reading().body('{"response":"a\\ud83d"}') == "a�"
    reading = Reading()
    reading.frame('{"tool_calls":[{"name":"f","arguments":{"x":"\\ud83d"}}]}')
    assert reading.tool_calls == ({"name": "f", "arguments": {"x": "�"}},)
    with pytest.raises(PeerFailure, match="no � here"):
        reading.frame('{"error":"no \\ud83d here"}')


def test_a_frame_is_given_as_soon_as_it_is_complete() -> None:
    taken = []

    def parts() -> Any:
        for part in (b'data: {"response":"a"}\n\n', b'data: {"response":"b"}\n\n'):
            taken.append(part)
            yield part

    stream = frames(parts())
    assert next(stream) == '{"response":"a"}'
    assert len(taken) == 1


def test_only_newlines_end_a_line_of_a_frame() -> None:
    """JSON may hold the others as they are: U+2028, U+0085 and what `str.splitlines` splits at besides."""
    data = json.dumps({"response": "a\u2028b\u2029c\x85d\x7fe"}, ensure_ascii=False)
    assert list(frames([f"data: {data}\n\n".encode()])) == [data]


def read(*data: Any) -> tuple[str, Chunk]:
    reading = Reading()
    text = "".join(reading.frame(json.dumps(item)) for item in data)
    return text, reading.last(max_tokens=100)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"response": "Hello", "p": "abcdefgh"}, "Hello"),
        ({"response": "", "tool_calls": [], "p": "abdef"}, ""),
        ({"tool_calls": [], "p": "abdefgh"}, ""),
        ({"response": 1}, "1"),
        ({"response": 1.5}, "1.5"),
        ({"response": True}, "true"),
        ({"response": None, "usage": {"prompt_tokens": 1, "completion_tokens": 2}}, ""),
        ({"response": {"colour": "grün"}}, '{"colour": "grün"}'),
        ({"choices": [{"delta": {"content": "Hi"}, "finish_reason": None}]}, "Hi"),
        ({"choices": [{"delta": {"role": "assistant"}}]}, ""),
        ({"choices": [{"text": "Hi"}]}, "Hi"),
        ({"choices": []}, ""),
    ],
)
def test_the_text_of_each_form_of_frame(data: Any, text: str) -> None:
    assert read(data)[0] == text


def test_the_last_usage_counts_and_a_reason_midway_is_no_end() -> None:
    text, last = read(
        {"response": "a", "usage": {"prompt_tokens": 5, "completion_tokens": 1}},
        {"response": "b", "finish_reason": "length", "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
        {"response": "c"},
        {"response": None, "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}},
    )
    assert text == "abc"
    assert last == Chunk(finish_reason="length", usage=Usage(5, 3))


def test_calls_are_collected_and_are_the_reason() -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    text, last = read({"response": "Well"}, {"tool_calls": [call]}, {"response": "", "finish_reason": "stop"})
    assert text == "Well"
    assert last == Chunk(finish_reason="tool_calls", tool_calls=(call,))


@pytest.mark.parametrize(
    ("usage", "reason"),
    [({"prompt_tokens": 5, "completion_tokens": 100}, "length"), ({"completion_tokens": 99}, "stop"), ({}, "stop")],
)
def test_without_a_reason_a_full_measure_of_tokens_means_length(usage: Any, reason: str) -> None:
    assert read({"response": "a", "usage": usage})[1].finish_reason == reason


def test_neurons_are_read_where_usage_holds_them() -> None:
    assert (
        read({"response": "a", "usage": {"prompt_tokens": 1, "completion_tokens": 1, "neurons": 2.5}})[1].neurons == 2.5
    )


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": float("nan")}, {"completion_tokens": 1.5}, None, 7, {"prompt_tokens": "many"}, []]
)
def test_usage_that_cannot_be_read_is_unknown(usage: Any) -> None:
    assert read({"response": "a", "usage": usage})[1].usage is None


@pytest.mark.parametrize("amount", [10**400, -1, True, float("inf"), [1]])
def test_an_amount_that_is_none_is_unknown(amount: Any) -> None:
    usage = {"prompt_tokens": amount, "completion_tokens": 1, "neurons": amount}
    last = read({"response": "a", "usage": usage})[1]
    assert (last.usage, last.neurons) == (None, None)


@pytest.mark.parametrize(
    "more",
    [
        {"finish_reason": ["stop"]},
        {"finish_reason": 7, "tool_calls": 5},
        {"tool_calls": True},
        {"tool_calls": {"name": "f"}},
        {"choices": [{"delta": "x", "message": [1]}]},
        {"choices": [{"delta": {"tool_calls": 5}, "finish_reason": {}}], "model": 7},
        {"choices": "x"},
        {"choices": [["x"]], "model": {}},
    ],
)
def test_a_field_of_another_kind_is_left_out(more: Any) -> None:
    reading = Reading()
    assert "".join(reading.frame(json.dumps(data)) for data in ({"response": "a"}, more)) == "a"
    assert (reading.model, reading.last(100)) == (None, Chunk(finish_reason="stop"))


@pytest.mark.parametrize(
    ("data", "message", "code"),
    [
        ('{"errors":[{"message":"AiError: no","code":3040}],"success":false}', "AiError: no", 3040),
        ('{"error":"broken"}', "broken", None),
        ('{"error":{"message":"broken","code":"5006"}}', "broken", 5006),
        ('{"errors":["broken"]}', "broken", None),
        ('{"success":false,"errors":[]}', "no reason given", None),
        ('{"object":"error","message":"broken","code":404}', "broken", 404),
        ('{"detail":"Not Found"}', "Not Found", None),
        ('{"detail":[{"loc":["body","top_p"],"msg":"too small"}]}', "too small", None),
        ('{"error":{"message":"broken","code":"%s"}}' % ("9" * 5000), "broken", None),
        ('{"error":{"message":"broken","code":[5006]}}', "broken", None),
        ('{"error":{"message":["broken"]}}', "broken", None),
        ('{"error":"%s"}' % ("broken" * 9000), "^(broken){9000}$", None),
        ("[" * 100_000, "not a JSON object", None),
        ('{"error":' + "[" * 100_000 + "]" * 100_000 + "}", "not a JSON object", None),
        ('{"response":"half', "not a JSON object", None),
        ("17", "not a JSON object", None),
    ],
)
def test_an_error_frame_raises(data: str, message: str, code: int | None) -> None:
    with pytest.raises(PeerFailure, match=message) as caught:
        Reading().frame(data)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "data",
    [
        {"result": {"response": "Hi", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}, "success": True},
        {"response": "Hi", "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
        {
            "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        },
    ],
)
def test_a_whole_answer_in_its_envelopes(data: Any) -> None:
    reading = Reading()
    assert reading.body(json.dumps(data)) == "Hi"
    assert reading.last(100) == Chunk(finish_reason="stop", usage=Usage(1, 2))


@pytest.mark.parametrize("data", ['{"result":{},"success":true}', '{"result":null,"success":true}', "[]", "<html>"])
def test_a_whole_answer_without_a_response_is_a_failure(data: str) -> None:
    with pytest.raises(PeerFailure):
        Reading().body(data)
