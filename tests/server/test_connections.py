"""Peers that are slow, silent, no HTTP or too many, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mistral_nb import runtime
from mistral_nb.runtime import EngineRecord
from mistral_nb.server import connections
from mistral_nb.server.answering import unless_disconnected
from mistral_nb.server.connections import BoundedHttp, _Fuse
from mistral_nb.server.listening import Listener
from tests.server.engines import DEADLINE, eventually

SOON = 0.3
BODIES = {"/short": b"short", "/medium": bytes(400_000), "/large": bytes(16 << 20)}


class Hasty(BoundedHttp):
    """The same, with less patience."""

    head_patience = SOON
    read_patience = SOON


def sparing(patience: float) -> type[BoundedHttp]:
    """The same, with so many seconds for a reader. A slow one may be held up for longer where a machine stands still,
    so that it is tried with ever more of them.
    """
    return type("Sparing", (BoundedHttp,), {"read_patience": patience})


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
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in BODIES:
            await Response(BODIES[scope["path"]])(scope, receive, send)
            return
        if scope["path"] == "/body":
            with pytest.raises(ClientDisconnect):
                await Request(scope, receive).body()
            self.left.set()
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


@pytest.fixture(scope="module")
def patient() -> Iterator[Listening]:
    server = Listening(BoundedHttp)
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
    for connect in (listening.connect, partial(answered, listening)):
        with connect() as connection, pytest.raises(OSError, match=r"reset|Broken pipe|aborted"):
            drip(connection)


def answered(listening: Listening) -> socket.socket:
    """A connection that has had an answer. Where this machine stands still, a head comes too late."""
    for _ in range(20):
        connection, told = listening.connect(b"GET /short HTTP/1.1\r\nHost: a\r\n\r\n"), b""
        with contextlib.suppress(ConnectionResetError):
            while not told.endswith(b"short") and (part := connection.recv(65_536)):
                told += part
        if told.endswith(b"short"):
            return connection
        connection.close()
    raise AssertionError("no answer came")


def test_a_client_that_does_not_read_is_cut(listening: Listening) -> None:
    """The application sees it leave, and has written no more than the buffers hold."""
    listening.sent = 0
    listening.left.clear()
    with listening.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n") as connection:
        assert listening.left.wait(DEADLINE)
        assert listening.sent < 64 << 20
        assert is_cut(connection)


def test_a_client_that_reads_slowly_is_not_cut() -> None:
    def spared(patience: float) -> bool:
        server, reads = Listening(sparing(patience)), True
        with server.connect(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n") as connection:
            end = time.monotonic() + 4 * patience
            with contextlib.suppress(ConnectionResetError):
                while reads and time.monotonic() < end:
                    reads = bool(connection.recv(1 << 20))
            reads = reads and not server.left.is_set()
        assert server.left.wait(DEADLINE)
        server.close()
        return reads

    assert any(spared(patience) for patience in (SOON, 1.5, 8))


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_large_answer_reaches_a_client_that_reads_slowly(connection: str) -> None:
    """However much more than its patience that takes, and whether the connection is to be closed or not."""
    assert any(reads_all_slowly(patience, connection) for patience in (1, 4, 16))


def reads_all_slowly(patience: float, connection: str) -> bool:
    server = Listening(sparing(patience))
    head = f"GET /large HTTP/1.1\r\nHost: a\r\nConnection: {connection}\r\n\r\n".encode()
    with socket.socket() as client, client.makefile("rb") as answer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.settimeout(DEADLINE)
        client.connect(server.socket.getsockname())
        client.sendall(head)
        length = 0
        while line := answer.readline().strip():
            name, _, value = line.partition(b": ")
            length = int(value) if name == b"content-length" else length
        assert length == len(BODIES["/large"])
        with contextlib.suppress(ConnectionResetError):
            while length:
                time.sleep(0.04 * patience)  # how fast it reads: 64 times
                part = answer.read(min(length, 1 << 18))
                if not part:
                    break
                length -= len(part)
    server.close()
    return length == 0


def test_a_client_whose_window_is_long_shut_is_not_cut() -> None:
    """As that of a slow reader with Ethernet's segments: the system lets it take some 100 KB at a time."""

    def spared(patience: float) -> bool:
        server, length = Listening(sparing(patience)), 0
        with socket.socket() as client, contextlib.suppress(ConnectionResetError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
            client.settimeout(DEADLINE)
            client.connect(server.socket.getsockname())
            client.sendall(b"GET /medium HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            while part := client.recv(1 << 14):
                length += len(part)
                time.sleep(patience / 3)  # how fast it reads: the window is shut longer than is waited for others
        server.close()
        return length > len(BODIES["/medium"])

    assert any(spared(patience) for patience in (SOON, 1.5, 6))


def test_a_client_that_does_not_read_what_is_left_is_cut(listening: Listening) -> None:
    """Although nothing more is written to it."""
    client = listening.connect(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    eventually(lambda: not listening.server.server_state.connections, "it is cut")
    client.close()


def test_an_early_answer_reaches_a_client_that_still_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says that nothing follows: a client that reads to the end need not wait. What it sends is dropped."""
    monkeypatch.setattr(connections, "LINGER", DEADLINE)
    patient, size = Listening(BoundedHttp), 8 << 20
    head = f"POST /short HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n".encode()
    with patient.connect(head + bytes(size)) as connection, connection.makefile("rb") as answer:
        assert answer.read().endswith(b"short")
    patient.close()


def test_a_body_that_does_not_come_holds_no_shutdown_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connections, "LINGER", SOON)
    server = Listening(BoundedHttp)
    with server.connect(b"POST /body HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{"):
        eventually(lambda: bool(server.server.server_state.tasks), "the request is there")
        server.server.should_exit = True
        server.thread.join(DEADLINE)
        assert server.left.is_set()
    server.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_who_does_not_stop_sending_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LINGER", SOON)
    patient = Listening(BoundedHttp)
    head = b"POST /short HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 9999999\r\n\r\n"
    with patient.connect(head) as connection, pytest.raises(OSError, match=r"reset|Broken pipe|aborted"):
        drip(connection)
    eventually(lambda: not patient.server.server_state.connections, "nothing is left of it")
    patient.close()


@pytest.mark.parametrize(
    ("head", "parts", "status"),
    [
        ("GET /short HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", [b"no size\r\n"], 400),
        ("GET /short HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", [b"", b"no size\r\n"], 200),
        ("GET /short HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked", [b"", b"x\r\n"], 200),
        ("GET /endless HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", [b"", b"no size\r\n"], 200),
        ("GET /short HTTP/1.1\r\nHost: a\r\nHost: b", [b""], 400),
        ("\x16\x03\x01", [b""], 400),
        ("HEAD /short HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked", [b"no size\r\n"], 400),
        ("HEAD /short HTTP/1.1\r\nHost: a\r\n\r\nGET /short HTTP/1.1\r\nno header", [b""], 200),
    ],
    ids=["at once", "after", "after the last", "during", "two hosts", "TLS", "HEAD", "after HEAD"],
)
def test_what_is_no_http_ends_the_connection(
    patient: Listening, caplog: pytest.LogCaptureFixture, head: str, parts: list[bytes], status: int
) -> None:
    """Before an answer it gets one as every other refusal, and during or after one only the end."""
    with patient.connect(f"{head}\r\n\r\n".encode() + parts[0]) as connection:
        told = connection.recv(65_536)
        for part in parts[1:]:
            connection.sendall(part)
        while more := connection.recv(65_536):
            told = told if status == 200 else told + more
    assert told.startswith(f"HTTP/1.1 {status} ".encode())
    if status == 400:
        body = told.partition(b"\r\n\r\n")[2]
        assert body == b"" if head.startswith("HEAD") else json.loads(body)["errors"][0]["code"] == 6003
    assert not [record for record in caplog.records if record.exc_info or record.levelno > logging.WARNING]


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


def is_free(server: Listening) -> bool:
    return not server.server.server_state.connections


@pytest.fixture
def few_files(listening: Listening, patient: Listening) -> Iterator[Callable[[], object]]:
    """Calling it leaves this process without a file to open, if none is closed meanwhile."""
    for server in (listening, patient):
        eventually(partial(is_free, server), "its connections are closed")
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
