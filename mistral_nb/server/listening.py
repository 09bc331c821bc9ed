"""Where a server listens: on loopback in the clear, elsewhere with TLS and a token that the user chose."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import ssl
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_nb import runtime
from mistral_nb.errors import ConfigurationError
from mistral_nb.secret import Secret

__all__ = ["Address", "Listener", "Listeners", "Tls", "listen", "most_connections"]

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 512
"""Of all clients together, where the system lets the process have so many files."""

_FREE_FILES = 96
"""Descriptors that are left for the model's files, the record, the log and uploads."""

_LOG_EVERY = 60.0
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
_SHORTEST_TOKEN = 16
_MAKE_TOKEN = 'python3 -c "import secrets; print(secrets.token_urlsafe(32))"'


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate with its chain, and its key without a pass phrase, both as PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 takes a free one. An address that is not loopback needs `tls`."""

    host: str = "127.0.0.1"
    port: int = 0
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class Listeners:
    """`local`, on loopback and in the clear, is for this machine; `public` is for others where TLS was asked for."""

    local: Listener
    public: Listener | None = None


class Listener(socket.socket):
    """A listening socket whose connections count from the moment they are accepted until they are closed.

    With `most` of them open, and in a process that may open no more files, each further one is closed at once: a
    descriptor that is held in reserve lets it be taken. On Windows asyncio does not accept through a socket's method,
    and `BoundedHttp` has the bound.
    """

    most = MOST_CONNECTIONS
    _open: weakref.WeakSet[socket.socket]
    _reserve = -1
    _logged = -_LOG_EVERY

    @classmethod
    def over(cls, listening: socket.socket, most: int) -> Listener:
        """In the place of `listening`, whose descriptor it takes over."""
        self = cls(listening.family, listening.type, listening.proto, fileno=listening.detach())
        self.most, self._open = most, weakref.WeakSet()
        self._reserve = os.open(os.devnull, os.O_RDONLY)
        return self

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection. `ConnectionAbortedError`, which asyncio takes as nothing, after one that was closed."""
        try:
            connection, peer = super().accept()
        except OSError as error:
            if error.errno not in _OUT_OF_FILES:
                raise
            self._close_next()
            raise ConnectionAbortedError from error
        if sum(other.fileno() >= 0 for other in self._open) >= self.most:
            connection.close()
            self._tell(f"{self.most} connections are open")
            raise ConnectionAbortedError
        self._open.add(connection)
        return connection, peer

    def close(self) -> None:
        self._release()
        super().close()

    def _close_next(self) -> None:
        self._release()
        with contextlib.suppress(OSError):
            super().accept()[0].close()
        with contextlib.suppress(OSError):
            self._reserve = os.open(os.devnull, os.O_RDONLY)
        self._tell("the process may open no more files")

    def _release(self) -> None:
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def _tell(self, why: str) -> None:
        if time.monotonic() - self._logged >= _LOG_EVERY:
            self._logged = time.monotonic()
            log.warning("connections are closed as they come: %s", why)


def most_connections() -> int:
    """How many connections the process has files for, `MOST_CONNECTIONS` at most."""
    if sys.platform == "win32":
        return MOST_CONNECTIONS
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unbounded = files == resource.RLIM_INFINITY
    return MOST_CONNECTIONS if unbounded else max(8, min(MOST_CONNECTIONS, files - _FREE_FILES))


@contextmanager
def listen(address: Address, token: Secret | None) -> Iterator[Listeners]:
    """Listening sockets. With TLS the address is the public one, and the local one is 127.0.0.1 with a free port.

    Both share the connections that there may be, a quarter of them for the local one, which others cannot take.

    Raises `ConfigurationError` for an address, a certificate or a `token` that will not do, and for a taken port.
    """
    family, where = _resolve(address)
    if not runtime.is_loopback(where):
        _check_open(address, token)
    most = most_connections()
    with ExitStack() as stack:
        if address.tls is None:
            yield Listeners(stack.enter_context(_bind(address, family, where, most)))
        else:
            _check_tls(address.tls)
            public = stack.enter_context(_bind(address, family, where, most - most // 4))
            local = stack.enter_context(_bind(Address(), socket.AF_INET, "127.0.0.1", most // 4))
            yield Listeners(local, public)


def _resolve(address: Address) -> tuple[int, str]:
    try:
        family, _, _, _, found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigurationError(
            f"--host {address.host}: no such address ({error.strerror or error}); "
            "leave it out, or give 127.0.0.1 or ::1"
        ) from error
    return family, str(found[0])


def _check_open(address: Address, token: Secret | None) -> None:
    """What others can reach is encrypted, and its token is known to those who are to reach it."""
    if address.tls is None:
        raise ConfigurationError(
            f"--host {address.host}: without TLS an engine listens on loopback only (127.0.0.1 or ::1), since its "
            "token is sent in the clear. To reach it from another machine, run there: "
            "ssh -L 8000:127.0.0.1:PORT THIS-MACHINE; or give --certificate FILE and --key FILE"
        )
    if token is None or len(token.reveal()) < _SHORTEST_TOKEN:
        what = "needs a token" if token is None else f"needs a token of at least {_SHORTEST_TOKEN} characters"
        raise ConfigurationError(
            f"--host {address.host}: an address that others can reach {what}; make one with {_MAKE_TOKEN} "
            "and set it as MISTRAL_NB_SERVER_TOKEN, here and where it is called from"
        )


def _check_tls(tls: Tls) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for option, file in (("--certificate", tls.certificate), ("--key", tls.key)):
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigurationError(
                f"{option} {file} cannot be read ({error.strerror or error}); name a PEM file"
            ) from error
    try:
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except ssl.SSLError as error:
        raise ConfigurationError(
            f"--certificate {tls.certificate} and --key {tls.key} do not make a TLS server ({error.reason or error}); "
            "give the certificate's PEM file and that of its key, which has no pass phrase"
        ) from error


def _bind(address: Address, family: int, where: str, most: int) -> Listener:
    try:
        return Listener.over(socket.create_server((where, address.port), family=family), most)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {address.host} port {address.port} ({error.strerror or error}); "
            "choose another --port, or 0 for a free one"
        ) from error
