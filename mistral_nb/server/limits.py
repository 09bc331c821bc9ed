"""What one client may take from the others: places, connections, and time to send a request or to read an answer."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mistral_nb.server.edge import refuse
from mistral_nb.server.schemas import WireError

__all__ = ["BoundedHttp", "Gate", "Limited"]

PATIENCE = 5.0
"""Seconds that a request waits for a place."""

BODY_PATIENCE = 30.0
"""Seconds for a body to arrive, and those that `BODY_RATE` gives it."""

BODY_RATE = 16_384
"""Bytes a second."""

_LINGER = 5.0


class Gate:
    """`places` requests at a time; as many may wait for `patience` seconds. On one event loop."""

    def __init__(self, places: int, patience: float = PATIENCE) -> None:
        self.waiting = 0
        self._places = places
        self._patience = patience
        self._free = asyncio.Semaphore(places)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place, given back at the end of the block. `WireError` 3040 (429) when there is none."""
        if self._free.locked() and self.waiting >= self._places:
            raise self._full()
        self.waiting += 1
        try:
            async with asyncio.timeout(self._patience):
                await self._free.acquire()
        except TimeoutError:
            raise self._full() from None
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._free.release()

    @property
    def retry_after(self) -> str:
        """Seconds, as HTTP has it."""
        return str(max(1, round(self._patience)))

    def _full(self) -> WireError:
        return WireError(
            429,
            3040,
            f"Capacity temporarily exceeded: {self._places} requests are being answered. Try again in a moment, or "
            "start the server with more --max-requests",
        )


class Limited:
    """Lets what costs something through the gate, and gives every body a time to arrive in: 3007 (408) after it."""

    def __init__(self, app: ASGIApp, gate: Gate, costs: Callable[[Scope], bool]) -> None:
        self._app = app
        self._gate = gate
        self._costs = costs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        timely = _timely(receive)
        if not self._costs(scope):
            await self._app(scope, timely, send)
            return
        try:
            async with self._gate.place():
                await self._app(scope, timely, send)
        except WireError as error:
            await refuse(error, scope, receive, send, {"retry-after": self._gate.retry_after})


def _timely(receive: Receive) -> Receive:
    """`receive` that gives up on a body which is too slow. Once the body is there it waits as long as need be."""
    started = time.monotonic()
    taken, whole = 0, False

    async def next_message() -> Message:
        nonlocal taken, whole
        if whole:
            return await receive()
        left = started + BODY_PATIENCE + taken / BODY_RATE - time.monotonic()
        try:
            async with asyncio.timeout(left):
                message = await receive()
        except TimeoutError:
            raise WireError(
                408, 3007, f"the body did not arrive: {taken} bytes of it are here. Send it again"
            ) from None
        taken += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        return message

    return next_message


class BoundedHttp(H11Protocol):
    """uvicorn's protocol for connections whose peers may be slow or silent on purpose.

    Cut are those that do not send a whole head within `head_patience` seconds of their first byte or of connecting,
    those that do not read for `read_patience` seconds while there is something to read or whose machine is gone for
    as long, and those beyond `max_connections`. Their requests see that the client has left.
    """

    head_patience = 20.0
    read_patience = 30.0
    max_connections = 512

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._head = _Fuse(transport, self.head_patience)
        self._reading = _Fuse(transport, self.read_patience)
        self._linger = _Fuse(transport, _LINGER)
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

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._linger.light()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._linger.light()

    def _close(self, transport: asyncio.Transport) -> bool:
        """Close, or only say that nothing follows, and True, where the peer is still sending.

        A socket that is closed with something unread resets the connection, and the answer may be lost on its way.
        """
        self._discards = repr(self.conn.their_state) in ("SEND_BODY", "ERROR")
        if not self._discards:
            transport.close()
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
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    bounds = {"TCP_KEEPIDLE": seconds / 2, "TCP_KEEPINTVL": seconds / 6, "TCP_USER_TIMEOUT": seconds * 1000}
    for name, value in bounds.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, round(value)))


class _Fuse:
    """Drops a connection, and what it was still to be sent, unless put out within some seconds."""

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None

    def light(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._transport.abort)

    def put_out(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
