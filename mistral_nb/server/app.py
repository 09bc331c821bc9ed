"""The Starlette application: who may call, which path leads where, and one envelope for every error."""

from __future__ import annotations

import hmac

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mistral_nb.errors import MistralError
from mistral_nb.server.routes import Endpoints, on_disconnect, on_mistral_error, on_wire_error
from mistral_nb.server.schemas import WireError

__all__ = ["create_app"]


def create_app(endpoints: Endpoints, token: str, log: str) -> ASGIApp:
    """The application. Every request needs `Authorization: Bearer` with `token`; `log` is named in a 500."""

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            known = WireError(405, 7001, f"{request.method} is not allowed for {request.url.path}")
        else:
            known = WireError(error.status_code, 7000, f"No route for {request.method} {request.url.path}")
        return JSONResponse(known.body, status_code=known.status, headers=error.headers)

    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_wire_error(request, WireError(500, 3043, f"the engine failed inside; see its log {log}"))

    run = "/client/v4/accounts/{account}/ai/run/{model:path}"
    app = Starlette(
        routes=[
            Route(run, _Handler(endpoints), methods=["POST"]),
            Route("/engine/health", endpoints.health, methods=["GET"]),
            Route("/engine/tokenize", endpoints.tokenize, methods=["POST"]),
            Route("/engine/stop", endpoints.stop, methods=["POST"]),
        ],
        exception_handlers={
            HTTPException: on_http_exception,
            ClientDisconnect: on_disconnect,
            WireError: on_wire_error,
            MistralError: on_mistral_error,
            Exception: on_bug,
        },
    )
    app.router.redirect_slashes = False
    return _BearerAuth(app, token)


class _Handler:
    """Starlette takes an instance as a plain ASGI application, which may send its answer piece by piece."""

    def __init__(self, endpoints: Endpoints) -> None:
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._endpoints.run(scope, receive, send)


class _BearerAuth:
    """Lets only the holder of the token through: 10000 (401) for a wrong one, 6003 (400) for a malformed header."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope)
            if refusal is not None:
                response = JSONResponse(refusal.body, refusal.status, {"www-authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> WireError | None:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), None)
        if given is None:
            return WireError(401, 10000, "Authentication error: send the header Authorization: Bearer TOKEN")
        scheme, _, credentials = given.partition(b" ")
        if scheme.lower() != b"bearer" or not credentials.strip():
            return WireError(400, 6003, "Invalid request headers: Authorization must read Bearer TOKEN")
        if not hmac.compare_digest(credentials.strip(), self._token):
            return WireError(401, 10000, "Authentication error: the token is not this engine's")
        return None
