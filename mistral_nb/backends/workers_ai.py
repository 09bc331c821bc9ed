"""The client of the Workers AI wire: Cloudflare's own service, and on loopback the local engine, which speaks the same.

One request is one connection, so that cancelling is closing it. Three limits, each of its own: to connect, to the
first text, and of silence after it. `httpx` is imported at the first request.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit

from mistral_nb import __version__
from mistral_nb.backends.failures import Failure, to_error
from mistral_nb.backends.pump import Emit, Line, Pump
from mistral_nb.backends.wire import DONE, PeerFailure, Reading, frames, peer_failure
from mistral_nb.config import CLOUDFLARE_URL, USE_LOCAL, Secret, Settings
from mistral_nb.engine_control import encode_json
from mistral_nb.errors import (
    ConfigurationError,
    ConnectionFailed,
    InvalidRequest,
    MistralError,
    RequestTimeout,
    StreamTruncated,
)
from mistral_nb.runtime import is_loopback
from mistral_nb.types import FIELDS, Chunk, Description, GenerationRequest

if TYPE_CHECKING:
    import httpx

__all__ = ["DEFAULT_MODEL", "NotListening", "Timeouts", "WorkersAI", "cloudflare"]

DEFAULT_MODEL = "@hf/mistral/mistral-7b-instruct-v0.2"
MODEL_HEADER = "x-mistral-nb-model"
_ACCOUNT = re.compile(r"[0-9a-f]{32}")
_MODEL = re.compile(r"@(cf|hf)(/[A-Za-z0-9][A-Za-z0-9._-]*){2}")
_ERROR_BYTES = 1 << 20


class NotListening(ConnectionFailed):
    """Nobody took the connection, so nothing of the request was sent."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds: to connect, from sending to the first text, and of silence after it."""

    connect: float = 10.0
    first_token: float = 300.0
    stall: float = 60.0

    @classmethod
    def from_settings(cls, settings: Settings) -> Timeouts:
        return cls(settings.connect_timeout, settings.first_token_timeout, settings.stall_timeout)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersAI:
    """A `Backend` that speaks to `base_url`. `engine` marks the local engine: it takes every field and no proxy.

    The token goes to `base_url` alone, which must be https or on this machine, else `ConfigurationError`.
    """

    base_url: str
    account: str
    token: Secret = field(repr=False)
    model: str
    name: str = "cloudflare"
    peer: str = "Cloudflare"
    engine: bool = False
    timeouts: Timeouts = Timeouts()

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        loopback = is_loopback(parts.hostname or "")
        if (
            "@" in parts.netloc
            or parts.query
            or parts.fragment
            or not re.fullmatch(r"[^:\[]*(:\d{1,5})?|\[.*", parts.netloc)
        ):
            raise ConfigurationError("base URL: must be https://host[:port][/path], without a user name or a query")
        if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
            raise ConfigurationError(
                f"base URL {self.base_url!r}: the token goes over https, or to this machine, only; "
                "use an https:// address"
            )
        assert loopback or not self.engine

    def stream(self, request: GenerationRequest) -> Pump:
        if not self.engine:
            _refuse_local_only(request)
        return Pump(lambda line, emit: self.answer(request, line, emit))

    def describe(self) -> Description:
        here = self.base_url == CLOUDFLARE_URL
        return Description(self.name, self.model, "Workers AI" if here else urlsplit(self.base_url).netloc)

    def answer(self, request: GenerationRequest, line: Line, emit: Emit) -> None:
        """Read one answer to its end in this thread: what `stream` pumps, for a backend with something to do first.

        Raises `MistralError`. Its cause is not chained: the frames of an HTTP client hold the request's headers.
        """
        import httpx

        reading = _Live(self, line, emit)
        failure: MistralError
        reading.begin()
        try:
            with self._client() as client, self._post(client, request, line) as response:
                return reading.read(response, request)
        except PeerFailure as error:
            failure = to_error(Failure(self.peer, self.model, request, error.message, error.code, engine=self.engine))
        except (httpx.TransportError, httpx.DecodingError) as error:
            failure = self._broken(error, reading)
        raise failure

    def _client(self) -> httpx.Client:
        import httpx

        # The engine is plain HTTP on loopback: no proxy may see it, and there is no CA bundle to load.
        return httpx.Client(
            trust_env=not self.engine,
            verify=not self.engine,
            timeout=httpx.Timeout(None, connect=self.timeouts.connect),
        )

    def _post(self, client: httpx.Client, request: GenerationRequest, line: Line) -> AbstractContextManager[Any]:
        def sign(outgoing: httpx.Request) -> httpx.Request:
            outgoing.headers["Authorization"] = f"Bearer {self.token.reveal()}"
            return outgoing

        def trace(event: str, info: dict[str, Any]) -> None:
            if event == "connection.connect_tcp.complete":
                line.attach(info["return_value"].get_extra_info("socket"))

        return client.stream(
            "POST",
            f"{self.base_url}/accounts/{quote(self.account)}/ai/run/{quote(self.model, safe='/@')}",
            content=encode_json(request.to_dict()),
            headers={
                "Content-Type": "application/json",
                "Accept": "text/event-stream, application/json",
                "Accept-Encoding": "identity",
                "User-Agent": f"mistral-nb/{__version__}",
            },
            auth=sign,
            extensions={"trace": trace},
        )

    def _broken(self, error: Exception, reading: _Live) -> MistralError:
        """The error for a connection that was not made or did not last."""
        import httpx

        if reading.line.expired:
            return RequestTimeout(reading.line.expired)
        host = urlsplit(self.base_url).netloc
        if isinstance(error, httpx.ConnectTimeout):
            return RequestTimeout(
                f"{self.peer} at {host} took no connection within {self.timeouts.connect:g} s. "
                "Check the network, or raise connect_timeout"
            )
        # A local protocol error quotes the headers.
        detail = type(error).__name__ if isinstance(error, httpx.LocalProtocolError) else str(error)
        if isinstance(error, httpx.ConnectError | httpx.ProxyError | httpx.UnsupportedProtocol):
            return NotListening(f"{self.peer} at {host} cannot be reached ({detail}). Check the network and the proxy")
        if reading.begun:
            return reading.truncated(detail)
        return ConnectionFailed(f"{self.peer} broke the connection before the first text ({detail}). Try again")


class _Live:
    """One answer as it arrives: bytes to chunks, with the deadlines moved along."""

    def __init__(self, client: WorkersAI, line: Line, emit: Emit) -> None:
        self.line = line
        self.begun = False
        self._client = client
        self._emit = emit
        self._model: str | None = None

    def begin(self) -> None:
        limit = self._client.timeouts.first_token
        self.line.within(
            limit, f"{self._client.peer} gave no text within {limit:g} s. Try again, or raise first_token_timeout"
        )

    def read(self, response: httpx.Response, request: GenerationRequest) -> None:
        """Emit the text and the last chunk. Raises `PeerFailure`, `MistralError` and what `httpx` raises."""
        parts = self._arriving(response.iter_bytes())
        if not response.is_success:
            raise self._rejected(response, parts, request)
        self._model = unquote(response.headers.get(MODEL_HEADER, "")) or None
        head = next((part for part in parts if part.strip()), b"")
        body = itertools.chain((head,), parts)
        reading = Reading()
        if head.lstrip().startswith(b"{"):
            self._say(reading.body(b"".join(body).decode("utf-8", "replace")))
        elif not self._follow(frames(body), reading):
            raise RequestTimeout(self.line.expired) if self.line.expired else self.truncated("no end mark")
        self._emit(replace(reading.last(request.max_tokens), model=self._model))

    def _follow(self, data: Iterable[str], reading: Reading) -> bool:
        """Say each frame. True once the end mark has come."""
        for frame in data:
            if frame.strip() == DONE:
                return True
            self._say(reading.frame(frame))
        return False

    def _say(self, text: str) -> None:
        if text:
            self.begun = True
            self._still_there()
            self._emit(Chunk(text=text, model=self._model))

    def _arriving(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        for part in parts:
            if self.begun:
                self._still_there()
            yield part

    def _still_there(self) -> None:
        limit = self._client.timeouts.stall
        self.line.within(limit, f"{self._client.peer} fell silent for {limit:g} s. Ask again, or raise stall_timeout")

    def truncated(self, detail: str) -> StreamTruncated:
        return StreamTruncated(
            f"{self._client.peer} broke the answer off before its end ({detail}); the text so far is kept. Ask again"
        )

    def _rejected(self, response: httpx.Response, parts: Iterator[bytes], request: GenerationRequest) -> MistralError:
        """The error of a status other than 2xx, with the peer's own words where its body holds any."""
        body = bytearray()
        while len(body) < _ERROR_BYTES and (part := next(parts, b"")):
            body += part
        text = body.decode("utf-8", "replace")
        try:
            said = peer_failure(json.loads(text))
        except ValueError:
            said = None
        headers = response.headers
        return to_error(
            Failure(
                self._client.peer,
                self._client.model,
                request,
                said.message if said else response.reason_phrase or "an error without a message",
                said.code if said else None,
                response.status_code,
                headers.get("retry-after"),
                headers.get("cf-ai-req-id") or headers.get("cf-ray"),
                self._client.engine,
            )
        )


def cloudflare(settings: Settings, model: str | None = None) -> WorkersAI:
    """Cloudflare's service as the settings say. `ConfigurationError` names what is missing or wrong."""
    account, token = settings.cloudflare_account_id, settings.cloudflare_api_token
    missing = [
        variable
        for variable, value in (("CLOUDFLARE_ACCOUNT_ID", account), ("CLOUDFLARE_API_TOKEN", token))
        if not value
    ]
    if account is None or token is None:
        raise ConfigurationError(
            f"Cloudflare needs {' and '.join(missing)} in the environment "
            f"(https://dash.cloudflare.com, Workers AI, Use REST API), or {USE_LOCAL}"
        )
    if not _ACCOUNT.fullmatch(account):
        raise ConfigurationError(
            f"{settings.source('cloudflare_account_id')} = {account!r}: an account id is 32 hexadecimal digits; "
            "copy it from https://dash.cloudflare.com"
        )
    name = model or DEFAULT_MODEL
    if not _MODEL.fullmatch(name):
        raise ConfigurationError(
            f"model = {name!r}: Cloudflare's models are called like {DEFAULT_MODEL}; give such an id"
        )
    if settings.cloudflare_base_url != CLOUDFLARE_URL and not settings.cloudflare_trust_base_url:
        raise ConfigurationError(
            f"{settings.source('cloudflare_base_url')} = {settings.cloudflare_base_url!r} is not Cloudflare's address, "
            "and the token is sent there only if cloudflare_trust_base_url is true"
        )
    return WorkersAI(
        base_url=settings.cloudflare_base_url,
        account=account,
        token=token,
        model=name,
        timeouts=Timeouts.from_settings(settings),
    )


def _refuse_local_only(request: GenerationRequest) -> None:
    for known in FIELDS:
        value = getattr(request, known.name)
        if known.local_only and value is not None:
            raise InvalidRequest(known.name, value, f"only the local engine knows it; leave it out, or {USE_LOCAL}")
