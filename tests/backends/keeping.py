"""A peer that keeps its connections, as Cloudflare's does: HTTP/1.1, one answer after the other on a socket."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.backends.scripted import PATIENCE, Listener, frame, read_request

Answer = Callable[["Visit"], None]


@dataclass
class Visit:
    """One request: which connection it came on, counted from 0, and the socket to answer it."""

    connection: int
    number: int
    socket: socket.socket
    line: str
    headers: dict[str, str]

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
class Keeper(Listener):
    """Calls `answer` for each request. What it raises ends the connection."""

    answer: Answer = lambda visit: visit.send("Hello")
    tls: ssl.SSLContext | None = None
    visits: list[Visit] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/client/v4"

    def close(self) -> None:
        super().close()
        assert self.failures == []

    def serve(self, connection: socket.socket, number: int) -> None:
        try:
            wrapped = self.tls.wrap_socket(connection, server_side=True) if self.tls else connection
            with wrapped:
                while True:
                    seen = read_request(wrapped)
                    visit = Visit(number, len(self.visits), wrapped, seen.line, seen.headers)
                    self.visits.append(visit)
                    self.answer(visit)
        except OSError:
            return
        except AssertionError as error:
            self.failures.append(error)
