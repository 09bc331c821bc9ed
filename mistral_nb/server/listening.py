"""Where a server listens: on loopback in the clear, elsewhere with TLS and a token that the user chose."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mistral_nb import runtime
from mistral_nb.config import Secret
from mistral_nb.errors import ConfigurationError

__all__ = ["Address", "Listeners", "Tls", "listen"]

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

    local: socket.socket
    public: socket.socket | None = None


@contextmanager
def listen(address: Address, token: Secret | None) -> Iterator[Listeners]:
    """Listening sockets. With TLS the address is the public one, and the local one is 127.0.0.1 with a free port.

    Raises `ConfigurationError` for an address, a certificate or a `token` that will not do, and for a taken port.
    """
    family, where = _resolve(address)
    if not runtime.is_loopback(where):
        _check_open(address, token)
    with ExitStack() as stack:
        if address.tls is None:
            yield Listeners(stack.enter_context(_bind(address, family, where)))
        else:
            _check_tls(address.tls)
            public = stack.enter_context(_bind(address, family, where))
            local = stack.enter_context(_bind(Address(), socket.AF_INET, "127.0.0.1"))
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


def _bind(address: Address, family: int, where: str) -> socket.socket:
    try:
        return socket.create_server((where, address.port), family=family)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {address.host} port {address.port} ({error.strerror or error}); "
            "choose another --port, or 0 for a free one"
        ) from error
