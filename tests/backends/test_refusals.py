"""A refusal stands whatever becomes of its body, cut off, undecodable or never there: it is told, and asked once."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from mistral_nb.backends import Backend, connection, resolve
from mistral_nb.backends.base import ChunkStream
from mistral_nb.backends.workers_ai import WorkersAI
from mistral_nb.config import load_settings
from mistral_nb.errors import AuthenticationError, ConfigurationError, InvalidRequest, MistralError, RateLimited
from mistral_nb.types import Chunk
from tests.backends.openai_peer import HELLO, make
from tests.backends.scripted import PATIENCE, TOKEN, Peer, frame, head
from tests.backends.test_workers_ai import collect, text_of

Make = Callable[..., WorkersAI]
CUT = [head("401 Unauthorized", "application/json", "Content-Length: 100") + b'{"errors":[{']


@pytest.mark.parametrize(
    ("script", "kind", "told"),
    [
        (CUT, AuthenticationError, r"Unauthorized \(HTTP 401\)"),
        (
            [
                head("400 Bad", "application/json", "Content-Length: 500")
                + b'{"errors":[{"code":5006,"message":"seed"}]}'
            ],
            InvalidRequest,
            r"seed \(code 5006, HTTP 400\)",
        ),
        (
            [head("401 No", "application/json", "Content-Encoding: gzip") + b"not gzip"],
            AuthenticationError,
            r"No \(HTTP 401\)",
        ),
        (
            [head("429 Busy", "application/json", "Retry-After: 60", "Content-Length: 500") + b"{"],
            RateLimited,
            "asks for a wait of 60 s",
        ),
        ([head("401 No", "text/html") + b"x" * (2 << 20)], AuthenticationError, r"No \(HTTP 401\)"),
    ],
    ids=["cut", "short", "no gzip", "busy", "long"],
)
def test_a_refusal_with_a_broken_body_is_told_and_not_asked_again(
    peer: Peer, client: Make, script: Any, kind: type[MistralError], told: str
) -> None:
    peer.scripts = [script]
    chunks, error = collect(client(retry_deadline=20))
    assert chunks == []
    assert type(error) is kind
    assert re.search(told, str(error))
    assert len(peer.seen) == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_REFUSAL_SECONDS", 0.05)


@pytest.mark.usefixtures("impatient")
def test_a_refusal_whose_body_never_comes_is_told(peer: Peer, client: Make) -> None:
    peer.scripts = [[*CUT, "hold"]]
    assert type(collect(client(retry_deadline=20))[1]) is AuthenticationError


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(("status", "seen"), [("503 Busy", 2), ("410 Gone", 2)])
def test_after_a_body_that_never_comes_the_next_request_has_its_time(
    peer: Peer, client: Make, status: str, seen: int
) -> None:
    stalled = [head(status, "application/json", "Content-Length: 9"), "hold"]
    peer.scripts = [stalled, [head(), frame({"response": "Hi"}), frame("[DONE]")]]
    chunks, error = collect(client(retry_deadline=20, fallback_model="@cf/other/model"))
    assert error is None
    assert (text_of(chunks), len(peer.seen)) == ("Hi", seen)


def test_a_refusal_is_cancelled_while_its_body_comes(peer: Peer, client: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_REFUSAL_SECONDS", PATIENCE)
    opened: Future[ChunkStream] = Future()
    peer.scripts = [[*CUT, lambda: opened.result(PATIENCE).close(), "hold"]]
    opened.set_result(client().stream(HELLO))
    assert list(opened.result()) == [Chunk(finish_reason="cancelled")]


def on_a_server(peer: Peer, **settings: Any) -> Backend:
    return resolve(load_settings({"server_token": TOKEN, **settings}), backend=f"http://127.0.0.1:{peer.port}").backend


@pytest.mark.parametrize("reach", [lambda peer, **settings: make(peer, None, **settings), on_a_server])
def test_a_question_for_the_model_is_refused_once(peer: Peer, reach: Callable[..., Backend]) -> None:
    peer.scripts = [CUT]
    with pytest.raises(AuthenticationError, match="MISTRAL_NB_"):
        list(reach(peer, retry_deadline=20).stream(HELLO))
    assert len(peer.seen) == 1


@pytest.mark.parametrize("address", ["https://999.1.1.1/v1", "https://xn--a/v1"])
def test_an_address_that_no_host_can_have_is_told(address: str) -> None:
    for backend in (
        resolve(load_settings({"backend": "openai", "openai_base_url": address, "model": "m"})).backend,
        resolve(load_settings({"server_token": TOKEN}), backend=address).backend,
    ):
        with pytest.raises(ConfigurationError, match=r"(999\.1\.1\.1|xn--a) is no host's address \(.+\)\. Correct it"):
            list(backend.stream(HELLO))
