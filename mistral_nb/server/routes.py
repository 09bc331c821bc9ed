"""The endpoints: text on Workers AI's wire and on OpenAI's, and health, tokenize and stop for our own client."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mistral_nb import __version__
from mistral_nb.errors import AdapterError, ContextOverflow, InvalidRequest, MistralError
from mistral_nb.finetunes import AdapterStore
from mistral_nb.runtime import PROTOCOL
from mistral_nb.server.answering import (
    Ask,
    Raw,
    error_response,
    read_body,
    send_stream,
    unless_disconnected,
    whole,
)
from mistral_nb.server.catalog import Catalog, Identity
from mistral_nb.server.edge import has_read_record
from mistral_nb.server.finetunes import Finetunes
from mistral_nb.server.holder import Holder
from mistral_nb.server.journal import current
from mistral_nb.server.openai import parse_chat, parse_completion
from mistral_nb.server.schemas import WireError, WorkersShape, parse_json, parse_request, wire_error
from mistral_nb.types import MAX_NAME

__all__ = ["Endpoints", "Identity"]


class Endpoints:
    """The handlers, over the model that the process holds. `stop` ends the process.

    Who has read its record, as `proof` tells, may name any folder; others name what is in the store.
    """

    def __init__(self, holder: Holder, identity: Identity, stop: Callable[[str], None], proof: str) -> None:
        self._holder = holder
        self._identity = identity
        self._finetunes = Finetunes(AdapterStore(), holder.request)
        self._catalog = Catalog(holder, identity, self._finetunes)
        self._stop = stop
        self._proof = proof

    @property
    def routes(self) -> list[Route]:
        """Which path leads where. OpenAI's stand at the root and, as on Cloudflare, below an account."""
        ai = "/client/v4/accounts/{account}/ai"
        catalog, finetunes = self._catalog, self._finetunes
        return [
            Route(f"{ai}/run/{{model:path}}", Raw(self.run), methods=["POST"]),
            *(route for root in ("", ai) for route in self._openai(f"{root}/v1")),
            Route(f"{ai}/models/search", catalog.search, methods=["GET"]),
            Route(f"{ai}/finetunes", finetunes.list, methods=["GET"]),
            Route(f"{ai}/finetunes", finetunes.create, methods=["POST"]),
            Route(f"{ai}/finetunes/public", finetunes.public, methods=["GET"]),
            Route(f"{ai}/finetunes/{{finetune}}/finetune-assets", finetunes.upload, methods=["POST"]),
            Route("/engine/health", self.health, methods=["GET"]),
            Route("/engine/tokenize", self.tokenize, methods=["POST"]),
            Route("/engine/stop", self.stop, methods=["POST"]),
        ]

    def _openai(self, root: str) -> list[Route]:
        return [
            Route(f"{root}/chat/completions", Raw(self.chat), methods=["POST"]),
            Route(f"{root}/completions", Raw(self.complete), methods=["POST"]),
            Route(f"{root}/models", self._catalog.models, methods=["GET"]),
            Route(f"{root}/models/{{model:path}}", self._catalog.model, methods=["GET"]),
        ]

    async def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that requests may give."""
        return await self._catalog.adapters()

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Workers AI's, which names the model in the path."""

        def parse(body: bytes) -> Ask:
            return Ask(parse_request(body), WorkersShape())

        await self._generate(scope, receive, send, parse)

    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """OpenAI's chat completions."""

        def parse(body: bytes) -> Ask:
            return parse_chat(body, self._identity.model, current.get().id)

        await self._generate(scope, receive, send, parse)

    async def complete(self, scope: Scope, receive: Receive, send: Send) -> None:
        """OpenAI's older completions of a bare prompt."""

        def parse(body: bytes) -> Ask:
            return parse_completion(body, self._identity.model, current.get().id)

        await self._generate(scope, receive, send, parse)

    async def _generate(self, scope: Scope, receive: Receive, send: Send, parse: Callable[[bytes], Ask]) -> None:
        """Answer a request, streamed or whole; a client that goes away ends it, wherever it stands."""
        with self._holder.request():
            request = Request(scope, receive)
            try:
                if "model" in request.path_params:
                    self._identity.check(request.path_params["model"])
                ask = parse(await read_body(request))
                await unless_disconnected(receive, self._respond(ask, scope, receive, send))
            except ClientDisconnect:
                return

    async def _respond(self, ask: Ask, scope: Scope, receive: Receive, send: Send) -> None:
        ask = await self._with_adapter(ask)
        wanted = ask.request
        adapter = await self._finetunes.resolve(wanted, paths=has_read_record(scope, self._proof))
        model = await self._holder.ready()
        try:
            answer = await model.start(wanted, ask.choice, single=ask.single, adapter=adapter)
        except ContextOverflow as error:
            raise error if wanted.prompt else ContextOverflow(error.prompt_tokens, error.limit, "messages") from error
        except AdapterError as error:
            assert adapter is not None
            raise adapter.refused(error) from error
        headers = self._identity.header
        with self._holder.answering(answer):
            if wanted.stream:
                await send_stream(answer, ask.shape, headers, send)
            else:
                await (await whole(answer, ask.shape, headers))(scope, receive, send)

    async def _with_adapter(self, ask: Ask) -> Ask:
        """`ask`, where a body may name an adapter in the place of a model."""
        if ask.model is None or self._identity.answers_to(ask.model):
            return ask
        if len(ask.model) > MAX_NAME or not await self._finetunes.knows(ask.model):
            self._identity.check(ask.model, await self._catalog.adapters())
        if ask.request.lora not in (None, ask.model):
            told = f"model names the adapter {ask.model} already; leave one of them out"
            raise InvalidRequest("lora", ask.request.lora, told)
        return replace(ask, request=ask.request.with_(lora=ask.model), shape=ask.shape.of(ask.model))

    async def health(self, request: Request) -> Response:
        """What this process holds and what it does. Does not count as use."""
        holder, identity = self._holder, self._identity
        info = holder.model.engine.info if holder.model else None
        use = holder.model.engine.use if holder.model else None
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
                "why": info.why if info else "",
                "context": info.context if info else None,
                "kernels": info.kernels if info else "",
                "memory": use.memory if use else None,
                "kv_used": use.kv_used if use else 0,
                "kv_tokens": use.kv_tokens if use else 0,
                "tokens_per_second": use.tokens_per_second if use else None,
                "pid": os.getpid(),
                "adapters": list(holder.adapters),
                "active": holder.requests,
                "served": holder.served,
                "uptime_s": holder.uptime,
                "log": identity.log,
            },
            headers=identity.header,
        )

    async def tokenize(self, request: Request) -> Response:
        """What a run request with this body would give the model; waits for the model, runs nothing."""
        with self._holder.request():
            wanted = parse_request(await read_body(request))
            await self._finetunes.resolve(wanted, paths=has_read_record(request.scope, self._proof))
            model = await unless_disconnected(request.receive, self._holder.ready())
            prompt = await asyncio.to_thread(model.prompt, wanted)
            tokens = {"prompt": prompt.text, "tokens": prompt.ids, "count": len(prompt.ids)}
            return JSONResponse({**tokens, "context": model.engine.info.context}, headers=self._identity.header)

    async def stop(self, request: Request) -> Response:
        """End the process: 409 while it is answering, unless the body says `{"force": true}`."""
        force = _force(await read_body(request))
        active = self._holder.requests
        if active and not force:
            return JSONResponse({"stopping": False, "active": active}, status_code=409)
        self._stop("by request")
        return JSONResponse({"stopping": True, "active": active})


def _force(body: bytes) -> bool:
    data = parse_json(body or b"{}")
    if not isinstance(data, dict) or not set(data) <= {"force"} or not isinstance(data.get("force", False), bool):
        raise WireError(400, 5006, 'the body must be {} or {"force": true}')
    return bool(data.get("force", False))


async def on_disconnect(request: Request, error: Exception) -> Response:
    """Nobody reads this."""
    return Response(status_code=499)


async def on_wire_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, WireError)
    return error_response(request.url.path, error)


async def on_mistral_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, MistralError)
    return await on_wire_error(request, wire_error(error))
