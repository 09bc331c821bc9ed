"""The application: journal, door and gate around the routes, and one envelope for every error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from mistral_nb.errors import MistralError
from mistral_nb.server.edge import OWN_SESSION, Door
from mistral_nb.server.holder import Holder
from mistral_nb.server.journal import Journal, Journalled
from mistral_nb.server.limits import Gate, Limited
from mistral_nb.server.playground import Playground, Sessions
from mistral_nb.server.routes import Endpoints, on_disconnect, on_mistral_error, on_wire_error
from mistral_nb.server.schemas import WireError

__all__ = ["Site", "create_app"]


@dataclass(frozen=True, slots=True)
class Site:
    """How one server meets the outside: its token, the hosts it answers to besides its address, and its places."""

    token: str = field(repr=False)
    names: tuple[str, ...]
    max_requests: int
    sessions: Sessions = field(default_factory=Sessions)


def create_app(endpoints: Endpoints, holder: Holder, site: Site, model: str, log: str) -> ASGIApp:
    """The application of `site`. The playground shows the name `model`; `log` is named in a 500."""
    journal, gate = Journal(), Gate(site.max_requests)
    playground = Playground(endpoints.run, endpoints.adapters, gate, site.sessions, site.token, model)
    health = Route("/health", _Health(holder, journal, gate).answer, methods=["GET"])
    app = _routed([*endpoints.routes, health, *playground.routes], log)
    return Journalled(Door(Limited(app, gate, _costs), site.token, site.names), journal)


def _routed(routes: list[Route], log: str) -> ASGIApp:

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            known = WireError(405, 7001, f"{request.method} is not allowed for {request.url.path}")
        else:
            known = WireError(error.status_code, 7000, f"No route for {request.method} {request.url.path}")
        response = await on_wire_error(request, known)
        response.headers.update(error.headers or {})
        return response

    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_wire_error(request, WireError(500, 3043, f"the engine failed inside; see its log {log}"))

    app = Starlette(
        routes=routes,
        exception_handlers={
            HTTPException: on_http_exception,
            ClientDisconnect: on_disconnect,
            WireError: on_wire_error,
            MistralError: on_mistral_error,
            Exception: on_bug,
        },
    )
    app.router.redirect_slashes = False
    return app


def _costs(scope: Scope) -> bool:
    """Whether a request may keep the model or the reader of a large body busy. The playground sees to its own."""
    path = scope["path"]
    return scope["method"] == "POST" and path != "/engine/stop" and not path.startswith(OWN_SESSION)


class _Health:
    """For whoever watches servers: 200 while requests are answered at once, else 503."""

    def __init__(self, holder: Holder, journal: Journal, gate: Gate) -> None:
        self._holder = holder
        self._journal = journal
        self._gate = gate

    async def answer(self, request: Request) -> Response:
        """The state; with the token, which was checked, the counters too."""
        holder = self._holder
        told: dict[str, Any] = {"status": holder.state}
        if "authorization" in request.headers:
            told |= {"uptime_s": holder.uptime, "active": holder.requests, "waiting": self._gate.waiting}
            told |= self._journal.counters()
        return JSONResponse(told, 200 if holder.state == "ready" else 503, {"cache-control": "no-store"})
