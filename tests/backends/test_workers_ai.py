"""The Workers AI client against a real socket that plays scripts."""

from __future__ import annotations

import collections
import contextlib
import logging
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from mistral_nb.answer import Answer
from mistral_nb.backends.pump import Line
from mistral_nb.backends.workers_ai import Timeouts, WorkersAI, cloudflare
from mistral_nb.config import load_settings
from mistral_nb.errors import (
    BackendError,
    ConfigurationError,
    ConnectionFailed,
    InvalidRequest,
    MistralError,
    RateLimited,
    RequestTimeout,
    StreamTruncated,
)
from mistral_nb.types import Chunk, GenerationRequest, Usage
from tests.backends.scripted import (
    PATIENCE,
    TOKEN,
    Peer,
    body,
    frame,
    full_house,
    head,
    interrupt,
    wait_for,
)

Make = Callable[..., WorkersAI]
HELLO = GenerationRequest(prompt="Hello")
CANCELLED = [Chunk(finish_reason="cancelled")]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def collect(backend: WorkersAI, request: GenerationRequest = HELLO) -> tuple[list[Chunk], MistralError | None]:
    chunks: list[Chunk] = []
    try:
        for chunk in backend.stream(request):
            chunks.append(chunk)
    except MistralError as error:
        return chunks, error
    return chunks, None


def test_a_streamed_answer_and_what_was_asked(peer: Peer, client: Make) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    peer.scripts = [
        [
            head("200 OK", "text/event-stream", "x-mistral-nb-model: the%20one"),
            frame({"response": "Hel", "p": "abc"}),
            frame({"response": "lo "}),
            frame({"response": 1}),
            frame({"response": None, "usage": usage}),
            frame("[DONE]"),
            frame("[DONE]"),
        ]
    ]
    chunks, error = collect(client(), GenerationRequest(prompt="Hi", seed=5, temperature=0))
    assert error is None
    assert [chunk.text for chunk in chunks] == ["Hel", "lo ", "1", ""]
    assert chunks[-1] == Chunk(finish_reason="stop", usage=Usage(7, 3), model="the one")
    [seen] = peer.seen
    account = "0123456789abcdef0123456789abcdef"
    path = f"/client/v4/accounts/{account}/ai/run/@cf/mistral/mistral-7b-instruct-v0.2-lora"
    assert seen.line == f"POST {path} HTTP/1.1"
    assert seen.headers["authorization"] == f"Bearer {TOKEN}"
    assert seen.headers["content-type"] == "application/json"
    assert seen.json == {"prompt": "Hi", "seed": 5, "temperature": 0, "max_tokens": 256, "stream": True}


def test_the_last_chunk_has_what_it_cost_and_the_id_of_the_request(peer: Peer, client: Make) -> None:
    ids = ("cf-ray: 8a1b-FRA", "cf-ai-req-id: f00d", "cf-ai-neurons: 12.5")
    peer.scripts = [[head("200 OK", "text/event-stream", *ids), frame({"response": "a"}), frame("[DONE]")]]
    answer = Answer(client(), HELLO)
    assert list(answer) == [
        Chunk(text="a", request_id="f00d"),
        Chunk(finish_reason="stop", neurons=12.5, request_id="f00d"),
    ]
    assert (answer.result.neurons, answer.result.request_id) == (12.5, "f00d")
    peer.scripts = [[head("200 OK", "text/event-stream", ids[0], "cf-ai-neurons: many"), frame("[DONE]")]]
    assert collect(client())[0] == [Chunk(finish_reason="stop", request_id="8a1b-FRA")]


def test_functions_are_sent_as_they_were_given(peer: Peer, client: Make) -> None:
    call = {"name": "grüße", "arguments": {"wer": "dich", "wie": {"oft": 2}}}
    peer.scripts = [[head(), frame({"response": "", "tool_calls": [call]}), frame("[DONE]")]]
    functions = [{"name": "grüße", "code": "function grüße(wer) {\n  return `Hallo ${wer}`;\n}"}]
    chunks, error = collect(client(), GenerationRequest.from_dict({"prompt": "Hi", "functions": functions}))
    assert error is None
    assert peer.seen[0].json["functions"] == functions
    assert chunks == [Chunk(finish_reason="tool_calls", tool_calls=(call,))]


def test_one_byte_at_a_time(peer: Peer, client: Make) -> None:
    stream = frame({"response": "Grüße 🙂"}).replace(b"\n", b"\r\n") + b"data: [DONE]"
    peer.scripts = [[head(), *(stream[at : at + 1] for at in range(len(stream)))]]
    chunks, error = collect(client())
    assert error is None
    assert text_of(chunks) == "Grüße 🙂"
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("asked", [True, False])
def test_plain_json_is_read_whatever_was_asked_for(peer: Peer, client: Make, asked: bool) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    peer.scripts = [body({"result": {"response": "Hi", "usage": usage}, "success": True, "errors": [], "messages": []})]
    chunks, error = collect(client(), GenerationRequest(prompt="Hello", stream=asked))
    assert error is None
    assert chunks == [Chunk(text="Hi"), Chunk(finish_reason="stop", usage=Usage(1, 2))]
    assert peer.seen[0].json["stream"] is asked


@pytest.mark.parametrize("cut", [(), ("reset",)])
def test_an_end_without_a_mark_is_a_truncation_that_keeps_the_text(peer: Peer, client: Make, cut: Any) -> None:
    read = threading.Event()
    peer.scripts = [[head(), frame({"response": "Hel", "finish_reason": "stop"}), read, *cut]]
    stream = client().stream(HELLO)
    assert next(stream).text == "Hel"
    read.set()
    assert next(stream) == Chunk(finish_reason="truncated")
    with pytest.raises(StreamTruncated, match="kept"):
        next(stream)
    assert list(stream) == []


def test_a_chunked_body_that_breaks_off_is_a_truncation(peer: Peer, client: Make) -> None:
    piece = frame({"response": "Hel"})
    start = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    peer.scripts = [[start + f"{len(piece):x}\r\n".encode() + piece + b"\r\n"]]
    chunks, error = collect(client())
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("Hel", None), ("", "truncated")]
    assert isinstance(error, StreamTruncated)


def test_an_error_frame_after_text_ends_the_answer_with_error(peer: Peer, client: Make) -> None:
    failure = {"errors": [{"message": "AiError: out of capacity", "code": 3040}], "success": False}
    peer.scripts = [[head(), frame({"response": "Hel"}), frame(failure)]]
    chunks, error = collect(client())
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("Hel", None), ("", "error")]
    assert isinstance(error, RateLimited)
    assert error.code == 3040


def test_an_error_frame_before_any_text_just_raises(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), frame({"response": ""}), frame({"error": "broken"})]]
    chunks, error = collect(client())
    assert chunks == []
    assert isinstance(error, BackendError)


def test_text_is_sent_as_utf_8(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), frame({"response": "x"}), frame("[DONE]")]]
    collect(client(), GenerationRequest(prompt="🦊" * 1000))
    assert peer.seen[0].json["prompt"] == "🦊" * 1000
    assert len(peer.seen[0].body) < 4200


@pytest.mark.parametrize(
    ("url", "device"),
    [("https://api.cloudflare.com/client/v4", "Workers AI"), ("https://gw.example.com/v1", "gw.example.com")],
)
def test_only_cloudflares_own_address_is_workers_ai(client: Make, url: str, device: str) -> None:
    assert client(base_url=url).describe().device == device


def test_nobody_there(client: Make) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        port = taken.getsockname()[1]
        chunks, error = collect(client(base_url=f"http://127.0.0.1:{port}"))
    assert chunks == []
    assert isinstance(error, ConnectionFailed)
    assert f"127.0.0.1:{port}" in str(error)


@pytest.mark.parametrize("script", [["reset"], [], [head()[:20]], [head(), b""]])
def test_a_connection_that_breaks_before_the_first_text(peer: Peer, client: Make, script: Any) -> None:
    peer.scripts = [script]
    chunks, error = collect(client())
    assert chunks == []
    assert isinstance(error, ConnectionFailed | StreamTruncated)


def test_a_peer_that_takes_no_connection_is_given_up(client: Make) -> None:
    with full_house() as port:
        error = collect(client(base_url=f"http://127.0.0.1:{port}", timeouts=Timeouts(0.2, 30, 30)))[1]
    assert isinstance(error, RequestTimeout)
    assert "0.2 s" in str(error)
    assert "connect_timeout" in str(error)


@pytest.mark.parametrize("script", [["hold"], [head(), "hold"], [head(), b": comment\n\n", "hold"]])
def test_the_first_text_has_a_limit_of_its_own(peer: Peer, client: Make, script: Any) -> None:
    peer.scripts = [script]
    chunks, error = collect(client(timeouts=Timeouts(30, 0.5, 30)))
    assert chunks == []
    assert isinstance(error, RequestTimeout)
    assert "first_token_timeout" in str(error)
    assert peer.gone.wait(PATIENCE)


def test_silence_after_the_first_text_has_another(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), frame({"response": "Hel"}), "hold"]]
    chunks, error = collect(client(timeouts=Timeouts(30, 30, 0.2)))
    assert [(chunk.text, chunk.finish_reason) for chunk in chunks] == [("Hel", None), ("", "error")]
    assert isinstance(error, RequestTimeout)
    assert "stall_timeout" in str(error)


def test_no_limit_strikes_while_text_keeps_coming(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), "drip"]]

    def spared(limit: float) -> bool:
        with contextlib.closing(client(timeouts=Timeouts(30, limit, limit)).stream(HELLO)) as stream:
            end = time.monotonic() + 2 * limit
            while time.monotonic() < end:
                if (chunk := next(stream)).finish_reason == "error":
                    return False
                assert chunk.text == "drip "
        return True

    assert any(spared(limit) for limit in (0.4, 1.5, 5, 25))


def test_what_is_no_text_counts_as_a_sign_of_life(peer: Peer, client: Make) -> None:
    last = [frame({"response": "lo"}), frame("[DONE]")]

    def spared(limit: float) -> bool:
        signs: list[Any] = [lambda: threading.Event().wait(limit / 3), b": still here\n\n"] * 5
        peer.scripts = [[head(), frame({"response": "Hel"}), *signs, *last]]
        chunks, error = collect(client(timeouts=Timeouts(30, 30, limit)))
        return error is None and text_of(chunks) == "Hello"

    assert any(spared(limit) for limit in (0.3, 1.5, 5, 25))


def closed_while_reading(backend: WorkersAI, reached: Callable[[], None] | None = None) -> list[Chunk]:
    """Closes a stream from this thread while another one reads it, which alone ends that; the chunks that it read.

    It is closed once `reached` returns, else once there is text.
    """
    stream = backend.stream(HELLO)
    chunks: list[Chunk] = []
    begun = threading.Event()

    def reader() -> None:
        for chunk in stream:
            chunks.append(chunk)
            begun.set()

    thread = threading.Thread(target=reader)
    thread.start()
    if reached is None:
        wait_for(begun)
    else:
        reached()
    stream.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    return chunks


def test_closing_wakes_a_reader_that_waits_for_a_connection(client: Make) -> None:
    with full_house() as port:
        backend = client(base_url=f"http://127.0.0.1:{port}")
        assert closed_while_reading(backend, lambda: None) == CANCELLED


def test_a_connection_that_is_made_after_closing_is_cut_at_once() -> None:
    line = Line()
    line.hang_up()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line.attach(ours)
        theirs.settimeout(PATIENCE)
        assert theirs.recv(1) == b""
        line.release()


def test_closing_wakes_a_reader_in_a_tls_handshake(client: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        accepted: list[socket.socket] = []

        def in_handshake() -> None:
            accepted.append(silent.accept()[0])
            assert accepted[0].recv(1)

        assert closed_while_reading(client(base_url=f"https://127.0.0.1:{port}"), in_handshake) == CANCELLED
        with accepted[0] as peer:
            peer.settimeout(PATIENCE)
            while peer.recv(4096):
                pass


@pytest.mark.parametrize("script", [["hold"], [head(), "hold"], [head(), frame({"response": ""}), "hold"]])
def test_closing_wakes_a_reader_before_the_first_text_and_hangs_up(peer: Peer, client: Make, script: Any) -> None:
    peer.scripts = [script]
    assert closed_while_reading(client(), lambda: wait_for(peer.asked)) == CANCELLED
    wait_for(peer.gone)


def test_closing_wakes_a_reader_between_two_texts_and_hangs_up(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), "drip"]]
    chunks = closed_while_reading(client())
    assert text_of(chunks).startswith("drip ")
    assert chunks[-1:] == CANCELLED
    wait_for(peer.gone)


def test_a_stream_that_nobody_holds_hangs_up(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), "drip"]]
    stream = client().stream(HELLO)
    assert next(stream).text == "drip "
    del stream
    wait_for(peer.gone)


def test_an_interrupt_hangs_up_even_where_the_stream_is_kept(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), frame({"response": "Hel"}), interrupt, "hold"]]
    stream = client().stream(HELLO)
    with pytest.raises(KeyboardInterrupt):
        collections.deque(stream, maxlen=0)
    wait_for(peer.gone)
    assert list(stream)[-1:] == CANCELLED


@pytest.mark.parametrize(
    "extension", [{"stop": ("end",)}, {"lora_scale": 0.5}, {"lora": "/home/me/secret/tone"}, {"lora": "adapters/tone"}]
)
def test_extensions_of_the_local_engine_are_refused_before_sending(peer: Peer, client: Make, extension: Any) -> None:
    with pytest.raises(InvalidRequest, match="--backend local") as caught:
        client().stream(GenerationRequest(prompt="Hello", **extension))
    assert caught.value.field in extension
    assert not peer.accepted.is_set()


def test_the_local_engine_takes_its_extensions(peer: Peer, client: Make) -> None:
    peer.scripts = [[head(), frame("[DONE]")]]
    collect(client(engine=True), GenerationRequest(prompt="Hello", stop=("end",)))
    assert peer.seen[0].json["stop"] == ["end"]


@pytest.mark.parametrize("engine", [True, False])
def test_no_proxy_of_the_environment_sees_what_is_on_this_machine(
    peer: Peer, client: Make, monkeypatch: pytest.MonkeyPatch, engine: bool
) -> None:
    peer.scripts = [[head(), frame({"response": "direct"}), frame("[DONE]")]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = free.getsockname()[1]
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{nowhere}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert text_of(collect(client(engine=engine))[0]) == "direct"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/client/v4",
        "http://127.0.0.1.example.com",
        "ftp://127.0.0.1",
        "127.0.0.1:80",
        "https://user:pass@example.com",
        "https://example.com/?next=",
        "https://example.com:port",
        "",
    ],
)
def test_a_base_url_that_would_expose_the_token_is_refused(client: Make, url: str) -> None:
    with pytest.raises(ConfigurationError):
        client(base_url=url)


@pytest.mark.parametrize("url", ["https://api.cloudflare.com/client/v4", "http://localhost:8000", "http://[::1]:80/v4"])
def test_https_and_this_machine_are_fine(client: Make, url: str) -> None:
    assert client(base_url=url).base_url == url


STEERING = ["../x", "a/..", "@cf/../b", "@cf/a/b?x=1", "@cf/a/b#c", "@cf/a/%2e%2e", "a b", "a\\b", "a\n"]


@pytest.mark.parametrize("part", STEERING)
@pytest.mark.parametrize("name", ["account", "model", "fallback_model"])
def test_an_account_or_model_that_would_change_the_address_is_refused(client: Make, name: str, part: str) -> None:
    with pytest.raises(ConfigurationError, match=name.removeprefix("fallback_")):
        client(**{name: part})


@pytest.mark.parametrize(
    "model", ["@cf/a/b..c", "@cf/a/../b", "@cf/mistral", "mistral", "@hf/a/b/c", "@cf/a/b?", "@cf/a/b%2f", "@cf/a/-b"]
)
def test_only_ids_of_cloudflares_form_are_asked_there(model: str) -> None:
    settings = load_settings({"cloudflare_account_id": "0" * 32, "cloudflare_api_token": "none"})
    with pytest.raises(ConfigurationError, match="are called like"):
        cloudflare(settings, model)


@pytest.mark.parametrize(
    "script",
    [
        ["reset"],
        [head(), frame({"response": "a"}), "reset"],
        body({"errors": [{"message": "no", "code": 10000}]}, "401 Unauthorized"),
        [b"HTTP/1.1 banana\r\n\r\n"],
        [head(), frame({"response": "a"}), frame({"error": "no"})],
    ],
)
def test_the_token_shows_in_no_traceback_repr_or_log(
    peer: Peer, client: Make, script: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    peer.scripts = [script]
    backend = client()
    error = collect(backend)[1]
    assert error is not None
    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "Traceback" in shown
    assert error.__context__ is None or TOKEN not in str(error.__context__)
    assert peer.seen[0].headers["authorization"] == f"Bearer {TOKEN}"
    for text in (shown, repr(backend), str(backend.describe()), caplog.text):
        assert TOKEN not in text
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(backend)


def test_a_redirect_is_not_followed(peer: Peer, client: Make) -> None:
    other = Peer()
    peer.scripts = [[head("307 Temporary Redirect", "text/plain", f"Location: {other.url}")]]
    error = collect(client())[1]
    assert isinstance(error, BackendError)
    assert error.status == 307
    assert f"redirects to 127.0.0.1:{other.port}, where the request and the token are not sent" in str(error)
    assert not other.accepted.is_set()
    other.close()
