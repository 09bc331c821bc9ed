"""HTTP connections that the whole process keeps: taken for one request, given back after it, cut when it is cancelled.

A connection is an httpx client of its own with room for one socket, so that its user knows that socket before a byte
is sent, and closing it harms nobody else. Clients share one TLS context. A connection is only given back when its
answer was read to the end. Those who ask share connections, so no cookie is kept.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mistral_nb.backends.pump import HungUp, Line
from mistral_nb.backends.wire import PeerFailure
from mistral_nb.errors import ConfigurationError
from mistral_nb.foreign import clean
from mistral_nb.secret import Secret

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = ["close_all", "read_limited", "redirect", "send"]

# Seconds. Past it, a middlebox may have forgotten an idle connection without telling.
IDLE = 30.0
_PER_HOST = 4
_LOCATION = "mistral_nb.location"
# What is read of the body of a refusal at most: seconds and bytes.
_REFUSAL_SECONDS = 2.0
_REFUSAL_BYTES = 1 << 20

_Key = tuple[str, str, bool, int]


class Connection:
    """An httpx client with at most one socket. One thread at a time.

    Raises `ConfigurationError` where the environment names a proxy or certificates that cannot be used.
    """

    def __init__(self, key: _Key, direct: bool) -> None:
        import httpx

        self.key = key
        self.idle_since = 0.0
        self._stream: Any = None
        self._reused = False
        try:
            self._client = httpx.Client(
                trust_env=not direct,
                verify=_unused_tls()
                if direct
                else _tls(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")),
                event_hooks={"response": [_set_apart]},
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
                limits=httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=IDLE),
            )
        except OSError as error:
            raise ConfigurationError(
                f"the certificates cannot be read ({error}). Correct SSL_CERT_FILE or SSL_CERT_DIR"
            ) from error
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ConfigurationError(
                f"the proxy cannot be used ({error}). Correct HTTPS_PROXY or ALL_PROXY, or install what it needs"
            ) from error

    @property
    def socket(self) -> socket.socket | None:
        """The open socket, None where there is none."""
        found: socket.socket | None = self._stream.get_extra_info("socket") if self._stream else None
        return found if found is not None and found.fileno() >= 0 else None

    @property
    def reused(self) -> bool:
        """Whether the latest request went over a socket of an earlier one, with no attempt at another."""
        return self._reused

    def send(self, method: str, url: str, token: Secret | None, line: Line, **options: Any) -> httpx.Response:
        """The response once its headers are there. Raises what `httpx` raises.

        The token is in the request while its headers are being sent, and nowhere afterwards.
        """
        signed: list[Any] = []

        def sign(outgoing: httpx.Request) -> httpx.Request:
            signed.append(outgoing)
            if token is not None:
                outgoing.headers["Authorization"] = f"Bearer {token.reveal()}"
            return outgoing

        def trace(event: str, info: dict[str, Any]) -> None:
            if event.endswith("connect_tcp.started"):
                self._reused = False
            elif event.endswith("connect_tcp.complete"):
                self._stream = info["return_value"]
                line.attach(self._stream.get_extra_info("socket"))
            elif event.endswith("start_tls.complete"):
                self._stream = info["return_value"]
            elif event == "http11.send_request_headers.started":
                signed.append(info["request"])
            elif event == "http11.send_request_headers.complete":
                _unsign(signed)

        open_socket = self.socket
        self._reused = open_socket is not None
        if open_socket is not None:
            line.attach(open_socket)
        request = self._request(method, url, extensions={"trace": trace}, **options)
        try:
            return self._client.send(request, auth=sign, stream=True, follow_redirects=False)
        finally:
            _unsign(signed)

    def _request(self, method: str, url: str, **options: Any) -> httpx.Request:
        """`ConfigurationError` where no host can be at `url`."""
        import httpx

        try:
            return self._client.build_request(method, url, **options)
        except (httpx.InvalidURL, UnicodeError) as error:
            told = f"{urlsplit(url).netloc} is no host's address ({clean(error)}). Correct it"
        raise ConfigurationError(told)

    def close(self) -> None:
        self._client.close()

    def drop(self) -> None:
        """Close the socket alone: in a forked child, where locks may be held by threads that are not there."""
        if (open_socket := self.socket) is not None:
            open_socket.close()


class _Pool:
    """Idle connections by what they are good for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[_Key, list[Connection]] = {}
        self._all: set[Connection] = set()

    def take(self, url: str, direct: bool, *, fresh: bool) -> Connection:
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc, direct, 0 if direct else _surroundings())
        self._sweep()
        with self._lock:
            idle = self._idle.get(key)
            if idle and not fresh:
                return idle.pop()
        connection = Connection(key, direct)
        with self._lock:
            self._all.add(connection)
        return connection

    def give_back(self, connection: Connection) -> None:
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(connection.key, [])
            room = len(idle) < _PER_HOST
            if room:
                idle.append(connection)
        if not room:
            self.discard(connection)

    def discard(self, connection: Connection) -> None:
        with self._lock:
            self._all.discard(connection)
        connection.close()

    def _sweep(self) -> None:
        oldest = time.monotonic() - IDLE
        with self._lock:
            stale = [one for idle in self._idle.values() for one in idle if one.idle_since < oldest]
            self._idle = {
                key: kept
                for key, idle in self._idle.items()
                if (kept := [one for one in idle if one.idle_since >= oldest])
            }
        for connection in stale:
            self.discard(connection)

    def close(self) -> None:
        with self._lock:
            idle = [one for kept in self._idle.values() for one in kept]
            self._idle = {}
        for connection in idle:
            self.discard(connection)

    def forget(self) -> None:
        """In a forked child: the sockets are the parent's."""
        inherited = self._all
        _Pool.__init__(self)
        for connection in inherited:
            connection.drop()


_POOL = _Pool()
atexit.register(_POOL.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)


def close_all() -> None:
    """Close the connections that nobody uses."""
    _POOL.close()


@contextlib.contextmanager
def send(
    method: str,
    url: str,
    *,
    line: Line,
    token: Secret | None = None,
    connect: float = 10.0,
    direct: bool = False,
    fresh: bool = False,
    **options: Any,
) -> Iterator[httpx.Response]:
    """A request whose answer is read inside the `with`. Raises what `httpx` raises.

    `connect` is in seconds; other limits are `line.within`. `direct` is plain HTTP to this machine: no proxy, no
    certificates. `options` are `httpx`'s: content, headers, files. No redirect is followed. Where a kept connection
    turns out to be dead before the answer has begun, the request is sent once more on a new one; with `fresh` it goes
    over a new one at once, and is sent once only.
    """
    import httpx

    options["timeout"] = httpx.Timeout(None, connect=connect)
    connection = _POOL.take(url, direct, fresh=fresh)
    whole = False
    try:
        try:
            response = connection.send(method, url, token, line, **options)
        except httpx.TransportError:
            if not connection.reused or line.hung_up or line.expired:
                raise
            _POOL.discard(connection)
            connection = _POOL.take(url, direct, fresh=True)
            response = connection.send(method, url, token, line, **options)
        try:
            yield response
            # httpx closes a response whose body has been read to its end.
            whole = response.is_closed
        finally:
            response.close()
    finally:
        # From here on neither hanging up nor a deadline reaches the socket. One that did is found dead when it is used.
        line.detach()
        if whole and connection.socket is not None:
            _POOL.give_back(connection)
        else:
            _POOL.discard(connection)


def read_limited(response: httpx.Response, line: Line, limit: int, parts: Iterable[bytes] | None = None) -> str:
    """The body as text, or the rest of it in `parts`. `PeerFailure` where it has more than `limit` bytes.

    A status other than 2xx stands whatever becomes of its body: of that one it is what arrives at once, whole or not.
    Ends with `HungUp` once `line` is hung up there.
    """
    import httpx

    refused = not response.is_success
    if refused:
        line.within(_REFUSAL_SECONDS, "the body of a refusal did not come")
        limit = min(limit, _REFUSAL_BYTES)
    body = bytearray()
    try:
        for part in response.iter_bytes() if parts is None else parts:
            body += part
            if len(body) <= limit:
                continue
            if refused:
                break
            raise PeerFailure(f"its answer has more than {limit >> 20} MiB")
    except (httpx.TransportError, httpx.DecodingError):
        if not refused:
            raise
    if refused and line.hung_up:
        raise HungUp
    return body.decode("utf-8-sig", "replace")


def redirect(response: httpx.Response) -> str | None:
    """Where an answer redirects to, in words; None where it does not."""
    location = response.extensions.get(_LOCATION)
    if location is None:
        return None
    try:
        host = urlsplit(location).netloc.rpartition("@")[2]
    except ValueError:
        return "what is no address"
    return clean(host) or "another path"


def _set_apart(response: httpx.Response) -> None:
    """httpx reads the address of a redirect that it does not follow, and fails in several ways where it is none."""
    if response.has_redirect_location:
        response.extensions[_LOCATION] = response.headers.pop("location")


def _unsign(requests: list[Any]) -> None:
    """Take the token out of httpx's request and of httpcore's."""
    for request in requests:
        if isinstance(request.headers, list):
            request.headers[:] = [pair for pair in request.headers if pair[0].lower() != b"authorization"]
        else:
            request.headers.pop("Authorization", None)
    requests.clear()


def _surroundings() -> int:
    """What a client takes from its environment when it is made: a change of it makes a new one."""
    certificates = (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))
    return hash((frozenset(urllib.request.getproxies().items()), certificates))


@functools.cache
def _unused_tls() -> ssl.SSLContext:
    """httpx wants a context for plain HTTP too. It is made once: a forked child that makes one may wait forever for a
    lock of OpenSSL's, which a thread of the parent's held as it ended.
    """
    import httpx

    return httpx.create_ssl_context(verify=False)


@functools.lru_cache(maxsize=4)
def _tls(certificate_file: str | None, certificate_folder: str | None) -> ssl.SSLContext:
    """httpx's own context, which reads the two variables of the environment that are the key here."""
    import httpx

    return httpx.create_ssl_context()
