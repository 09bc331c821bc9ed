"""Errors of OpenAI-compatible servers, each in its own words: which error they become, and the next step."""

from __future__ import annotations

from typing import Any

import pytest

from mistral_nb.answer import Answer
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ContextOverflow,
    InvalidRequest,
    MistralError,
    RateLimited,
    UnknownModel,
)
from mistral_nb.types import GenerationRequest
from tests.backends.openai_peer import HELLO, MODEL, delta, make, stream
from tests.backends.scripted import TOKEN, Peer, body, frame, head

VLLM = "This model's maximum context length is 4096 tokens. However, you requested "


@pytest.mark.parametrize(
    ("message", "prompt"),
    [
        (f"{VLLM}9256 tokens (9000 in the messages, 256 in the completion). Please reduce the length", 9000),
        (f"{VLLM}256 output tokens and your prompt contains at least 3841 input tokens, for a total of 4097", 3841),
        ("This model's maximum context length is 4096 tokens. However, your messages resulted in 9000 tokens.", 9000),
        ("The decoder prompt (length 9000) is longer than the maximum model length of 4096. Make sure", 9000),
        ("The input (9000 tokens) is longer than the model's context length (4096 tokens).", 9000),
        ("request (9000 tokens) exceeds the available context size (4096 tokens), try increasing it", 9000),
        ("Prompt contains 9000 tokens, too large for model with 4096 maximum context length", 9000),
        ("prompt = '9000 tokens': does not fit the context of 4096 tokens; shorten it", 9000),
    ],
)
def test_a_prompt_over_the_context_is_known_in_every_servers_words(peer: Peer, message: str, prompt: int) -> None:
    peer.scripts = [body({"error": {"message": message, "type": "BadRequestError", "code": 400}}, "400 Bad Request")]
    with pytest.raises(ContextOverflow) as caught:
        list(make(peer).stream(HELLO))
    assert (caught.value.prompt_tokens, caught.value.limit) == (prompt, 4096)


@pytest.mark.parametrize(
    ("status", "said", "kind", "told"),
    [
        (
            "401 Unauthorized",
            {"error": {"message": "bad key", "code": "invalid_api_key"}},
            AuthenticationError,
            "API_KEY",
        ),
        ("403 Forbidden", {"error": "Forbidden"}, AuthenticationError, r"Forbidden \(HTTP 403\)"),
        (
            "404 Not Found",
            {"object": "error", "message": "The model `x` does not exist.", "code": 404},
            UnknownModel,
            MODEL,
        ),
        ("404 Not Found", {"detail": "Not Found"}, BackendError, "/v1"),
        (
            "400 Bad Request",
            {"error": {"message": "top_k must be 1 or more", "code": 400}},
            InvalidRequest,
            "^the server at",
        ),
        (
            "400 Bad Request",
            {"error": {"message": "conversation roles must alternate", "code": "3036"}},
            BackendError,
            "Check the request",
        ),
        (
            "422 Unprocessable",
            {"detail": [{"loc": ["body", "seed"], "msg": "seed is too large"}]},
            InvalidRequest,
            "seed",
        ),
        (
            "500 Oops",
            {"error": {"message": "the request exceeds the available context size"}},
            InvalidRequest,
            "too long",
        ),
        ("429 Too Many", {"error": {"message": "Slow down", "code": "rate_limit"}}, RateLimited, "Wait a moment"),
        (
            "503 Busy",
            {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}},
            BackendError,
            "Try again",
        ),
        ("500 Server Error", "Internal Server Error", BackendError, "Server Error"),
    ],
)
def test_an_error_is_typed_and_names_the_next_step(
    peer: Peer, status: str, said: Any, kind: type[MistralError], told: str
) -> None:
    peer.scripts = [body(said, status, "Retry-After: 7")]
    with pytest.raises(kind, match=told) as caught:
        list(make(peer).stream(HELLO))
    assert type(caught.value) is kind
    assert f"127.0.0.1:{peer.port}" in str(caught.value) or kind is InvalidRequest
    assert TOKEN not in repr(caught.value)
    if isinstance(caught.value, RateLimited):
        assert caught.value.retry_after == 7


def test_an_unknown_adapter_is_named(peer: Peer) -> None:
    peer.scripts = [body({"error": {"message": "The model `mine` does not exist.", "code": 404}}, "404 Not Found")]
    with pytest.raises(InvalidRequest, match=r"lora = 'mine': the server at .* has no such adapter"):
        list(make(peer).stream(HELLO.with_(lora="mine")))


def test_a_server_that_is_not_set_up_for_tools_names_the_functions(peer: Peer) -> None:
    told = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    peer.scripts = [body({"error": {"message": told, "code": 400}}, "400 Bad Request")]
    request = GenerationRequest.from_dict({"prompt": "Hi", "functions": [{"name": "f", "code": "{}"}]})
    with pytest.raises(InvalidRequest, match=r"--tool-call-parser to be set \(HTTP 400\). Correct functions") as caught:
        list(make(peer).stream(request))
    assert caught.value.field == "functions"


@pytest.mark.parametrize(
    ("code", "kind"),
    [(500, BackendError), ("429", RateLimited), (401, AuthenticationError), (None, BackendError), (7003, BackendError)],
)
def test_an_error_as_a_frame_tells_its_status_by_its_code(peer: Peer, code: Any, kind: type[BackendError]) -> None:
    failed = frame({"error": {"message": "it did not work", "type": "InternalServerError", "code": code}})
    peer.scripts = [[head(), delta("Hi"), failed, frame("[DONE]")]]
    answer = Answer(make(peer), HELLO)
    with pytest.raises(kind, match="it did not work") as caught:
        list(answer)
    assert type(caught.value) is kind
    assert caught.value.status == (int(code) if code in (500, "429", 401) else None)
    assert (answer.text, answer.result.finish_reason) == ("Hi", "error")


def test_a_server_error_as_the_first_frame_is_tried_again(peer: Peer) -> None:
    failed = [
        head(),
        delta("", role="assistant"),
        frame({"object": "error", "message": "EngineDeadError", "code": 500}),
    ]
    peer.scripts = [failed, stream(delta("Hi", "stop"))]
    answer = Answer(make(peer, retry_deadline=20), HELLO)
    statuses = [chunk.status for chunk in answer if chunk.status]
    assert [status.split(";")[0] for status in statuses] == ["Server error 500"]
    assert answer.text == "Hi"
