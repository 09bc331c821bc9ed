"""From a peer's failure to the error that is raised: its kind, its words, and what it names."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable

import pytest

from mistral_nb.backends.failures import Failure, Withdrawn, to_error
from mistral_nb.backends.openai_wire import explain
from mistral_nb.backends.workers_ai import WorkersAI
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ContextOverflow,
    InvalidRequest,
    MistralError,
    RateLimited,
    RequestTimeout,
    UnknownModel,
)
from mistral_nb.types import GenerationRequest
from tests.backends.scripted import Peer, body, head

Make = Callable[..., WorkersAI]


def refused(backend: WorkersAI, request: GenerationRequest | None = None) -> MistralError:
    """The error of a request that gets no text."""
    with pytest.raises(MistralError) as caught:
        list(backend.stream(request or GenerationRequest(prompt="Hello")))
    return caught.value


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        ("401 Unauthorized", 10000, AuthenticationError),
        ("403 Forbidden", 10000, AuthenticationError),
        ("400 Bad Request", 6003, AuthenticationError),
        ("403 Forbidden", 5018, AuthenticationError),
        ("403 Forbidden", None, AuthenticationError),
        ("400 Bad Request", 7000, BackendError),
        ("404 Not Found", None, BackendError),
        ("400 Bad Request", 5007, UnknownModel),
        ("404 Not Found", 3042, UnknownModel),
        ("410 Gone", 5028, Withdrawn),
        ("410 Gone", None, Withdrawn),
        ("400 Bad Request", 5006, InvalidRequest),
        ("405 Method Not Allowed", 5005, InvalidRequest),
        ("404 Not Found", 3037, InvalidRequest),
        ("400 Bad Request", 3039, InvalidRequest),
        ("413 Too Large", 3006, InvalidRequest),
        ("413 Too Large", None, InvalidRequest),
        ("408 Timeout", 3046, RequestTimeout),
        ("408 Timeout", None, RequestTimeout),
        ("429 Too Many", 4006, RateLimited),
        ("429 Too Many", 971, RateLimited),
        ("429 Too Many", None, RateLimited),
        ("503 Unavailable", None, BackendError),
        ("500 Error", 3046, RequestTimeout),
        ("418 Teapot", 99999, BackendError),
        ("307 Redirect", None, BackendError),
    ],
)
def test_failures_are_told_apart_by_code_and_then_by_status(
    peer: Peer, client: Make, status: str, code: int | None, kind: type[MistralError]
) -> None:
    errors = [{"message": "AiError: AiError: what it says (12345678-1234-1234-1234-123456789abc)", "code": code}]
    peer.scripts = [body({"errors": errors, "success": False, "result": {}, "messages": []}, status)]
    error = refused(client(), GenerationRequest(prompt="Hello", lora="mine"))
    assert type(error) is kind
    assert "what it says (" in str(error)
    assert "12345678" not in str(error)
    if isinstance(error, BackendError):
        assert error.code == code
        assert error.status == int(status[:3])


def test_success_false_with_status_200_is_a_failure(peer: Peer, client: Make) -> None:
    peer.scripts = [body({"errors": [{"message": "no", "code": 3040}], "success": False, "result": {}})]
    assert isinstance(refused(client()), RateLimited)


def test_an_error_page_that_is_no_json(peer: Peer, client: Make) -> None:
    page = b"<html>" + b"x" * 5000
    peer.scripts = [[head("502 Bad Gateway", "text/html", "cf-ray: 8a1b-FRA") + page]]
    error = refused(client())
    assert type(error) is BackendError
    assert error.status == 502
    assert "Bad Gateway" in str(error)
    assert "8a1b-FRA" in str(error)
    assert len(str(error)) < 200


@pytest.mark.parametrize(("code", "kind"), [(3040, RateLimited), (3046, RequestTimeout), (None, BackendError)])
def test_the_servers_own_failures_name_the_request(
    peer: Peer, client: Make, code: int | None, kind: type[MistralError]
) -> None:
    errors = [{"message": "no", "code": code}]
    peer.scripts = [body({"errors": errors}, "503 Unavailable", "cf-ai-req-id: f00d")]
    error = refused(client())
    assert type(error) is kind
    assert "[request f00d]. " in str(error)
    peer.scripts = [body({"errors": errors}, "429 Too Many", "cf-ai-req-id: f00d")]
    assert "f00d" not in str(refused(client()))


LONG = 10 * 365 * 86400.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("9" * 400, LONG),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONG),
        ("Fri, 31 Dec 9999 23:59:59 -2300", LONG),
        ("Mon, 01 Jan 99999999999999 00:00:00 GMT", None),
        ("nan", None),
        ("soon", None),
    ],
)
def test_retry_after(peer: Peer, client: Make, header: str, seconds: float | None) -> None:
    peer.scripts = [body({"errors": [{"message": "wait", "code": 971}]}, "429 Too Many", f"Retry-After: {header}")]
    error = refused(client())
    assert isinstance(error, RateLimited)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    "filler", [" " * 600_000, "1" * 600_000, "12,345," * 90_000, "(12345678-" * 60_000, "AiError: " * 70_000]
)
def test_a_long_message_takes_no_time(filler: str) -> None:
    """Longer than a frame's message may be: in what looks for words, time in the square of it would be hours."""
    request = GenerationRequest(prompt="Hello")
    started = time.thread_time()
    for code, status in ((None, 500), (5021, 413), (5006, 400)):
        failure = Failure("Cloudflare", "m", request, f"maximum model length x{filler}y", code, status)
        to_error(failure)
        explain(failure)
    assert time.thread_time() - started < 60


@pytest.mark.parametrize(
    "error", [InvalidRequest("top_k", 0, "must be 1 or more"), ContextOverflow(5012, 4096, "messages")], ids=repr
)
def test_an_error_goes_through_pickle(error: InvalidRequest) -> None:
    error.args = ("told in other words",)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_prompt_over_the_context_tells_both_numbers(peer: Peer, client: Make) -> None:
    said = "The estimated number of input and maximum output tokens (5,012) exceeded this model context window (4096)"
    peer.scripts = [body({"errors": [{"message": said, "code": 5021}]}, "413 Too Large")]
    error = refused(client())
    assert isinstance(error, ContextOverflow)
    assert (error.prompt_tokens, error.limit) == (5012, 4096)


@pytest.mark.parametrize(
    "said",
    [
        "request 1234 took 99 ms: too large",
        "error 5021 at host 10.0.0.1: too large",
        "number of input and maximum output tokens (,) exceeded this model context window (,)",
    ],
)
def test_other_numbers_are_no_counts_of_tokens(peer: Peer, client: Make, said: str) -> None:
    peer.scripts = [body({"errors": [{"message": said, "code": 5021}]}, "413 Too Large")]
    error = refused(client())
    assert type(error) is InvalidRequest
    assert said in str(error)


def test_a_field_that_the_peer_refuses_is_named(peer: Peer, client: Make) -> None:
    said = "AiError: Bad input: Error: '/temperature' must be at most 2"
    peer.scripts = [body({"errors": [{"message": said, "code": 5006}]}, "400 Bad Request")]
    error = refused(client(), GenerationRequest(prompt="Hi", temperature=3))
    assert isinstance(error, InvalidRequest)
    assert (error.field, error.value) == ("temperature", 3)
    assert str(error).startswith("Cloudflare: Bad input")
    assert str(error).endswith("Correct the field that it names")


def test_the_local_engines_messages_are_whole(peer: Peer, client: Make) -> None:
    said = "functions = ['f']: this model's chat template takes none; leave them out"
    peer.scripts = [body({"errors": [{"message": said, "code": 5006}]}, "400 Bad Request")]
    error = refused(client(engine=True, peer="the local engine"))
    assert isinstance(error, InvalidRequest)
    assert (error.field, str(error)) == ("functions", said)
    peer.scripts = [body({"errors": [{"message": "it was stopped; run it again", "code": 3043}]}, "503 Unavailable")]
    error = refused(client(engine=True, peer="the local engine"))
    assert type(error) is BackendError
    assert str(error) == "the local engine: it was stopped; run it again"
