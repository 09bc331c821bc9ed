"""What every backend's stream does: the Workers AI client on a scripted peer, and the local engine with its model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mistral_nb.backends import Backend, Local, WorkersAI
from mistral_nb.config import load_settings
from mistral_nb.engine_control import status
from mistral_nb.errors import ContextOverflow, InvalidRequest
from mistral_nb.types import Chunk, GenerationRequest
from tests.backends.scripted import PATIENCE, Peer, body, eventually, frame, head

BOUND = 0.2


@dataclass
class Subject:
    """A backend under test, what prepares its peer for a kind of answer, and whether its peer is at rest."""

    backend: Backend
    prepare: Callable[[str], None]
    at_rest: Callable[[], bool]


def script(kind: str) -> list[Any]:
    """A peer's part. `short` ends with a stop, `long` never ends, `cut` is at its measure, `over` is too long."""
    usage = {"prompt_tokens": 30, "completion_tokens": 5}
    pieces = [frame({"response": text}) for text in ("The ", "capital ", "is ", "Paris", ".")]
    last = {"response": "", "usage": usage, "finish_reason": "length" if kind == "cut" else "stop"}
    if kind == "over":
        message = "prompt = '20000 tokens': does not fit the context of 8192 tokens"
        return body({"errors": [{"message": message, "code": 5021}], "success": False}, "413 Too Large")
    if kind == "whole":
        return body({"result": {**last, "response": "The capital is Paris."}, "success": True})
    return [head(), "drip"] if kind == "long" else [head(), *pieces, frame(last), frame("[DONE]")]


@pytest.fixture(params=["workers_ai", "local"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "local":
        engine: Local = request.getfixturevalue("engine")
        yield Subject(engine, lambda kind: None, lambda: active() == 0)
        return
    peer: Peer = request.getfixturevalue("peer")
    client: WorkersAI = request.getfixturevalue("client")()

    def prepare(kind: str) -> None:
        peer.gone.clear()
        peer.scripts = [script(kind)]

    yield Subject(client, prepare, peer.gone.is_set)


def active() -> int:
    """Requests under way on the shared engine."""
    return sum(engine.health.active for engine in status(load_settings()) if engine.health)


SHORT = GenerationRequest(prompt="What is the capital of France? Answer in one sentence.", temperature=0)
LONG = GenerationRequest(prompt="Write a very long story.", max_tokens=2000, temperature=0)


def test_text_comes_in_pieces_and_then_one_last_chunk(subject: Subject) -> None:
    subject.prepare("short")
    stream = subject.backend.stream(SHORT)
    chunks = list(stream)
    *before, last = [chunk for chunk in chunks if not chunk.status]
    assert len(before) > 1
    assert all(chunk.text and chunk.finish_reason is None for chunk in before)
    assert "Paris" in "".join(chunk.text for chunk in before)
    assert (last.text, last.finish_reason) == ("", "stop")
    assert last.usage
    assert last.usage.prompt_tokens > 10
    assert last.usage.completion_tokens >= len(before)
    assert list(stream) == []


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


def test_a_field_that_the_model_cannot_serve_raises(engine: Local) -> None:
    with pytest.raises(InvalidRequest, match="lora"):
        list(engine.stream(SHORT.with_(lora="mine")))


def test_a_field_that_the_engine_refuses_is_named_in_its_own_words(engine: Local) -> None:
    functions = [{"name": "f", "code": "1"}]
    with pytest.raises(InvalidRequest) as caught:
        list(engine.stream(GenerationRequest.from_dict({"prompt": "Hi", "functions": functions})))
    assert caught.value.field == "functions"
    assert str(caught.value).startswith("functions = ")
    assert "5006" not in str(caught.value)


def test_a_prompt_of_the_greatest_length_is_refused_for_its_tokens(engine: Local) -> None:
    with pytest.raises(ContextOverflow):
        list(engine.stream(SHORT.with_(prompt="🦊" * 131_072)))


def test_closing_from_another_thread_ends_a_blocked_read_at_once(subject: Subject) -> None:
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
    start = time.perf_counter()
    stream.close()
    assert ended.wait(BOUND)
    print(f"closed after {(time.perf_counter() - start) * 1e3:.1f} ms (the bound is {BOUND * 1e3:.0f} ms)")
    assert eventually(subject.at_rest, BOUND)
    assert "".join(chunk.text for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["cancelled"]
    stream.close()
    assert list(stream) == []


def test_closing_before_the_first_read_cancels_too(subject: Subject) -> None:
    subject.prepare("long")
    stream = subject.backend.stream(LONG)
    stream.close()
    assert [chunk.finish_reason for chunk in stream if not chunk.text and not chunk.status] == ["cancelled"]
    assert not isinstance(subject.backend, Local) or eventually(subject.at_rest, PATIENCE)


def test_closing_in_the_same_thread_cancels(subject: Subject) -> None:
    subject.prepare("long")
    stream = subject.backend.stream(LONG)
    while not next(stream).text:
        pass
    stream.close()
    assert eventually(subject.at_rest, BOUND)
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
    assert eventually(subject.at_rest, BOUND)


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
    start = time.perf_counter()
    chunks = list(subject.backend.stream(SHORT))
    print(f"the next answer took {time.perf_counter() - start:.2f} s")
    assert chunks[-1].finish_reason == "stop"


def test_the_backend_says_who_answers(subject: Subject) -> None:
    subject.prepare("short")
    list(subject.backend.stream(SHORT))
    said = subject.backend.describe()
    assert said.backend == subject.backend.name
    assert said.model
    assert said.device
    assert said.stand_in_for == ("Mistral-7B-Instruct" if isinstance(subject.backend, Local) else "")
