"""What is tried again before the first text, how often and how long: each row of errors with its requests counted."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

from mistral_nb.backends.failures import Withdrawn
from mistral_nb.backends.retry import BASE, FEW, LONGEST, NotListening, Retries
from mistral_nb.backends.workers_ai import Timeouts, WorkersAI
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ConnectionFailed,
    InvalidRequest,
    MistralError,
    RateLimited,
    RequestTimeout,
    StreamTruncated,
    UnknownModel,
)
from mistral_nb.types import Chunk, GenerationRequest
from tests.backends.scripted import PATIENCE, Peer, Step, body, eventually, frame, head

Make = Callable[..., WorkersAI]
HELLO = GenerationRequest(prompt="Hello", lora="mine")
ANSWER: list[Step] = [head(), frame({"response": "Hi"}), frame("[DONE]")]


def refusal(status: str, code: int | None, *headers: str) -> list[Step]:
    message = "AiError: AiError: what it says (12345678-1234-1234-1234-123456789abc)"
    errors = [{"message": message, **({} if code is None else {"code": code})}]
    return body({"errors": errors, "success": False, "result": {}, "messages": []}, status, *headers)


def collect(backend: WorkersAI) -> tuple[list[Chunk], MistralError | None]:
    chunks: list[Chunk] = []
    try:
        chunks.extend(backend.stream(HELLO))
    except MistralError as error:
        return chunks, error
    return chunks, None


ONCE = [
    ("401 Unauthorized", 10000, AuthenticationError),
    ("403 Forbidden", 10000, AuthenticationError),
    ("400 Bad Request", 6003, AuthenticationError),
    ("400 Bad Request", 7000, BackendError),
    ("404 Not Found", 7003, BackendError),
    ("400 Bad Request", 5007, UnknownModel),
    ("404 Not Found", 3042, UnknownModel),
    ("410 Gone", 5028, Withdrawn),
    ("403 Forbidden", 5018, AuthenticationError),
    ("403 Forbidden", 3041, AuthenticationError),
    ("403 Forbidden", 3023, AuthenticationError),
    ("403 Forbidden", 5016, AuthenticationError),
    ("403 Forbidden", 5035, AuthenticationError),
    ("400 Bad Request", 5006, InvalidRequest),
    ("405 Method Not Allowed", 5005, InvalidRequest),
    ("404 Not Found", 3037, InvalidRequest),
    ("400 Bad Request", 3039, InvalidRequest),
    ("413 Too Large", 3006, InvalidRequest),
    ("413 Too Large", 5021, InvalidRequest),
    ("429 Too Many", 3036, RateLimited),
    ("429 Too Many", 4006, RateLimited),
    ("307 Redirect", None, BackendError),
    ("418 Teapot", None, BackendError),
    ("500 Error", 7000, BackendError),
    ("500 Error", 5007, UnknownModel),
    ("200 OK", 4006, RateLimited),
]
A_FEW_TIMES = [
    ("408 Timeout", 3007, RequestTimeout),
    ("408 Timeout", 3008, RequestTimeout),
    ("408 Timeout", 3046, RequestTimeout),
    ("500 Error", 3046, RequestTimeout),
    ("408 Timeout", None, RequestTimeout),
]
AGAIN = [
    ("429 Too Many", 3040, "No capacity"),
    ("429 Too Many", 971, "Too many requests"),
    ("429 Too Many", None, "Too many requests"),
    ("500 Error", None, "Server error 500"),
    ("502 Bad Gateway", None, "Server error 502"),
    ("503 Unavailable", 99999, "Server error 503"),
    ("500 Error", 3043, "Server error 500"),
    ("200 OK", 3040, "No capacity"),
]


@pytest.mark.parametrize(("status", "code", "kind"), ONCE)
def test_what_another_try_would_not_mend_is_asked_once(
    peer: Peer, client: Make, status: str, code: int | None, kind: type[MistralError]
) -> None:
    peer.scripts = [refusal(status, code), ANSWER]
    chunks, error = collect(client(retry_deadline=600))
    assert (chunks, type(error), len(peer.seen)) == ([], kind, 1)
    assert "what it says (" in str(error)


@pytest.mark.parametrize(("status", "code", "kind"), A_FEW_TIMES)
def test_a_timeout_of_the_peers_is_tried_twice_more(
    peer: Peer, client: Make, status: str, code: int | None, kind: type[MistralError]
) -> None:
    peer.scripts = [refusal(status, code)]
    chunks, error = collect(client(retry_deadline=600))
    assert len(peer.seen) == 1 + FEW
    assert [chunk.status for chunk in chunks] == ["Timed out; trying again in 1 s"] * FEW
    assert type(error) is kind
    assert str(error).startswith("after 3 tries: Cloudflare: what it says")


@pytest.mark.parametrize(("status", "code", "reason"), AGAIN)
def test_what_may_pass_is_tried_again(peer: Peer, client: Make, status: str, code: int | None, reason: str) -> None:
    peer.scripts = [refusal(status, code), ANSWER]
    chunks, error = collect(client(retry_deadline=600))
    assert error is None
    assert [chunk.status or chunk.text for chunk in chunks] == [f"{reason}; trying again in 1 s", "Hi", ""]
    assert len(peer.seen) == 2
    assert peer.seen[0].body == peer.seen[1].body


@pytest.mark.parametrize(
    "script",
    [["reset"], [], [head()[:20]], [head(), frame({"response": ""})], [head(), frame({"errors": [{"code": 3040}]})]],
)
def test_a_connection_that_breaks_before_the_first_text_is_tried_again(peer: Peer, client: Make, script: Any) -> None:
    peer.scripts = [script, ANSWER]
    chunks, error = collect(client(retry_deadline=600))
    assert error is None
    assert [chunk.text for chunk in chunks if not chunk.status] == ["Hi", ""]
    assert len(peer.seen) == 2


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ([head(), frame({"response": "Hel"})], StreamTruncated),
        ([head(), frame({"response": "Hel"}), frame({"errors": [{"code": 3040, "message": "no"}]})], RateLimited),
    ],
)
def test_after_the_first_text_nothing_is_tried_again(peer: Peer, client: Make, script: Any, kind: Any) -> None:
    peer.scripts = [script, ANSWER]
    chunks, error = collect(client(retry_deadline=600))
    assert [chunk.text for chunk in chunks] == ["Hel", ""]
    assert type(error) is kind
    assert len(peer.seen) == 1


def test_without_a_deadline_there_is_one_try(peer: Peer, client: Make) -> None:
    peer.scripts = [refusal("429 Too Many", 3040), ANSWER]
    chunks, error = collect(client(retry_deadline=0))
    assert (chunks, type(error), len(peer.seen)) == ([], RateLimited, 1)


@pytest.mark.parametrize("header", ["1", lambda: formatdate(time.time() + 2, usegmt=True)], ids=["seconds", "date"])
def test_the_wait_that_the_peer_asks_for_is_kept(peer: Peer, client: Make, header: Any) -> None:
    start = time.monotonic()
    asked = header if isinstance(header, str) else header()
    peer.scripts = [refusal("429 Too Many", 971, f"Retry-After: {asked}"), ANSWER]
    chunks, error = collect(client(retry_deadline=600))
    assert error is None
    assert time.monotonic() - start > 0.9
    assert chunks[0].status.startswith("Too many requests; trying again in ")


def test_a_wait_beyond_the_deadline_is_an_error_at_once_that_tells_it(peer: Peer, client: Make) -> None:
    peer.scripts = [refusal("503 Unavailable", None, "Retry-After: 1200"), ANSWER]
    start = time.monotonic()
    chunks, error = collect(client(retry_deadline=600))
    assert time.monotonic() - start < PATIENCE, "neither of both was waited for"
    assert (chunks, len(peer.seen)) == ([], 1)
    assert "a wait of 1200 s, and retry_deadline is 600 s" in str(error)
    assert str(error).endswith("ask again after that, or raise retry_deadline")


def test_closing_while_it_waits_ends_it(peer: Peer, client: Make) -> None:
    """Its thread too, long before the wait is over."""
    peer.scripts = [refusal("429 Too Many", 3040, "Retry-After: 1200")]
    stream = client(retry_deadline=2400).stream(HELLO)
    assert next(stream).status.startswith("No capacity; trying again in 12")
    stream.close()
    assert list(stream) == [Chunk(finish_reason="cancelled")]
    assert eventually(lambda: not any(thread.name == "mistral-nb" for thread in threading.enumerate()))
    assert len(peer.seen) == 1


def test_the_limit_for_the_first_text_does_not_strike_while_it_waits(peer: Peer, client: Make) -> None:

    def spared(limit: float) -> bool:
        peer.scripts = [[]] * peer.connections + [refusal("429 Too Many", 3040, f"Retry-After: {2 * limit:g}"), ANSWER]
        chunks, error = collect(client(retry_deadline=60, timeouts=Timeouts(30, limit, 30)))
        return error is None and chunks[-1].finish_reason == "stop"

    assert any(spared(limit) for limit in (0.5, 2, 8, 25))


def limited(code: int = 3040, retry_after: float | None = None) -> RateLimited:
    return RateLimited("no", code=code, status=429, retry_after=retry_after)


def test_waits_are_jittered_fully_grow_and_end_before_the_deadline() -> None:
    for _ in range(50):
        retries = Retries(1000)
        for number in range(8):
            again = retries.next(limited())
            assert again
            assert 0 <= again[0] <= min(LONGEST, BASE * 2**number)
    first = [wait for _ in range(200) if (wait := Retries(1000).next(limited()))]
    assert min(wait for wait, _ in first) < 0.1 * BASE
    assert max(wait for wait, _ in first) > 0.9 * BASE
    assert Retries(1e-9).next(limited()) is None


def test_a_wait_that_was_asked_for_is_the_least() -> None:
    for _ in range(50):
        again = Retries(10).next(limited(971, retry_after=3.0))
        assert again
        assert 3 <= again[0] <= 3 + BASE


def test_nobody_there_is_tried_twice_more() -> None:
    retries = Retries(30)
    assert [bool(retries.next(NotListening("nobody"))) for _ in range(3)] == [True, True, False]
    again = Retries(30).next(ConnectionFailed("broken"))
    assert again
    assert again[1].startswith("The connection broke")


def test_our_own_limits_are_no_reason_to_try_again() -> None:
    assert Retries(30).next(RequestTimeout("gave no text within 300 s")) is None


def test_the_users_random_numbers_stay_as_they_are() -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    Retries(30).next(limited())
    assert random.random() == expected
