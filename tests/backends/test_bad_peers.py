"""What a peer may do wrong in an answer: end it badly, say what is not fit to be shown, send no event stream at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mistral_nb.answer import Answer
from mistral_nb.backends.exchange import Exchange
from mistral_nb.backends.pump import Pump
from mistral_nb.backends.workers_ai import Timeouts, WorkersAI
from mistral_nb.errors import BackendError, MistralError, StreamTruncated
from mistral_nb.foreign import plain_lines
from mistral_nb.secret import Secret
from mistral_nb.types import Chunk, GenerationRequest, Usage
from tests.backends.scripted import TOKEN, Peer, body, frame, head
from tests.backends.test_workers_ai import collect, text_of

Make = Callable[..., WorkersAI]
HELLO = GenerationRequest(prompt="Hello")


@pytest.mark.parametrize(
    ("end", "reason"),
    [([], "truncated"), ([frame({"errors": [{"message": "no", "code": 3007}]})], "error")],
)
def test_an_answer_that_does_not_end_well_still_tells_what_it_cost(
    peer: Peer, client: Make, end: list[Any], reason: str
) -> None:
    ids = ("cf-ai-req-id: f00d", "cf-ai-neurons: 1.5")
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    peer.scripts = [[head("200 OK", "text/event-stream", *ids), frame({"response": "a", "usage": usage}), *end]]
    answer = Answer(client(), HELLO)
    with pytest.raises(MistralError) as caught:
        list(answer)
    result = caught.value.result
    assert result is not None
    assert (result.finish_reason, result.usage, result.neurons) == (reason, Usage(3, 2), 1.5)
    assert result.request_id == "f00d"


def test_a_cancelled_answer_has_the_id_of_its_request(peer: Peer, client: Make) -> None:
    peer.scripts = [[head("200 OK", "text/event-stream", "cf-ai-req-id: f00d"), frame({"response": "a"}), "hold"]]
    answer = Answer(client(), HELLO)
    assert next(answer).text == "a"
    answer.close()
    assert [chunk.finish_reason for chunk in answer] == ["cancelled"]
    assert answer.result.request_id == "f00d"


RAW = "\x1b[31mno\x1b]0;t\x07\r\n" + "very " * 50_000


@pytest.mark.parametrize(
    "script",
    [
        body({"errors": [{"message": RAW, "code": 5006}]}, "400 Bad"),
        [head(), frame({"errors": [{"message": RAW, "code": 3043}]})],
        [b"HTTP/1.1 500 \x1b[31m" + b"x" * 9000 + b"\r\nContent-Length: 0\r\n\r\n"],
        [b"HTTP/1.1 \x1b[31m" + b"x" * 60_000 + b"\r\n\r\n"],
        [head("302 Found", "text/html", "Location: https://user:pass@" + "x" * 5000)],
        [head("302 Found", "text/html", "Location: https://[::1/x")],
    ],
    ids=["error", "frame", "reason", "status line", "redirect", "no address"],
)
@pytest.mark.parametrize("engine", [True, False])
def test_what_a_peer_says_is_shown_clean_and_short(peer: Peer, client: Make, script: Any, engine: bool) -> None:
    peer.scripts = [script]
    error = collect(client(engine=engine))[1]
    assert error is not None
    assert all(each.isprintable() or each == "\n" for each in str(error))
    assert len(str(error)) < (5000 if engine else 900)
    assert "user:pass" not in str(error)


@pytest.mark.parametrize("engine", [True, False])
def test_a_peer_that_says_the_token_again_does_not_show_it(peer: Peer, client: Make, engine: bool) -> None:
    peer.scripts = [body({"errors": [{"message": f"Bearer {TOKEN} is wrong", "code": 10000}]}, "401 No")]
    error = collect(client(engine=engine))[1]
    assert "Bearer [token] is wrong" in str(error)


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("https://[::1/x", "what is no address"),
        ("https://xn--/x", "xn--"),
        ("https://other.example:99999/x", "other.example:99999"),
        ("/x", "another path"),
    ],
)
def test_a_redirect_is_refused_at_once_wherever_it_leads(peer: Peer, client: Make, location: str, told: str) -> None:
    peer.scripts = [[head("302 Found", "text/html", f"Location: {location}")]]
    chunks, error = collect(client(retry_deadline=20))
    assert chunks == []
    assert type(error) is BackendError
    assert f"it redirects to {told}, where the request and the token are not sent" in str(error)
    assert len(peer.seen) == 1


@pytest.mark.parametrize("reason", ["content_filter", "abort", "error"])
def test_an_answer_that_the_peer_ended_early_is_no_whole_one(peer: Peer, client: Make, reason: str) -> None:
    choice = {"delta": {"content": "Hel"}, "finish_reason": reason}
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    peer.scripts = [[head(), frame({"choices": [choice]}), frame({"choices": [], "usage": usage}), frame("[DONE]")]]
    chunks, error = collect(client(retry_deadline=20))
    assert text_of(chunks) == "Hel"
    assert chunks[-1] == Chunk(finish_reason="error", usage=Usage(3, 1))
    assert type(error) is BackendError
    assert f"it ended the answer early: {reason}" in str(error)


def test_an_answer_that_breaks_off_before_its_text_keeps_none(peer: Peer, client: Make) -> None:
    peer.scripts = [[head()]]
    chunks, error = collect(client())
    assert chunks == []
    assert type(error) is StreamTruncated
    assert "before the first text" in str(error)
    assert "kept" not in str(error)


def test_headers_are_believed_where_they_make_sense(peer: Peer, client: Make) -> None:
    model = "x-mistral-nb-model: a%1b%5b31m%0ab"
    headers = ("cf-ai-neurons: nan", "cf-ai-req-id: \x1b[31mX", "cf-ray: 8a1b-FRA", model)
    peer.scripts = [[head("200 OK", "text/event-stream", *headers), frame("[DONE]")]]
    last = Chunk(finish_reason="stop", request_id="8a1b-FRA")
    assert collect(client())[0] == [replace(last, model="a [31m b")]
    nobodys = Exchange(
        peer="It", url=peer.url, token=None, body=b"{}", model="m", request=HELLO, timeouts=Timeouts(5, 5, 5)
    )
    assert list(Pump(nobodys.run)) == [last]


@pytest.mark.parametrize(
    "script",
    [[head("200 OK", "text/html"), b"<html>Log in</html>"], body([1]), [head("200 OK", "text/plain"), b"ok\n"]],
)
def test_what_is_no_event_stream_is_told_as_such_and_asked_for_once(peer: Peer, client: Make, script: Any) -> None:
    peer.scripts = [script]
    chunks, error = collect(client(retry_deadline=20))
    assert chunks == []
    assert type(error) is BackendError
    assert "is no event stream" in str(error)
    assert len(peer.seen) == 1


@pytest.mark.parametrize("begun", [b"da", b": still here\n", b"event: x\n\n"])
def test_an_event_stream_that_breaks_off_before_its_first_frame_is_asked_for_again(
    peer: Peer, client: Make, begun: bytes
) -> None:
    peer.scripts = [[head(), begun], [head(), frame({"response": "Hi"}), frame("[DONE]")]]
    chunks, error = collect(client(retry_deadline=20))
    assert error is None
    assert text_of(chunks) == "Hi"


@pytest.mark.parametrize("parts", [(b"\xef\xbb\xbf{",), (b"\xef", b"\xbb\xbf", b"{"), (b"\n", b"\xef\xbb\xbf\n{")])
def test_a_byte_order_mark_before_an_answer_is_none_of_it(peer: Peer, client: Make, parts: tuple[bytes, ...]) -> None:
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b'"response":"Hi"}', b"")]
    peer.scripts = [[head("200 OK", "application/json", "Transfer-Encoding: chunked"), *chunks]]
    chunks_seen, error = collect(client())
    assert error is None
    assert text_of(chunks_seen) == "Hi"


@pytest.mark.parametrize(
    "script",
    [
        body({"errors": [{"message": " " * 1965 + TOKEN * 9, "code": 7000}]}, "400 No"),
        [head(), frame("x" * 165 + TOKEN * 9)],
        body({"x": "x" * 155 + TOKEN * 9}),
        body(["x" * 155 + TOKEN * 9], "400 No"),
    ],
    ids=["message", "frame", "body", "list"],
)
@pytest.mark.parametrize("engine", [True, False])
def test_no_part_of_a_token_that_a_peer_says_again_is_shown(
    peer: Peer, client: Make, script: Any, engine: bool
) -> None:
    peer.scripts = [script]
    error = collect(client(engine=engine))[1]
    assert error is not None
    assert TOKEN[:4] not in str(error)


def test_lines_that_begin_with_blanks_are_shown_clean() -> None:
    assert plain_lines(" " * 7990 + "\n" + TOKEN + " is\nwrong ", Secret(TOKEN)) == "[token] is\nwrong"
