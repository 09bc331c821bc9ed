"""The playground's side of the server: its page, its sessions, and the stream of its EventSource."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mistral_nb.server import playground
from mistral_nb.server.playground import LOGIN, STREAM, Sessions
from tests.server.engines import DEADLINE, MODEL, STAND_IN, EngineUnderTest, eventually, frames

OWN = {"sec-fetch-site": "same-origin"}
SHORT = {"prompt": "Name three colours.", "temperature": 0, "max_tokens": 6, "stream": True}


@pytest.fixture
def browser(engine: EngineUnderTest) -> Iterator[httpx.Client]:
    """A client with a jar for cookies, which says what a browser says."""
    with httpx.Client(base_url=engine.record.base_url, headers=OWN, timeout=DEADLINE, trust_env=False) as client:
        yield client


@pytest.fixture
def known(browser: httpx.Client, engine: EngineUnderTest) -> httpx.Client:
    """The same, logged in."""
    assert browser.post(LOGIN, data={"token": engine.record.token}).status_code == 204
    return browser


def counter(engine: EngineUnderTest, name: str) -> int:
    return int(engine.client.get("/health").json()[name])


def ask(request: Any) -> dict[str, str]:
    return {"request": request if isinstance(request, str) else json.dumps(request)}


def test_the_page_loads_nothing_and_nobody_frames_it(browser: httpx.Client) -> None:
    pages = [browser.get("/") for _ in range(2)]
    nonces = [re.findall(r"nonce[=-]\"?([\w-]+)", page.headers["content-security-policy"]) for page in pages]
    assert nonces[0] != nonces[1]
    for page, (script, style) in zip(pages, nonces, strict=True):
        assert script == style
        assert page.text.count(f'nonce="{script}"') == 2
        assert "{nonce}" not in page.text
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["cache-control"] == "no-store"
        assert not re.findall(r"(?:src|href)=\"(?!data:,)|https?://|innerHTML|style=|\son\w+=\"", page.text)
        assert "set-cookie" not in page.headers


def test_a_session_is_had_for_the_token(browser: httpx.Client, engine: EngineUnderTest) -> None:
    assert browser.get("/playground/session").status_code == 401
    for wrong in ("", "wrong", engine.record.token[:-1], "ü"):
        refused = browser.post(LOGIN, data={"token": wrong})
        assert (refused.status_code, refused.json()["errors"][0]["code"]) == (401, 10000)
        assert "set-cookie" not in refused.headers
    assert browser.post(LOGIN, content=b"token=" + b"x" * 5000).status_code == 413
    assert browser.get(LOGIN, params={"token": engine.record.token}).status_code == 405
    cookie = browser.post(LOGIN, data={"token": engine.record.token}).headers["set-cookie"]
    assert re.fullmatch(
        rf"mistral-nb-{engine.record.port}=[\w-]{{43}}; HttpOnly; Max-Age=43200; Path=/; SameSite=strict", cookie
    )
    assert engine.record.token not in cookie
    shown = browser.get("/playground/session").json()
    fitting = [model["id"] for model in engine.client.get("/v1/models").json()["data"] if model["id"] != MODEL]
    assert (shown["model"], [STAND_IN, *shown["adapters"]]) == (MODEL, fitting)
    assert browser.get("/engine/health").status_code == 401, "it is good for the playground alone"


def test_it_streams_what_run_streams(known: httpx.Client, engine: EngineUnderTest) -> None:
    answer = known.get(STREAM, params=ask(SHORT))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert frames(answer) == frames(engine.post(SHORT))


@pytest.mark.parametrize("site", ["same-site", "cross-site", "none", ""])
@pytest.mark.parametrize("path", [STREAM, "/playground/session", LOGIN])
def test_no_other_page_uses_the_session(known: httpx.Client, engine: EngineUnderTest, path: str, site: str) -> None:
    """A page on another port of this host counts as of the same site, and its requests carry the cookie."""
    method, told = ("POST", {"data": {"token": engine.record.token}}) if path == LOGIN else ("GET", {})
    answer = known.request(method, path, params=ask(SHORT), headers={"sec-fetch-site": site}, **told)  # type: ignore[arg-type]
    assert (answer.status_code, answer.json()["errors"][0]["code"]) == (403, 10000)
    assert "set-cookie" not in answer.headers


def test_without_a_session_nothing_is_answered(browser: httpx.Client, engine: EngineUnderTest) -> None:
    for value in ("", "x" * 43, engine.record.token):
        cookie = {"cookie": f"mistral-nb-{engine.record.port}={value}"}
        assert browser.get(STREAM, params=ask(SHORT), headers=cookie).status_code == 401


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        ({**SHORT, "temperature": 9}, 5006, "temperature"),
        ({**SHORT, "prompt": "word " * 9000}, 5021, "context"),
        ("{", 5006, "not JSON"),
        ("", 5006, "not JSON"),
        ("[]", 5006, "object"),
    ],
)
def test_what_is_wrong_with_a_request_is_an_event(known: httpx.Client, request_: Any, code: int, words: str) -> None:
    """An EventSource sees no status and no body."""
    answer = known.get(STREAM, params=ask(request_))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    (error,) = json.loads(frames(answer)[-1])["errors"]
    assert error["code"] == code
    assert words in error["message"]


def test_a_page_that_is_closed_ends_its_generation(known: httpx.Client, engine: EngineUnderTest) -> None:
    engine.idle()
    before = counter(engine, "cancelled")
    with known.stream("GET", STREAM, params=ask({**SHORT, "max_tokens": 4000, "prompt": "A long story."})) as answer:
        next(answer.iter_lines())
    eventually(lambda: counter(engine, "cancelled") > before, "the engine is free")


def test_a_long_prompt_may_come_in_parts(engine: EngineUnderTest) -> None:
    """It stands in the address, and no network carries that in one piece."""
    first, second = (f"GET /health?{name}" for name in ("first", "second"))
    long = f"{second}={'x' * 60_000} HTTP/1.1\r\nHost: {engine.record.host}\r\nConnection: close\r\n\r\n".encode()
    with engine.raw(f"{first} HTTP/1.1", long[:40_000]) as connection, connection.makefile("rb") as answers:
        assert answers.readline().startswith(b"HTTP/1.1 200 ")
        connection.sendall(long[40_000:])
        assert answers.read().count(b"HTTP/1.1 200 ") == 1


def test_sessions_end(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions()
    first, *_, last = [sessions.open() for _ in range(playground._MOST_SESSIONS)]
    assert sessions.knows(first)
    sessions.open()
    assert not sessions.knows(first), "the oldest makes room"
    assert sessions.knows(last)
    monkeypatch.setattr(playground, "SESSION_SECONDS", -1.0)
    assert not sessions.knows(sessions.open())


def test_an_invitation_is_good_for_once_and_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions()
    code = sessions.invite()
    assert [sessions.redeem(given) for given in ("", "x", code, code)] == [False, False, True, False]
    assert not sessions.knows(code)
    monkeypatch.setattr(playground, "INVITATION_SECONDS", -1.0)
    assert not sessions.redeem(sessions.invite())
