"""The playground: one page on the server's own origin, its sessions, and the stream that its EventSource reads."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mistral_nb.errors import MistralError
from mistral_nb.server.answering import Raw, bounded
from mistral_nb.server.edge import OWN_SESSION, header
from mistral_nb.server.limits import Gate
from mistral_nb.server.schemas import WireError, WorkersShape, wire_error

__all__ = ["LOGIN", "STREAM", "Playground", "Sessions"]

LOGIN = f"{OWN_SESSION}login"
SESSION = f"{OWN_SESSION}session"
STREAM = f"{OWN_SESSION}stream"

SESSION_SECONDS = 12 * 3600.0
INVITATION_SECONDS = 600.0

_MOST_SESSIONS = 64
_LONGEST_FORM = 4096
_PAGE = Path(__file__).parent / "static" / "playground.html"


class Sessions:
    """Who has shown the token, and who holds an invitation, which is good for one session and for a while.

    Kept as SHA-256 only, each with the time up to which it holds.
    """

    def __init__(self) -> None:
        self._until: dict[bytes, float] = {}
        self._invitations: dict[bytes, float] = {}

    def invite(self) -> str:
        """A code that `redeem` takes once."""
        code = secrets.token_urlsafe(32)
        self._invitations[_digest(code)] = time.monotonic() + INVITATION_SECONDS
        return code

    def redeem(self, code: str) -> bool:
        """Whether `code` was an invitation; it is none any more."""
        return self._invitations.pop(_digest(code), 0.0) > time.monotonic()

    def open(self) -> str:
        """A new session's value for the cookie. With too many of them the oldest ends."""
        if len(self._until) >= _MOST_SESSIONS:
            del self._until[next(iter(self._until))]
        value = secrets.token_urlsafe(32)
        self._until[_digest(value)] = time.monotonic() + SESSION_SECONDS
        return value

    def knows(self, value: str) -> bool:
        return self._until.get(_digest(value), 0.0) > time.monotonic()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


class Playground:
    """Anyone may load the page, which holds nothing. What it asks for needs a session and comes from the page itself.

    A session is a cookie that no script reads and no other site's request carries. It is had for the token, posted
    once, or for an invitation in the page's address. Cookies are sent to every port of a host, and pages on other
    ports count as of the same site: so every request must say, as browsers do, that it is of the same origin.
    `run` answers a request in Workers AI's shape, for which `adapters` can be named, and `gate` has the places that
    those without a session do not get.
    """

    def __init__(
        self,
        run: ASGIApp,
        adapters: Callable[[], Awaitable[tuple[str, ...]]],
        gate: Gate,
        sessions: Sessions,
        token: str,
        model: str,
    ) -> None:
        self._run = run
        self._adapters = adapters
        self._gate = gate
        self._sessions = sessions
        self._token = token.encode()
        self._model = model
        self._html = _PAGE.read_text(encoding="utf-8")

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/", self.page, methods=["GET"]),
            Route(LOGIN, self.login, methods=["POST"]),
            Route(SESSION, self.session, methods=["GET"]),
            Route(STREAM, Raw(self.stream), methods=["GET"]),
        ]

    async def page(self, request: Request) -> Response:
        """The page; with an invitation a session, and the page again under an address without it."""
        code = request.query_params.get("login")
        if code is not None:
            response: Response = RedirectResponse("/", status_code=303)
            if self._sessions.redeem(code):
                self._give_session(request, response)
            return response
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {
            "content-security-policy": policy,
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }
        return HTMLResponse(self._html.replace("{nonce}", nonce), headers=headers)

    async def login(self, request: Request) -> Response:
        """A session for the token, posted as the field `token` of a form."""
        _same_origin(request.scope)
        body = b"".join([part async for part in bounded(request, _LONGEST_FORM, "send the token alone")])
        token = parse_qs(body.decode("latin-1")).get("token", [""])[0].strip()
        if not hmac.compare_digest(token.encode(), self._token):
            raise WireError(401, 10000, "That is not this server's token; copy it again")
        response = Response(status_code=204)
        self._give_session(request, response)
        return response

    async def session(self, request: Request) -> Response:
        """What the page shows to those who have a session; 10000 (401) for others."""
        self.check(request.scope)
        shown = {"model": self._model, "adapters": await self._adapters()}
        return JSONResponse(shown, headers={"cache-control": "no-store"})

    async def stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer to `request`, a JSON object in the query, as server-sent events.

        An EventSource sees no other body than events: so what is wrong with the request is an event too.
        """
        self.check(scope)
        body = Request(scope).query_params.get("request", "").encode()
        given = False

        async def body_first() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            async with self._gate.place():
                await self._run({**scope, "path_params": {}}, body_first, send)
        except (WireError, MistralError) as error:
            frame = WorkersShape().failure(error if isinstance(error, WireError) else wire_error(error))
            await Response(frame, media_type="text/event-stream")(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """`WireError` 10000 unless the page itself asks (403) and has a session (401)."""
        _same_origin(scope)
        if not self._sessions.knows(Request(scope).cookies.get(_cookie(scope), "")):
            raise WireError(401, 10000, "There is no session; log in with the server's token")

    def _give_session(self, request: Request, response: Response) -> None:
        response.set_cookie(
            _cookie(request.scope),
            self._sessions.open(),
            max_age=int(SESSION_SECONDS),
            secure=request.scope["scheme"] == "https",
            httponly=True,
            samesite="strict",
        )


def _cookie(scope: Scope) -> str:
    """Servers on one host share its cookies, so each has a name of its own."""
    return f"mistral-nb-{scope['server'][1]}"


def _same_origin(scope: Scope) -> None:
    if header(scope, b"sec-fetch-site") != "same-origin":
        told = "Only the playground's own page may ask for this; open it in a browser of 2023 on"
        raise WireError(403, 10000, f"{told}, with https or on loopback")
