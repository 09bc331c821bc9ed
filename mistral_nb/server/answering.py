"""Reading a request's body, and sending an answer in any shape while the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from mistral_nb.server.generation import Answer
from mistral_nb.server.openai_answers import is_openai, openai_error
from mistral_nb.server.schemas import MAX_BODY, Shape, WireError
from mistral_nb.types import GenerationRequest

__all__ = ["Ask", "Raw", "bounded", "error_response", "read_body", "send_stream", "unless_disconnected", "whole"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """What a body asks for, and how the answer is to be written.

    `choice` and `single` say how the model may call functions, as in `Model.start`; `model` is the name in the body,
    None where the path has it.
    """

    request: GenerationRequest
    shape: Shape
    choice: str = "auto"
    model: str | None = None
    single: bool = False


class Raw:
    """Starlette takes an instance as a plain ASGI application, which may send its answer piece by piece."""

    def __init__(self, answer: ASGIApp) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._answer(scope, receive, send)


async def read_body(request: Request) -> bytes:
    """The request's body; `WireError` 3006 (413) as soon as it is known to be over the limit."""
    body = bytearray()
    async for part in bounded(request, MAX_BODY, "send a shorter prompt"):
        body += part
    return bytes(body)


async def bounded(request: Request, limit: int, advice: str) -> AsyncIterator[bytes]:
    """The parts of a body of at most `limit` bytes; `WireError` 3006 (413) as soon as it is known to be longer."""
    size = int(request.headers.get("content-length", 0))
    if size <= limit:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            yield part
    if size > limit:
        raise WireError(413, 3006, f"the body is over {limit} bytes; {advice}")


async def whole(answer: Answer, shape: Shape, headers: Mapping[str, str]) -> Response:
    """The answer in one body."""
    pieces = [piece async for piece in answer.pieces()]
    return JSONResponse(shape.whole("".join(piece.text for piece in pieces), pieces[-1]), headers=headers)


async def send_stream(answer: Answer, shape: Shape, headers: Mapping[str, str], send: Send) -> None:
    """The answer as server-sent events, one part of the body for each piece; an error on the way is the last event."""
    sent = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", **headers}
    raw = [(name.encode(), value.encode()) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    await _send_body(send, shape.begin())
    try:
        async for piece in answer.pieces():
            await _send_body(send, shape.frames(piece))
    except WireError as error:
        await _send_body(send, shape.failure(error))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_body(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: `ClientDisconnect` then."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait((task, gone))


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def error_response(path: str, error: WireError) -> Response:
    """An error as the interface writes it that `path` belongs to."""
    if is_openai(path):
        status, body = openai_error(error)
        return JSONResponse(body, status_code=status)
    return JSONResponse(error.body, status_code=error.status)
