"""Clients that take too much: too many at once, too slow to send, and not reading what they asked for."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mistral_nb import runtime
from mistral_nb.runtime import EngineRecord
from mistral_nb.server import limits
from mistral_nb.server.answering import unless_disconnected
from mistral_nb.server.limits import BoundedHttp, Gate, Limited, _Fuse
from mistral_nb.server.listening import Listener
from mistral_nb.server.playground import LOGIN, STREAM
from mistral_nb.server.schemas import WireError
from tests.server.engines import DEADLINE, Engines, EngineUnderTest, eventually, frames, run_path

SOON = 0.3


class Hasty(BoundedHttp):
    """The same, with less patience."""

    head_patience = SOON
    read_patience = SOON


class Few(BoundedHttp):
    """The same, for fewer clients."""

    max_connections = 8


class Listening:
    """An application behind `protocol`, on a thread of its own, that writes without end or until its client leaves."""

    def __init__(self, protocol: type[BoundedHttp]) -> None:
        self.left = threading.Event()
        self.sent = 0
        config = uvicorn.Config(
            self.answer, interface="asgi3", http=protocol, lifespan="off", ws="none", log_config=None, access_log=False
        )
        self.server = uvicorn.Server(config)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/short":
            await Response("short")(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with pytest.raises(ClientDisconnect):
            await unless_disconnected(receive, self._write(send))
        self.left.set()

    async def _write(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": bytes(65_536), "more_body": True})
            self.sent += 65_536
            await asyncio.sleep(0)

    def connect(self, sent: bytes = b"") -> socket.socket:
        connection = socket.create_connection(self.socket.getsockname(), timeout=DEADLINE)
        connection.sendall(sent)
        return connection

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


@pytest.fixture(scope="module")
def listening() -> Iterator[Listening]:
    server = Listening(Hasty)
    yield server
    server.close()


def is_cut(connection: socket.socket) -> bool:
    """Whether the peer drops the connection; waits for it."""
    try:
        while connection.recv(65_536):
            pass
    except ConnectionResetError:
        pass
    finally:
        connection.close()
    return True


@pytest.mark.parametrize("sent", [b"", b"GET /short HT", b"GET /short HTTP/1.1\r\nHost: a\r\nX: "])
def test_a_head_that_does_not_come_is_not_waited_for(listening: Listening, sent: bytes) -> None:
    assert is_cut(listening.connect(sent))


def drip(connection: socket.socket) -> None:
    for _ in range(1000):
        connection.sendall(b"G")
        time.sleep(0.02)  # how fast the drops come


def test_a_head_that_comes_drop_by_drop_is_not_waited_for(listening: Listening) -> None:
    """Neither on a new connection nor on one that has had an answer."""
    for before in (b"", b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n"):
        with listening.connect(before) as connection:
            while before and not connection.recv(65_536).endswith(b"short"):
                pass
            with pytest.raises(OSError, match=r"reset|Broken pipe|aborted"):
                drip(connection)


def test_a_client_that_does_not_read_is_cut(listening: Listening) -> None:
    """The application sees it leave, and has written no more than the buffers hold."""
    listening.sent = 0
    with listening.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n") as connection:
        assert listening.left.wait(DEADLINE)
        assert listening.sent < 64 << 20
        assert is_cut(connection)


def test_a_client_that_reads_slowly_is_not_cut(listening: Listening) -> None:
    listening.left.clear()
    with listening.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n") as connection:
        end = time.monotonic() + 4 * SOON
        while time.monotonic() < end:
            assert connection.recv(1 << 20)
        assert not listening.left.is_set()
    assert listening.left.wait(DEADLINE)


def test_an_early_answer_reaches_a_client_that_still_sends() -> None:
    """And says that nothing follows: a client that reads to the end need not wait. What it sends is dropped."""
    patient, size = Listening(BoundedHttp), 8 << 20
    head = f"POST /short HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n".encode()
    with patient.connect(head + bytes(size)) as connection, connection.makefile("rb") as answer:
        assert answer.read().endswith(b"short")
    patient.close()


def test_who_does_not_stop_sending_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LINGER", SOON)
    patient = Listening(BoundedHttp)
    head = b"POST /short HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 9999999\r\n\r\n"
    with patient.connect(head) as connection, pytest.raises(OSError, match=r"reset|Broken pipe|aborted"):
        drip(connection)
    eventually(lambda: not patient.server.server_state.connections, "nothing is left of it")
    patient.close()


def test_no_fuse_outlives_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would blow on a transport that is gone."""
    lit: list[_Fuse] = []
    light = _Fuse.light

    def remember(fuse: _Fuse) -> None:
        light(fuse)
        lit.append(fuse)

    monkeypatch.setattr(_Fuse, "light", remember)
    server = Listening(BoundedHttp)
    assert is_cut(server.connect(b"GET /short HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))
    eventually(lambda: not server.server.server_state.connections, "the connection is gone")
    assert lit
    assert not [fuse for fuse in lit if fuse._timer]
    server.close()


def test_connections_beyond_the_bound_are_dropped() -> None:
    few = Listening(Few)
    opened = [few.connect() for _ in range(Few.max_connections)]
    eventually(lambda: len(few.server.server_state.connections) == Few.max_connections, "all are connected")
    assert is_cut(few.connect(b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n"))
    for connection in opened:
        connection.close()
    few.close()


@pytest.fixture
def few_files() -> Iterator[Callable[[], object]]:
    """Calling it leaves this process without a file to open."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave_none() -> None:
        free = os.open(os.devnull, os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))

    yield leave_none
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_without_files_closes_connections_as_they_come(
    few_files: Callable[[], object], caplog: pytest.LogCaptureFixture
) -> None:
    with Listener.over(socket.create_server(("127.0.0.1", 0)), 8) as listener, socket.socket() as client:
        listener.setblocking(False)
        client.settimeout(DEADLINE)
        client.connect(listener.getsockname())
        few_files()
        for _ in range(2):
            with pytest.raises(ConnectionAbortedError):
                listener.accept()
        assert client.recv(1) == b""
    assert caplog.text.count("may open no more files") == 1


def test_a_record_that_cannot_be_read_now_is_not_lost(
    few_files: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path))
    record = EngineRecord(1, 2, "token", "a", "1", 1, "", 0.0)
    assert runtime.is_lost(record)
    runtime.write_record(record)
    assert not runtime.is_lost(record)
    assert runtime.is_lost(replace(record, token="another"))
    few_files()
    assert not runtime.is_lost(record)


def body_of(*parts: bytes, silent: bool = False) -> Receive:
    """What a server hands on of a body, which may stop short of its end."""

    async def parts_of() -> AsyncIterator[dict[str, object]]:
        for n, part in enumerate(parts):
            yield {"type": "http.request", "body": part, "more_body": silent or n + 1 < len(parts)}
        await asyncio.Event().wait()

    messages = parts_of()
    return lambda: messages.__anext__()


def test_a_body_that_stops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_PATIENCE", SOON)
    answers: list[dict[str, object]] = []

    async def read(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(await Request(scope, receive).body())(scope, receive, send)

    async def send(message: dict[str, object]) -> None:
        answers.append(message)

    app = Limited(read, Gate(1), lambda scope: False)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(app(scope, body_of(b"a", b"b"), send))  # type: ignore[arg-type]
    assert answers[-1]["body"] == b"ab"
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
    health = small.client.get("/health").json()
    assert (health["active"], health["waiting"]) == (0, 0)
    assert small.client.post("/v1/chat/completions", json={"messages": []}).status_code == 400
    assert [small.post(body).status_code for _ in range(3)] == [200] * 3


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
