"""Clients that take too much: too many at once, and too slow to send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mistral_nb.server import limits
from mistral_nb.server.limits import Gate, Limited
from mistral_nb.server.playground import LOGIN, STREAM
from mistral_nb.server.schemas import WireError
from tests.server.engines import DEADLINE, Engines, EngineUnderTest, eventually, frames, run_path

SOON = 0.3


def body_of(*parts: bytes, silent: bool = False) -> Receive:
    """What a server hands on of a body, which may stop short of its end."""

    async def parts_of() -> AsyncIterator[dict[str, object]]:
        for n, part in enumerate(parts):
            yield {"type": "http.request", "body": part, "more_body": silent or n + 1 < len(parts)}
        await asyncio.Event().wait()

    messages = parts_of()
    return lambda: messages.__anext__()


def test_a_body_that_stops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[dict[str, object]] = []

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(await Request(scope, receive).body())(scope, receive, send)

    async def send(message: dict[str, object]) -> None:
        answers.append(message)

    app = Limited(read, Gate(1), lambda scope: False)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(app(scope, body_of(b"a", b"b"), send))  # type: ignore[arg-type]
    assert answers[-1]["body"] == b"ab"
    monkeypatch.setattr(limits, "BODY_PATIENCE", SOON)
    with pytest.raises(WireError, match="2 bytes of it are here") as caught:
        asyncio.run(app(scope, body_of(b"a", b"b", silent=True), send))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.code) == (408, 3007)


def in_gate(places: int, patience: float, act: Callable[[Gate], object]) -> None:
    async def run() -> None:
        await act(Gate(places, patience))  # type: ignore[misc]

    asyncio.run(run())


def test_a_place_goes_to_the_next_who_waits() -> None:
    async def act(gate: Gate) -> None:
        order = []

        async def enter(name: int) -> None:
            async with gate.place():
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*(enter(n) for n in range(4)))
        assert order == [0, 1, 2, 3]
        assert gate.waiting == 0

    in_gate(2, DEADLINE, act)


def test_who_finds_no_place_is_told_so() -> None:
    """At once where enough wait already, else after a while. Who leaves while waiting takes no place along."""

    async def act(gate: Gate) -> None:
        async def enter() -> None:
            async with gate.place():
                pass

        async with gate.place():
            waits, leaves = asyncio.ensure_future(enter()), asyncio.ensure_future(enter())
            await asyncio.sleep(0)
            with pytest.raises(WireError, match="--max-requests") as caught:
                await enter()
            assert (caught.value.status, caught.value.code, gate.waiting) == (429, 3040, 1)
            with pytest.raises(WireError, match="--max-requests"):
                await leaves
            with pytest.raises(WireError):
                await waits
            left = asyncio.ensure_future(enter())
            await asyncio.sleep(0)
            left.cancel()
            with pytest.raises(asyncio.CancelledError):
                await left
        await enter()
        assert gate.waiting == 0

    in_gate(1, SOON, act)


@pytest.fixture(scope="module")
def small(embedded: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """An engine with two places."""
    engines = Engines(tmp_path_factory.mktemp("small-engine"))
    try:
        engine = engines.start("--managed", "--max-requests", "2")
        engine.ready()
        yield engine
    finally:
        engines.end()


def test_more_clients_than_places(small: EngineUnderTest) -> None:
    """Each gets a whole answer or 429; and afterwards every place is free. Health is told all along."""
    body = {"prompt": "Tell me a story.", "temperature": 0, "max_tokens": 24, "stream": True}

    def ask(n: int) -> httpx.Response:
        return small.post(body)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(24)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers if answer not in refused)
    assert refused
    for answer in refused:
        assert answer.status_code == 429
        assert answer.json()["errors"][0]["code"] == 3040
        assert int(answer.headers["retry-after"]) >= 1
    eventually(lambda: small.client.get("/health").json()["refused"] == len(refused), "each is counted")
    eventually(lambda: taken(small) == (0, 0), "every place is free")
    assert small.client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
    assert [small.post(body).status_code for _ in range(3)] == [200] * 3


def taken(engine: EngineUnderTest) -> tuple[int, int]:
    """Who is being answered, and who waits for that."""
    health = engine.client.get("/health").json()
    return health["active"], health["waiting"]


def test_a_full_server_still_tells_how_it_is_and_can_be_stopped(small: EngineUnderTest) -> None:
    story = "Write a very long story about a lighthouse."
    body = {"prompt": story, "temperature": 0, "max_tokens": 4000, "stream": True}
    with small.client.stream("POST", run_path(), json=body), small.client.stream("POST", run_path(), json=body):
        assert small.client.get("/health").json()["active"] == 2
        assert small.health()["state"] == "ready"
        assert small.client.post("/engine/stop").status_code == 409
        own = {"sec-fetch-site": "same-origin"}
        assert small.client.get(STREAM, headers=own).status_code == 401, "a stranger is not even let into the queue"
        cookie = small.client.post(LOGIN, headers=own, data={"token": small.record.token}).headers["set-cookie"]
        told = small.client.get(
            STREAM, params={"request": json.dumps(body | {"max_tokens": 5})}, headers={**own, "cookie": cookie}
        )
        assert json.loads(frames(told)[0])["errors"][0]["code"] == 3040
    small.idle()
