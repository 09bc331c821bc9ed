"""Who may come in: the Host and Origin that a browser names, and the bearer token."""

from __future__ import annotations

import hmac
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from mistral_nb.errors import ConfigurationError
from mistral_nb.runtime import PROOF_HEADER, is_loopback
from mistral_nb.server.answering import error_response
from mistral_nb.server.schemas import WireError

__all__ = ["OWN_SESSION", "Door", "has_read_record", "header", "host_of", "refuse"]

OPEN = ("/", "/health")
"""Paths that need no token: the playground's page, and the one word that tells whether this server is ready."""

OWN_SESSION = "/playground/"
"""Below this the playground asks for a session of its own."""


_PORTS = {"http": ":80", "https": ":443"}


class Door:
    """Lets through what names this very server as its host, comes from no other site, and has the token.

    A browser that is made to believe that a foreign name is this address (DNS rebinding) still sends that name: 421. A
    page of another site is told by its Origin: 403. Without `Authorization` 10000 (401), as for a wrong token; 6003
    (400) for a malformed header. No response allows another site to read it. `names` are hosts to answer to besides
    the address that a connection came in on and, there, the loopback ones. One that is an origin, as
    https://play.example.org, is what browsers know this server by through a proxy that ends TLS: for requests to that
    host, the scheme is the origin's. `ConfigurationError` for one that is neither.

    A body that two headers measure in two ways, and with it what another server took for its end, is refused: 6003
    (400), and the connection is closed (RFC 9112, 6.1).
    """

    def __init__(self, app: ASGIApp, token: str, names: Iterable[str]) -> None:
        self._app = app
        self._token = token.encode()
        given = tuple(names)
        self._origins = {origin.host: origin for name in given if "://" in name for origin in [_origin(name)]}
        self._names = frozenset((*(_name(name) for name in given if "://" not in name), *self._origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if header(scope, b"content-length") is not None and header(scope, b"transfer-encoding") is not None:
            both = WireError(400, 6003, "Invalid request headers: send Content-Length or Transfer-Encoding, not both")
            await refuse(both, scope, receive, send, {"connection": "close"})
            return
        origin = self._origins.get(host_of(header(scope, b"host") or ""))
        if origin is not None:
            scope["scheme"] = origin.scheme
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            headers = {"www-authenticate": "Bearer"} if refusal.status in (400, 401) else {}
            await refuse(refusal, scope, receive, send, headers)

    def _refusal(self, scope: Scope) -> WireError | None:
        host = header(scope, b"host") or ""
        if not self._is_ours(host, scope):
            name = shlex.quote(host_of(host) or "NAME")
            return WireError(
                421, 7000, f"No server of the name {host!r} here; to be one, start with --allow-host {name}"
            )
        origin = header(scope, b"origin")
        known = self._origins.get(host_of(host))
        if origin is not None and origin.lower() not in (f"{scope['scheme']}://{host.lower()}", known and known.text):
            return WireError(
                403,
                10000,
                f"Requests from pages of {origin!r} are not answered. If that is this server behind a proxy: let it "
                f"keep the Host header, and start the server with --allow-host {shlex.quote(origin)}",
            )
        path = scope["path"]
        given = header(scope, b"authorization")
        if given is None and (path in OPEN or path.startswith(OWN_SESSION)):
            return None
        return self._unknown(given)

    def _is_ours(self, host: str, scope: Scope) -> bool:
        name = host_of(host)
        here = scope["server"][0]
        return name in self._names or name == here.lower() or (is_loopback(here) and is_loopback(name))

    def _unknown(self, given: str | None) -> WireError | None:
        if given is None:
            return WireError(401, 10000, "Authentication error: send the header Authorization: Bearer TOKEN")
        scheme, _, credentials = given.partition(" ")
        if scheme.lower() != "bearer" or not credentials.strip():
            return WireError(400, 6003, "Invalid request headers: Authorization must read Bearer TOKEN")
        if not hmac.compare_digest(credentials.strip().encode("latin-1"), self._token):
            return WireError(401, 10000, "Authentication error: the token is not this engine's")
        return None


@dataclass(frozen=True, slots=True)
class _Origin:
    """What browsers know a server by. `text` is all of it, in small letters and without a default port."""

    scheme: str
    host: str
    text: str


def _name(given: str) -> str:
    name = host_of(given) or host_of(f"[{given}]")
    if not name or "*" in name:
        raise ConfigurationError(f"--allow-host {given}: is no host; give a whole name, as play.example.org")
    return name


def _origin(name: str) -> _Origin:
    scheme, _, authority = name.lower().rstrip("/").partition("://")
    host = host_of(authority)
    if scheme not in _PORTS or not host:
        raise ConfigurationError(
            f"--allow-host {name}: is no origin; give a name, or one that reads https://play.example.org"
        )
    return _Origin(scheme, host, f"{scheme}://{authority.removesuffix(_PORTS[scheme])}")


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a request's header, the first where there are several."""
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def host_of(authority: str) -> str:
    """The name or address in a Host header, without port and brackets; empty for what is none."""
    try:
        parts = urlsplit(f"//{authority}")
        more = parts.path or parts.query or parts.fragment or "@" in authority
        return "" if more or parts.port == 0 else parts.hostname or ""
    except ValueError:
        return ""


def has_read_record(scope: Scope, proof: str) -> bool:
    """Whether a request holds the `proof` of the engine's record, which its user alone can read, on its machine.

    Where a request comes from tells nothing: through a tunnel, or a proxy on this machine, others come from here too.
    """
    given = header(scope, PROOF_HEADER.encode())
    return bool(proof) and given is not None and hmac.compare_digest(given.encode("latin-1"), proof.encode())


async def refuse(
    error: WireError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None
) -> None:
    """Answer with an error in the interface's own shape."""
    response = error_response(scope["path"], error)
    response.headers.update(headers or {})
    await response(scope, receive, send)
