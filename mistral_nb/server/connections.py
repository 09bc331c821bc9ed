"""Connections whose peers may be slow, silent or no HTTP: what they get, and when they are cut."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Callable
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mistral_nb.server.schemas import WireError

__all__ = ["MAX_HEAD", "BoundedHttp"]

MAX_HEAD = 65_536
"""Bytes of a request's line and headers: the playground sends its prompts in the line."""

READ_RATE = 1024
"""Bytes a second that a peer must take of what waits for it, or else it does not read."""

LINGER = 2.0
"""Seconds for a peer that still sends: to take note of an answer that ends the connection, and, once the server shuts
down, to send the rest of a body. A shutdown gives connections 3 seconds in all.
"""

UNTAKEN = 10
"""How many times its patience a peer may take none of what it was sent: the window of a slow one is long shut."""


class BoundedHttp(H11Protocol):
    """uvicorn's protocol for connections whose peers may be slow or silent on purpose.

    Cut are those that do not send a whole head within `head_patience` seconds of their first byte or of connecting,
    those that read less than `READ_RATE` for `read_patience` seconds while there is something to read, those whose
    machine is gone for as long, or `UNTAKEN` times as long where something was on its way to it, and those beyond
    `max_connections`. Their requests see that the client has left.
    """

    head_patience = 20.0
    read_patience = 30.0
    max_connections = 512

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head = _Fuse(transport, self.head_patience)
        self._reading = _Fuse(transport, self.read_patience)
        self._linger = _Fuse(transport, LINGER)
        self._discards = False
        super().connection_made(cast(asyncio.Transport, _Closing(transport, self._close)))
        _notice_absence(transport.get_extra_info("socket"), self.read_patience)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._head.light()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head.put_out()
        self._reading.put_out()
        self._linger.put_out()

    def data_received(self, data: bytes) -> None:
        if self._discards:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._head.put_out()
        else:
            self._head.light()

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: an offer of HTTP/2 or WebSockets may be left unanswered. uvicorn would have packages installed."""

    def shutdown(self) -> None:
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body and not self.cycle.response_started:
            self._linger.light()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP as the wire has it, unless an answer was begun: uvicorn's own would fail then.

        A request in the middle of which it came sees that its client has left.
        """
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            bodiless = self.conn.our_state is h11.SEND_RESPONSE and self.scope["method"] == "HEAD"
            error = WireError(400, 6003, f"Invalid request: send HTTP/1.1, with a head of at most {MAX_HEAD} bytes")
            body = json.dumps(error.body).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            response = h11.Response(status_code=error.status, headers=[*headers.items()], reason=b"Bad Request")
            for event in (response, *([] if bodiless else [h11.Data(data=body)]), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _close(self, transport: asyncio.Transport) -> bool:
        """Close, or only say that nothing follows, and True, where the peer is still sending.

        A socket that is closed with something unread resets the connection, and the answer may be lost on its way.
        """
        self._discards = self.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not self._discards:
            transport.close()
            self._reading.light()
            return False
        self.flow.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()
        self._linger.light()
        return True

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading.light()

    def resume_writing(self) -> None:
        self._reading.put_out()
        if self.transport.is_closing():
            self._reading.light()
        super().resume_writing()


class _Closing:
    """A transport that leaves it to `close` how it is closed the first time; it is closing ever after."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[asyncio.Transport], bool]) -> None:
        self._transport = transport
        self._close = close
        self._waits = False

    def close(self) -> None:
        if self._waits or self._transport.is_closing():
            self._transport.close()
        else:
            self._waits = self._close(self._transport)

    def is_closing(self) -> bool:
        return self._waits or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _notice_absence(connection: socket.socket, seconds: float) -> None:
    """Let the system drop a peer that went without a word, as one does whose cable was pulled. Linux has the bounds."""
    bounds = {
        "TCP_KEEPIDLE": seconds / 2,
        "TCP_KEEPINTVL": seconds / 6,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": seconds * UNTAKEN * 1000,
    }
    with contextlib.suppress(OSError):  # macOS takes no options for a connection that its peer has reset
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in bounds.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, round(value)))


class _Fuse:
    """Drops a connection, and what it was still to be sent, unless put out within some seconds.

    A peer that takes what waits for it at `READ_RATE` gets as many seconds again.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def light(self) -> None:
        if self._timer is None:
            unsent = self._transport.get_write_buffer_size()
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._blow, unsent)

    def _blow(self, before: int) -> None:
        self._timer = None
        unsent = self._transport.get_write_buffer_size()
        if unsent and before - unsent >= READ_RATE * self._seconds:
            self.light()
        else:
            self._transport.abort()

    def put_out(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
