"""The endpoints: run on the Workers AI wire, and health, tokenize and stop for our own client."""

from __future__ import annotations

import asyncio
import difflib
import json
import os
import shlex
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from mistral_nb import __version__
from mistral_nb.errors import MistralError
from mistral_nb.runtime import PROTOCOL
from mistral_nb.server.generation import Answer
from mistral_nb.server.holder import Holder
from mistral_nb.server.schemas import (
    DONE,
    MAX_BODY,
    WireError,
    end_frame,
    envelope,
    error_frame,
    parse_request,
    text_frame,
    wire_error,
)

__all__ = ["Endpoints", "Identity"]

MODEL_HEADER = "x-mistral-nb-model"

_PRINTABLE = "".join(chr(code) for code in range(33, 127) if chr(code) != "%")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Identity:
    """Under which names a process answers: the model it holds, that model's other names, and those of `--serve-as`."""

    model: str
    aliases: tuple[str, ...]
    serve_as: tuple[str, ...]
    log: str

    @property
    def header(self) -> dict[str, str]:
        return {MODEL_HEADER: quote(self.model, safe=_PRINTABLE)}

    def check(self, asked: str) -> None:
        """`WireError` 5007 unless `asked` is one of the names, in any case of letters, with or without a slash last."""
        asked = asked.rstrip("/")
        names = (self.model, *self.aliases, *self.serve_as)
        if asked.lower() in {name.lower() for name in names}:
            return
        near = difflib.get_close_matches(asked, names, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        held = self.model + (f", which also answers for {', '.join(self.serve_as)}" if self.serve_as else "")
        raise WireError(
            400,
            5007,
            f"No such model {asked}{hint}: this engine holds {held}. To let it answer for that name, start it with: "
            f"mistral-nb serve --model {shlex.quote(self.model)} --serve-as {shlex.quote(asked)}",
        )


class Endpoints:
    """The handlers, over the model that the process holds. `stop` ends the process."""

    def __init__(self, holder: Holder, identity: Identity, stop: Callable[[str], None]) -> None:
        self._holder = holder
        self._identity = identity
        self._stop = stop
        self._started = time.monotonic()

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, streamed or whole; a client that goes away ends it, wherever it stands."""
        with self._holder.request():
            request = Request(scope, receive)
            try:
                self._identity.check(request.path_params["model"])
                body = await _body(request)
                await _unless_disconnected(receive, self._respond(body, scope, receive, send))
            except ClientDisconnect:
                return

    async def _respond(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = parse_request(body)
        model = await self._holder.ready()
        answer = await model.start(wanted)
        with self._holder.answering(answer):
            if wanted.stream:
                await self._stream(answer, send)
            else:
                await (await self._whole(answer))(scope, receive, send)

    async def _whole(self, answer: Answer) -> Response:
        pieces = [piece async for piece in answer.pieces()]
        last = pieces[-1]
        assert last.usage is not None
        assert last.finish_reason is not None
        body = envelope("".join(piece.text for piece in pieces), last.usage, last.finish_reason)
        return JSONResponse(body, headers=self._identity.header)

    async def _stream(self, answer: Answer, send: Send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        raw = [(name.encode(), value.encode()) for name, value in {**headers, **self._identity.header}.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            async for piece in answer.pieces():
                frames = text_frame(piece.text) if piece.text else b""
                if piece.usage and piece.finish_reason:
                    frames += end_frame(piece.usage, piece.finish_reason) + DONE
                await _send_body(send, frames)
        except WireError as error:
            await _send_body(send, error_frame(error))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def health(self, request: Request) -> Response:
        """What this process holds and what it does. Does not count as use."""
        holder, identity = self._holder, self._identity
        info = holder.model.engine.info if holder.model else None
        return JSONResponse(
            {
                "protocol": PROTOCOL,
                "version": __version__,
                "state": holder.state,
                "error": holder.error,
                "loaded": holder.loaded,
                "to_load": holder.to_load,
                "model": identity.model,
                "serve_as": list(identity.serve_as),
                "device": info.device if info else "",
                "precision": info.precision if info else "",
                "context": info.context if info else None,
                "kernels": info.kernels if info else "",
                "pid": os.getpid(),
                "active": holder.requests,
                "served": holder.served,
                "uptime_s": round(time.monotonic() - self._started, 3),
                "log": identity.log,
            },
            headers=identity.header,
        )

    async def tokenize(self, request: Request) -> Response:
        """What a run request with this body would give the model; waits for the model, runs nothing."""
        with self._holder.request():
            wanted = parse_request(await _body(request))
            model = await _unless_disconnected(request.receive, self._holder.ready())
            prompt = await asyncio.to_thread(model.prompt, wanted)
            tokens = {"prompt": prompt.text, "tokens": prompt.ids, "count": len(prompt.ids)}
            return JSONResponse({**tokens, "context": model.engine.info.context}, headers=self._identity.header)

    async def stop(self, request: Request) -> Response:
        """End the process: 409 while it is answering, unless the body says `{"force": true}`."""
        force = _force(await _body(request))
        active = self._holder.requests
        if active and not force:
            return JSONResponse({"stopping": False, "active": active}, status_code=409)
        self._stop("by request")
        return JSONResponse({"stopping": True, "active": active})


def _force(body: bytes) -> bool:
    try:
        data = json.loads(body or b"{}")
    except ValueError as error:
        raise WireError(400, 5006, f'the body is not JSON ({error}); send {{}} or {{"force": true}}') from error
    if not isinstance(data, dict) or not set(data) <= {"force"} or not isinstance(data.get("force", False), bool):
        raise WireError(400, 5006, 'the body must be {} or {"force": true}')
    return bool(data.get("force", False))


async def _body(request: Request) -> bytes:
    """The request's body; `WireError` 3006 (413) as soon as it is known to be over the limit."""
    size = int(request.headers.get("content-length", 0))
    body = bytearray()
    if size <= MAX_BODY:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                break
    if max(size, len(body)) > MAX_BODY:
        raise WireError(413, 3006, f"the body is over {MAX_BODY} bytes; send a shorter prompt")
    return bytes(body)


async def _send_body(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
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


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this."""
    return Response(status_code=499)


async def on_wire_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, WireError)
    return JSONResponse(error.body, status_code=error.status)


async def on_mistral_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MistralError)
    return await on_wire_error(request, wire_error(error))
