"""What one client may take from the others: places, and time for a body to arrive in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mistral_nb.server.edge import refuse
from mistral_nb.server.schemas import WireError

__all__ = ["Gate", "Limited"]

PATIENCE = 5.0
"""Seconds that a request waits for a place."""

BODY_PATIENCE = 30.0
"""Seconds for a body to arrive, and those that `BODY_RATE` gives it."""

BODY_RATE = 16_384
"""Bytes a second."""


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
