"""What every backend's stream does: two clients on scripted peers, and three ways to a real engine and its model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from mistral_nb import runtime
from mistral_nb.answer import Answer
from mistral_nb.backends import Backend, Local, resolve
from mistral_nb.config import load_settings
from mistral_nb.engine_control import call, status
from mistral_nb.errors import BackendError, ContextOverflow, InvalidRequest, StreamTruncated
from mistral_nb.models import EMBEDDED
from mistral_nb.types import Chunk, GenerationRequest
from tests.backends.scripted import PATIENCE, Peer, body, eventually, frame, head

CAPITAL = ("The ", "capital ", "is ", "Paris", ".")
SCRIPTED = ("workers_ai", "openai")
REAL = ("local", "remote", "openai_of_ours")


@dataclass
class Subject:
    """A backend under test, what prepares its peer for a kind of answer, and whether its peer was left in the middle.

    That is: since `prepare` the client has gone, and an engine generates for nobody, having cut an answer short.
    """

    backend: Backend
    prepare: Callable[[str], None]
    hung_up: Callable[[], bool]
    real: bool = True


def script(dialect: str, kind: str) -> list[Any]:
    """A peer's part. `short` ends with a stop, `long` never ends, `cut` is at its measure, `over` is too long, `split`
    comes byte by byte, `whole` in one piece; `broken` and `ended` stop after some text.
    """
    usage = {"prompt_tokens": 30, "completion_tokens": 5}
    reason = "length" if kind == "cut" else "stop"
    if dialect == "openai":
        pieces = [frame({"choices": [{"delta": {"content": text}}]}) for text in _texts(kind)]
        last = [frame({"choices": [{"delta": {}, "finish_reason": reason}]}), frame({"choices": [], "usage": usage})]
        error = {"error": {"message": "out of memory", "code": 500}}
        whole = {
            "choices": [{"message": {"content": "The capital is Paris."}, "finish_reason": reason}],
            "usage": usage,
        }
        told = "This model's maximum context length is 8192 tokens. However, you requested 20005 tokens (20000 in the "
        over = body({"error": {"message": f"{told}messages, 5 in the completion).", "code": 400}}, "400 Bad Request")
    else:
        pieces = [frame({"response": text}) for text in _texts(kind)]
        end = {"response": "", "usage": usage, "finish_reason": reason}
        last = [frame(end)]
        error = {"errors": [{"message": "out of memory", "code": 3043}], "success": False}
        whole = {"result": {**end, "response": "The capital is Paris."}, "success": True}
        told = "prompt = '20000 tokens': does not fit the context of 8192 tokens"
        over = body({"errors": [{"message": told, "code": 5021}], "success": False}, "413 Too Large")
    answers: dict[str, list[Any]] = {
        "long": [head(), "drip"],
        "over": over,
        "whole": body(whole),
        "broken": [head(), *pieces, frame(error)],
        "ended": [head(), *pieces],
    }
    parts = [*pieces, *last, frame("[DONE]")]
    if kind == "split":
        parts = [bytes([byte]) for byte in b"".join(parts)]
    return answers.get(kind, [head(), *parts])


def _texts(kind: str) -> tuple[str, ...]:
    return ("Grüezi ", "🦊", "漢字") if kind == "split" else CAPITAL


def make(name: str, request: pytest.FixtureRequest) -> Subject:
    if name in REAL:
        local: Local = request.getfixturevalue("engine")
        before = cancelled()

        def hung_up() -> bool:
            return active() == 0 and cancelled() > before

        return Subject(local if name == "local" else reached(name), lambda kind: None, hung_up)
    peer: Peer = request.getfixturevalue("peer")
    if name == "openai":
        peer.drop = frame({"choices": [{"delta": {"content": "drip "}}]})
        settings = load_settings({"openai_base_url": f"http://127.0.0.1:{peer.port}/v1", "retry_deadline": 0})
        client: Backend = resolve(settings, backend="openai", model="mistral-7b").backend
    else:
        client = request.getfixturevalue("client")()

    def prepare(kind: str) -> None:
        peer.gone.clear()
        peer.scripts = [script(name, kind)]

    return Subject(client, prepare, peer.gone.is_set, real=False)


def reached(name: str) -> Backend:
    """The shared engine as a server elsewhere: by its address, or as an OpenAI-compatible one."""
    record = runtime.read_record(EMBEDDED)
    assert record
    if name == "remote":
        return resolve(load_settings({"server_token": record.token}), backend=record.base_url).backend
    settings = load_settings({"openai_base_url": f"{record.base_url}/v1", "openai_api_key": record.token})
    return resolve(settings, backend="openai", model=EMBEDDED).backend


@pytest.fixture(params=[*SCRIPTED, *REAL])
def subject(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


@pytest.fixture(params=SCRIPTED)
def scripted(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


@pytest.fixture(params=REAL)
def real(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


def active() -> int:
    """Requests under way on the shared engine."""
    return sum(engine.health.active for engine in status(load_settings()) if engine.health)


def cancelled() -> int:
    """Requests that the shared engine did not answer to the end, since their clients had gone."""
    record = runtime.read_record(EMBEDDED)
    assert record
    code, health = call(record, "GET", "/health", timeout=PATIENCE)
    assert code == 200
    return int(health["cancelled"])


SHORT = GenerationRequest(prompt="What is the capital of France? Answer in one sentence.", temperature=0)
LONG = GenerationRequest(prompt="Write a very long story.", max_tokens=2000, temperature=0)


def test_text_comes_in_pieces_and_then_one_last_chunk(subject: Subject) -> None:
    subject.prepare("short")
    stream = subject.backend.stream(SHORT)
    *before, last = [chunk for chunk in stream if not chunk.status]
    assert all(chunk.text and chunk.finish_reason is None for chunk in before)
    assert "Paris" in "".join(chunk.text for chunk in before)
    assert (last.text, last.finish_reason) == ("", "stop")
    assert last.usage
    assert last.usage.prompt_tokens > 10
    assert last.usage.completion_tokens >= len(before)
    assert list(stream) == []
    # What comes while a reader stands still is one piece.
    pieces = (len([chunk for chunk in subject.backend.stream(SHORT) if chunk.text]) for _ in range(10))
    assert len(before) > 1 or any(number > 1 for number in pieces)


def test_a_full_measure_of_tokens_ends_with_length(subject: Subject) -> None:
    subject.prepare("cut")
    last = list(subject.backend.stream(SHORT.with_(max_tokens=5)))[-1]
    assert last.finish_reason == "length"
    assert last.usage
    assert last.usage.completion_tokens == 5


def test_an_answer_that_is_not_streamed_is_one_piece(subject: Subject) -> None:
    subject.prepare("whole")
    chunks = [chunk for chunk in subject.backend.stream(SHORT.with_(stream=False)) if not chunk.status]
    assert len(chunks) == 2
    assert "Paris" in chunks[0].text
    assert chunks[1].finish_reason == "stop"
    assert chunks[1].usage


def test_a_failure_before_the_first_text_raises(subject: Subject) -> None:
    subject.prepare("over")
    chunks: list[Chunk] = []
    with pytest.raises(ContextOverflow) as caught:
        chunks.extend(chunk for chunk in subject.backend.stream(SHORT.with_(prompt="word " * 20_000)))
    assert chunks == []
    assert caught.value.limit == 8192
    assert caught.value.prompt_tokens >= 20_000
    assert "shorten it" in str(caught.value)


def test_a_failure_after_the_first_text_keeps_the_text(scripted: Subject) -> None:
    for kind, reason, error in (("broken", "error", BackendError), ("ended", "truncated", StreamTruncated)):
        scripted.prepare(kind)
        answer = Answer(scripted.backend, SHORT)
        chunks: list[Chunk] = []
        with pytest.raises(error) as caught:
            chunks.extend(answer)
        assert answer.text == "".join(CAPITAL)
        assert answer.result.finish_reason == reason
        assert caught.value.result
        assert caught.value.result.text == answer.text
        assert list(answer) == []


def test_characters_that_are_cut_on_the_way_are_whole(scripted: Subject) -> None:
    scripted.prepare("split")
    chunks = list(scripted.backend.stream(SHORT))
    assert [chunk.text for chunk in chunks if chunk.text] == list(_texts("split"))
    assert chunks[-1].usage


def test_characters_of_many_tokens_come_whole(real: Subject) -> None:
    request = GenerationRequest(prompt="🦊🐶" * 5, raw=True, max_tokens=30, temperature=0)
    [whole] = [chunk.text for chunk in real.backend.stream(request.with_(stream=False)) if chunk.text]

    def pieces() -> list[str]:
        found = [chunk.text for chunk in real.backend.stream(request)]
        assert "".join(found) == whole
        return found

    # What comes while a reader stands still is one piece.
    assert any(len(pieces()) > 5 for _ in range(10))
    assert set(whole) <= {"🦊", "🐶"}


SAMPLED = {"prompt": "Name a colour.", "seed": 7, "temperature": 1.2, "top_k": 20, "top_p": 0.9, "max_tokens": 16}
PENALISED = {
    "prompt": "Count: 1 2 3",
    "temperature": 0,
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.5,
    "raw": True,
}
CALLED = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How is the weather in Zürich, and what is 2 + 3?"},
        {
            "role": "assistant",
            "content": '[{"name": "weather", "arguments": {"city": "Zürich"}}, {"name": "add", "arguments": {}}]',
        },
        {"role": "tool", "name": "add", "content": "5"},
        {"role": "tool", "name": "weather", "content": '"sunny"'},
    ],
    "functions": [
        {"name": "weather", "code": "def weather(city: str): ..."},
        {"name": "add", "code": '{"description": "Adds.", "parameters": {"type": "object", "properties": {}}}'},
    ],
    "temperature": 0,
    "max_tokens": 24,
}


@pytest.mark.parametrize("fields", [SAMPLED, PENALISED, CALLED], ids=["sampled", "penalised", "called"])
def test_every_way_to_an_engine_gives_the_same_text(request: pytest.FixtureRequest, fields: dict[str, Any]) -> None:
    asked = GenerationRequest.from_dict({"max_tokens": 24, **fields})
    found = {name: list(make(name, request).backend.stream(asked)) for name in REAL}
    assert len({"".join(chunk.text for chunk in chunks) for chunks in found.values()}) == 1
    assert len({chunks[-1].usage for chunks in found.values()}) == 1
    assert len({(chunks[-1].finish_reason, str(chunks[-1].tool_calls)) for chunks in found.values()}) == 1
    assert found["local"][-1].usage


def test_a_field_that_the_model_cannot_serve_raises(real: Subject) -> None:
    with pytest.raises(InvalidRequest, match="lora"):
        list(real.backend.stream(SHORT.with_(lora="mine")))


def test_a_field_that_the_engine_refuses_is_named_in_its_own_words(real: Subject) -> None:
    functions = [{"name": "f", "code": "{"}]
    with pytest.raises(InvalidRequest) as caught:
        list(real.backend.stream(GenerationRequest.from_dict({"prompt": "Hi", "functions": functions})))
    assert caught.value.field.startswith("functions")
    assert "functions[0] = 'f': its code begins as JSON" in str(caught.value)
    assert "5006" not in str(caught.value)


def test_a_prompt_of_the_greatest_length_is_refused_for_its_tokens(real: Subject) -> None:
    with pytest.raises(ContextOverflow):
        list(real.backend.stream(SHORT.with_(prompt="🦊" * 131_072)))


def test_closing_from_another_thread_ends_a_blocked_read(subject: Subject) -> None:
    subject.prepare("long")
    stream = subject.backend.stream(LONG)
    chunks: list[Chunk] = []
    begun, ended = threading.Event(), threading.Event()

    def reader() -> None:
        for chunk in stream:
            chunks.append(chunk)
            if chunk.text:
                begun.set()
        ended.set()

    threading.Thread(target=reader).start()
    assert begun.wait(PATIENCE)
    stream.close()
    assert ended.wait(PATIENCE)
    assert eventually(subject.hung_up)
    assert "".join(chunk.text for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["cancelled"]
    stream.close()
    assert list(stream) == []


def test_closing_before_the_first_read_cancels_too(subject: Subject) -> None:
    subject.prepare("long")
    stream = subject.backend.stream(LONG)
    stream.close()
    assert [chunk.finish_reason for chunk in stream if not chunk.text and not chunk.status] == ["cancelled"]
    assert not subject.real or eventually(lambda: active() == 0)


def test_closing_in_the_same_thread_cancels(subject: Subject) -> None:
    subject.prepare("long")
    stream = subject.backend.stream(LONG)
    while not next(stream).text:
        pass
    stream.close()
    assert eventually(subject.hung_up)
    assert list(stream)[-1].finish_reason == "cancelled"


def test_closing_after_the_end_changes_nothing(subject: Subject) -> None:
    subject.prepare("short")
    stream = subject.backend.stream(SHORT)
    assert list(stream)[-1].finish_reason == "stop"
    stream.close()
    assert list(stream) == []


def test_a_stream_that_is_dropped_is_cancelled(subject: Subject) -> None:
    subject.prepare("long")
    for chunk in subject.backend.stream(LONG):
        if chunk.text:
            break
    assert eventually(subject.hung_up)


def test_two_streams_at_once_both_get_their_answers(subject: Subject) -> None:
    subject.prepare("short")
    streams = [subject.backend.stream(SHORT) for _ in range(2)]
    texts = ["", ""]
    open_streams = {0, 1}
    while open_streams:
        for number in tuple(open_streams):
            try:
                texts[number] += next(streams[number]).text
            except StopIteration:
                open_streams.discard(number)
    assert texts[0] == texts[1]
    assert "Paris" in texts[0]


def test_an_answer_after_a_cancelled_one_is_whole(subject: Subject) -> None:
    subject.prepare("long")
    first = subject.backend.stream(LONG)
    while not next(first).text:
        pass
    first.close()
    subject.prepare("short")
    assert list(subject.backend.stream(SHORT))[-1].finish_reason == "stop"


def test_the_backend_says_who_answers(subject: Subject) -> None:
    subject.prepare("short")
    list(subject.backend.stream(SHORT))
    said = subject.backend.describe()
    assert said.backend == subject.backend.name
    assert said.model
    assert said.device
    assert said.stand_in_for == ("Mistral-7B-Instruct" if said.backend in ("local", "remote") else "")
