"""A peer that keeps its connections, as Cloudflare's does: HTTP/1.1, one answer after the other on a socket."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.backends.scripted import PATIENCE, frame, read_request

Answer = Callable[["Visit"], None]


@dataclass
class Visit:
    """One request: which connection it came on, counted from 0, and the socket to answer it."""

    connection: int
    number: int
    socket: socket.socket
    line: str

    def send(self, *texts: str, whole: bool = True) -> None:
        """An answer of so many frames, each in an HTTP chunk of its own; the connection stays open."""
        parts = [frame({"response": text}) for text in texts] + ([frame("[DONE]")] if whole else [])
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        self.socket.sendall(head + chunks + (b"0\r\n\r\n" if whole else b""))

    def wait_for_the_end(self) -> None:
        """Until the client has closed the connection."""
        self.socket.settimeout(PATIENCE)
        assert self.socket.recv(1) == b""


@dataclass
class Keeper:
    """Calls `answer` for each request. What it raises ends the connection."""

    answer: Answer = lambda visit: visit.send("Hello")
    tls: ssl.SSLContext | None = None
    visits: list[Visit] = field(default_factory=list)
    connections: int = 0
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}/client/v4"

    def hang_up(self) -> None:
        """Close every connection that is there."""
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert self.failures == []

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, connection, self.connections)
            self.connections += 1

    def _serve(self, connection: socket.socket, number: int) -> None:
        self._sockets.append(connection)
        try:
            wrapped = self.tls.wrap_socket(connection, server_side=True) if self.tls else connection
            with wrapped:
                while True:
                    seen = read_request(wrapped)
                    self.visits.append(Visit(number, len(self.visits), wrapped, seen.line))
                    self.answer(self.visits[-1])
        except OSError:
            return
        except AssertionError as error:
            self.failures.append(error)
