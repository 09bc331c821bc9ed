"""A peer on a real loopback socket that plays a script of bytes."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

PATIENCE = 180.0
"""Seconds after which a wait has failed: no other limit of a client or a peer ends it sooner."""
ACCOUNT = "0123456789abcdef0123456789abcdef"
TOKEN = "s3cret-t0ken-never-shown"
Step = bytes | threading.Event | str | Callable[[], None]


def environment_of(url: str) -> dict[str, str]:
    """The variables with which the server at `url` is the account."""
    return {
        "CLOUDFLARE_ACCOUNT_ID": ACCOUNT,
        "CLOUDFLARE_API_TOKEN": TOKEN,
        "MISTRAL_NB_CLOUDFLARE_BASE_URL": url,
        "MISTRAL_NB_CLOUDFLARE_TRUST_BASE_URL": "true",
    }


@dataclass
class Seen:
    """One request as it came over the socket."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def path(self) -> str:
        return self.line.split(" ")[1]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Listener:
    """A port on loopback. Each connection, by its number from 0, has a thread in which `serve` answers it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._threads: list[threading.Thread] = []
        self._connections: list[socket.socket] = []
        self.start(self._accept)

    @property
    def connections(self) -> int:
        """How many there were."""
        return len(self._connections)

    def serve(self, connection: socket.socket, number: int) -> None:
        raise NotImplementedError

    def start(self, target: Callable[..., None], *arguments: object) -> None:
        """Call `target` in a thread that `close` waits for."""
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop_listening(self) -> None:
        """Refuse new connections; those that there are go on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def hang_up(self) -> None:
        """Close every connection that is there."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.stop_listening()
        self._threads[0].join(PATIENCE)  # what was accepted last is among the connections by then
        self.hang_up()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self.start(self.serve, connection, len(self._connections) - 1)


@dataclass
class Peer(Listener):
    """Plays one script for each connection, the last one again and again.

    A step is bytes to send, an event to wait for, a function to call, "hold" (until the client goes), "drip" (a frame
    of text again and again until the client goes) or "reset"; after the last one the connection is closed.
    """

    scripts: list[Sequence[Step]] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    accepted: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    drop: bytes = b'data: {"response": "drip "}\n\n'

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/client/v4"

    def close(self) -> None:
        self.gone.set()
        super().close()

    def serve(self, connection: socket.socket, number: int) -> None:
        self.accepted.set()
        script = self.scripts[min(number, len(self.scripts) - 1)] if self.scripts else ["hold"]
        gone = threading.Event()
        # A peer does not mind that the client went away.
        with connection, contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self.seen.append(read_request(connection))
            except OSError:
                self.gone.set()
                return
            self.asked.set()
            self.start(self._watch, connection, gone)
            for step in script:
                if isinstance(step, bytes):
                    connection.sendall(step)
                elif isinstance(step, threading.Event):
                    assert step.wait(PATIENCE)
                elif step == "hold":
                    gone.wait(PATIENCE)
                elif step == "drip":
                    self._drip(connection, gone)
                elif callable(step):
                    step()
                elif step == "reset":
                    connection.shutdown(socket.SHUT_RD)
                    assert gone.wait(PATIENCE)
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
            connection.shutdown(socket.SHUT_RDWR)

    def _drip(self, connection: socket.socket, gone: threading.Event) -> None:
        while not gone.wait(0.01):
            connection.sendall(self.drop)

    def _watch(self, connection: socket.socket, gone: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(1024):
                pass
        gone.set()
        self.gone.set()


class full_house:
    """A port whose queue of connections is full, so that a connection is neither taken nor refused."""

    def __enter__(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._waiting = []
        for _ in range(4):
            waiting = socket.socket()
            waiting.setblocking(False)
            waiting.connect_ex(self._listener.getsockname())
            self._waiting.append(waiting)
        return int(self._listener.getsockname()[1])

    def __exit__(self, *error: object) -> None:
        for waiting in [*self._waiting, self._listener]:
            waiting.close()


def read_request(connection: socket.socket) -> Seen:
    def more() -> bytes:
        part = connection.recv(65536)
        if not part:
            raise OSError("no whole request came")
        return part

    data = b""
    while b"\r\n\r\n" not in data:
        data += more()
    head, _, body = data.partition(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        body += more()
    return Seen(line, headers, body)


def eventually(predicate: Callable[[], bool], within: float = PATIENCE) -> bool:
    """Whether something outside this process comes to a state within some seconds."""
    deadline = time.monotonic() + within
    while not predicate():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.005)
    return True


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


def interrupt() -> None:
    """As a user does: the main thread is."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def head(status: str = "200 OK", kind: str = "text/event-stream", *more: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", f"Content-Type: {kind}", *more, "Connection: close", "", ""]).encode()


def frame(data: Any) -> bytes:
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()


def body(data: Any, status: str = "200 OK", *more: str) -> list[Step]:
    return [head(status, "application/json", *more) + json.dumps(data).encode()]
