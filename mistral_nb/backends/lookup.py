"""A small question to a peer before the one for text, answered in JSON: which model it holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mistral_nb import __version__
from mistral_nb.backends.connection import read_limited, redirect, send
from mistral_nb.backends.exchange import Timeouts, broken
from mistral_nb.backends.pump import HungUp, Line
from mistral_nb.backends.wire import PeerFailure
from mistral_nb.errors import BackendError, ConfigurationError, ConnectionFailed, MistralError, RequestTimeout
from mistral_nb.runtime import is_loopback
from mistral_nb.secret import Secret

__all__ = ["Peer", "Told", "check_address"]

_LARGEST = 8 << 20
_LABEL = "[A-Za-z0-9_-]{1,63}"
_PATH = r"(/[A-Za-z0-9._~!$&'()*+,;=:%/-]*)?"
_ADDRESS = re.compile(rf"https?://(\[[0-9A-Fa-f:.]+\]|{_LABEL}(\.{_LABEL})*)(:[0-9]{{1,5}})?{_PATH}")


class Told(NamedTuple):
    """What a peer answered: the HTTP status, the JSON (None where it is none), and the header Retry-After."""

    status: int
    data: Any
    retry_after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is asked: a name for people, the base URL, and the token, which goes there alone."""

    name: str
    base_url: str
    token: Secret | None = field(repr=False)
    timeouts: Timeouts

    @property
    def direct(self) -> bool:
        """Plain HTTP to this machine, which no proxy may see."""
        parts = urlsplit(self.base_url)
        return parts.scheme == "http" and is_loopback(parts.hostname or "")

    def get(self, path: str, line: Line) -> Told:
        """The answer. Raises `ConnectionFailed`, `RequestTimeout` and `BackendError`, and `HungUp` once `line` is."""
        import httpx

        limit = self.timeouts.first_token
        line.within(limit, f"{self.name} did not answer within {limit:g} s. Try again, or raise first_token_timeout")
        failure: MistralError
        try:
            with send(
                "GET",
                f"{self.base_url}{path}",
                line=line,
                token=self.token,
                connect=self.timeouts.connect,
                direct=self.direct,
                headers={"Accept": "application/json", "User-Agent": f"mistral-nb/{__version__}"},
            ) as response:
                if (elsewhere := redirect(response)) is not None:
                    raise BackendError(
                        f"{self.name} redirects to {elsewhere}, where the token is not sent. Set its address"
                    )
                said = read_limited(response, line, _LARGEST)
                return Told(response.status_code, _json(said), response.headers.get("retry-after"))
        except PeerFailure as error:
            failure = BackendError(f"{self.name}: {error}. Check its address")
        except (httpx.TransportError, httpx.DecodingError) as error:
            if line.hung_up:
                raise HungUp from None
            failure = self._broken(error, line)
        raise failure

    def _broken(self, error: Exception, line: Line) -> MistralError:
        if line.expired:
            return RequestTimeout(line.expired)
        detail, not_made = broken(self.name, error, self.timeouts.connect, self.token)
        return not_made or ConnectionFailed(
            f"{self.name} broke the connection before it answered ({detail}). Try again"
        )


def _json(said: str) -> Any:
    try:
        return json.loads(said)
    except (ValueError, RecursionError):
        return None


def check_address(url: str, origin: str, *, token: bool = True) -> str:
    """The host and port of a base URL. A token goes over https, or to this machine, only.

    `ConfigurationError` names `origin`, where the address was set.
    """
    try:
        parts = urlsplit(url)
        whole = _ADDRESS.fullmatch(url) and parts.port != 0
    except ValueError:
        whole = False
    if not whole:
        raise ConfigurationError(
            f"{origin}: must be https://host[:port][/path] in ASCII, with no user name and no query"
        )
    if token and parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise ConfigurationError(
            f"{origin} = {url!r}: the token goes over https, or to this machine, only; use an https:// address, or a "
            "tunnel to a port of this machine"
        )
    return parts.netloc
