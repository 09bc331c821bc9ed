"""One answer over HTTP, read to its end: the request sent, the chunks emitted, failures told apart and tried again.

Three limits, each of its own: to connect, to the first text, and of silence after it. URL and body are the caller's;
the frames may be those of Workers AI or of OpenAI. `httpx` is imported at the first request.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from mistral_nb import __version__
from mistral_nb.backends import connection
from mistral_nb.backends.failures import Failure, to_error
from mistral_nb.backends.pump import Emit, Line
from mistral_nb.backends.retry import NotListening, patiently
from mistral_nb.backends.wire import DONE, PeerFailure, Reading, frames, peer_failure
from mistral_nb.config import Settings
from mistral_nb.errors import BackendError, ConnectionFailed, MistralError, RequestTimeout, StreamTruncated
from mistral_nb.foreign import clean, plain, plain_lines
from mistral_nb.runtime import PROOF_HEADER, is_loopback
from mistral_nb.secret import Secret
from mistral_nb.types import Chunk, GenerationRequest

if TYPE_CHECKING:
    import httpx

__all__ = ["Exchange", "NotListening", "Timeouts", "broken", "refusal", "said_by"]

MODEL_HEADER = "x-mistral-nb-model"
_REQUEST_IDS = ("cf-ai-req-id", "cf-ray", "x-request-id")
_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# Characters of a peer's message that are shown.
_MESSAGE = 500
# What a line of server-sent events begins with.
_SSE = (b"data", b"event", b"id", b"retry", b":")
# What an answer may have before its first byte: blanks and a byte order mark.
_NOTHING = b" \t\r\n\xef\xbb\xbf"
_BODY_BYTES = 64 << 20
# What may follow the end mark while the connection stays good for the next request: bytes and seconds.
_REST_BYTES = 64 << 10
_REST_SECONDS = 0.2
# How exactly the limit of silence is kept: moving it at every frame took a tenth of the time.
_NOTE_SECONDS = 0.01


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
class Exchange:
    """`body` (JSON) to `url`, and the answer of `peer` (a name for people) to it.

    The token, where there is one, goes to `url` alone: no redirect is followed. `retry_deadline` is in seconds, 0 for
    one try. `engine` marks a mistral-nb server, whose error messages are whole. Plain HTTP to this machine sees no
    proxy. `explain` makes the error of what the peer said. `request` and `model` are what was asked, for the messages
    and for `max_tokens`. `header_tells_model` and `frames_tell_model` are where a mistral-nb server's header, and
    OpenAI's frames, are believed in who answers. `proof` is that of the engine's record.
    """

    peer: str
    url: str
    token: Secret | None = field(repr=False)
    body: bytes = field(repr=False)
    model: str
    request: GenerationRequest
    timeouts: Timeouts
    retry_deadline: float = 0
    engine: bool = False
    explain: Callable[[Failure], MistralError] = to_error
    header_tells_model: bool = False
    frames_tell_model: bool = False
    proof: Secret | None = field(default=None, repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    @property
    def who(self) -> str:
        """The peer with its host, which its name may hold already."""
        return self.peer if self.host in self.peer else f"{self.peer} at {self.host}"

    def run(self, line: Line, emit: Emit) -> None:
        """Read the answer in this thread: what `Pump` pumps. While it waits to try again, it emits a status.

        Raises `MistralError`. Its cause is not chained: the frames of an HTTP client hold the request.
        """
        failure = patiently(lambda: self._try(_Live(self, line, emit)), self.retry_deadline, line, emit)
        if failure is not None:
            raise failure

    def _try(self, live: _Live) -> MistralError | None:
        """The failure after the first text, with what the answer cost emitted. Raises the one before it."""
        failure = self._once(live)
        if failure is not None and not live.begun:
            raise failure
        if failure is not None:
            live.cost()
        return failure

    def _once(self, live: _Live) -> MistralError | None:
        import httpx

        parts = urlsplit(self.url)
        live.begin()
        try:
            with connection.send(
                "POST",
                self.url,
                line=live.line,
                token=self.token,
                connect=self.timeouts.connect,
                direct=parts.scheme == "http" and is_loopback(parts.hostname or ""),
                content=self.body,
                headers={
                    "Content-Type": "application/json",
                    "Accept": "text/event-stream, application/json",
                    "Accept-Encoding": "identity",
                    "User-Agent": f"mistral-nb/{__version__}",
                    **({PROOF_HEADER: self.proof.reveal()} if self.proof else {}),
                },
            ) as response:
                live.read(response)
        except PeerFailure as error:
            return self.failed(error, trace=live.request_id)
        except MistralError as error:
            return error.with_traceback(None)
        except (httpx.TransportError, httpx.DecodingError) as error:
            return self._broken(error, live)
        return None

    def failed(
        self, said: PeerFailure, status: int | None = None, retry_after: str | None = None, trace: str | None = None
    ) -> MistralError:
        """The error of what the peer said."""
        words = said_by(said.message, self.token, engine=self.engine)
        return self.explain(
            Failure(self.peer, self.model, self.request, words, said.code, status, retry_after, trace, self.engine)
        )

    def _broken(self, error: Exception, live: _Live) -> MistralError:
        """The error for a connection that was not made or did not last."""
        if live.line.expired:
            return RequestTimeout(live.line.expired)
        detail, not_made = broken(self.who, error, self.timeouts.connect, self.token)
        if not_made:
            return not_made
        if live.begun:
            return live.cut_off(detail)
        return ConnectionFailed(f"{self.peer} broke the connection before the first text ({detail}). Try again")


def refusal(response: httpx.Response, line: Line) -> PeerFailure:
    """What a peer says with a status other than 2xx, in its own words where its body holds any."""
    if (elsewhere := connection.redirect(response)) is not None:
        return PeerFailure(f"it redirects to {elsewhere}, where the request and the token are not sent")
    try:
        said = peer_failure(json.loads(connection.read_limited(response, line, _BODY_BYTES)))
    except (ValueError, RecursionError):
        said = None
    return said or PeerFailure(response.reason_phrase or "an error without a message")


def said_by(message: str, token: Secret | None, *, engine: bool) -> str:
    """A peer's message, fit to be shown: a mistral-nb server's in its own lines, anybody else's on one."""
    return plain_lines(message, token) if engine else clean(message, token, _MESSAGE)


def broken(who: str, error: Exception, connect: float, token: Secret | None = None) -> tuple[str, MistralError | None]:
    """What went wrong with a connection, in words, and the error if it was never made. `connect` is in seconds."""
    import httpx

    # A local protocol error quotes the headers.
    detail = type(error).__name__ if isinstance(error, httpx.LocalProtocolError) else clean(error, token)
    if isinstance(error, httpx.ConnectTimeout):
        return detail, RequestTimeout(
            f"{who} took no connection within {connect:g} s. Check the network, or raise connect_timeout"
        )
    if isinstance(error, httpx.ConnectError | httpx.ProxyError | httpx.UnsupportedProtocol):
        unknown = "certificate verify failed" in detail.lower()
        hint = "To trust its certificate, set SSL_CERT_FILE" if unknown else "Check the network and the proxy"
        return detail, NotListening(f"{who} cannot be reached ({detail}). {hint}")
    return detail, None


class _Live:
    """One answer as it arrives: bytes to chunks, with the deadlines moved along."""

    def __init__(self, exchange: Exchange, line: Line, emit: Emit) -> None:
        self.line = line
        self.begun = False
        self.request_id: str | None = None
        self._exchange = exchange
        self._emit = emit
        self._model: str | None = None
        self._neurons: float | None = None
        self._reading = Reading()
        self._framed = False
        self._noted = 0.0
        peer, limit = exchange.peer, exchange.timeouts.stall
        self._silence = f"{peer} fell silent for {limit:g} s. Ask again, or raise stall_timeout"

    def begin(self) -> None:
        limit = self._exchange.timeouts.first_token
        self.line.within(
            limit, f"{self._exchange.peer} gave no text within {limit:g} s. Try again, or raise first_token_timeout"
        )

    def read(self, response: httpx.Response) -> None:
        """Emit the text and the last chunk. Raises `PeerFailure`, `MistralError` and what `httpx` raises."""
        headers = response.headers
        self.request_id = next((one for name in _REQUEST_IDS if _ID.fullmatch(one := headers.get(name, ""))), None)
        if self._exchange.header_tells_model:
            self._model = plain(unquote(headers.get(MODEL_HEADER, ""))) or None
        self._neurons = _number(headers.get("cf-ai-neurons"))
        arriving = response.iter_bytes() if headers.get("content-encoding") else response.iter_raw()
        parts = self._watched(arriving)
        if not response.is_success:
            said = refusal(response, self.line)
            raise self._exchange.failed(said, response.status_code, headers.get("retry-after"), self.request_id)
        head = b""
        while not head and (part := next(parts, None)) is not None:
            head = part.lstrip(_NOTHING)
        body = itertools.chain((head,), parts)
        reading = self._reading
        if head.startswith(b"{"):
            self._say(reading.body(connection.read_limited(response, self.line, _BODY_BYTES, body)))
        elif not self._follow(frames(body)):
            raise self._without_end(head, headers.get("content-type", ""))
        if reading.failed:
            raise PeerFailure(f"it ended the answer early: {reading.failed}")
        self._told()
        self._emit(replace(self._last(), model=self._model))
        self._finish(arriving)

    def _last(self) -> Chunk:
        """The last chunk with what the answer cost, as far as the peer has told it."""
        last = self._reading.last(self._exchange.request.max_tokens)
        neurons = _finite(last.neurons) if self._neurons is None else self._neurons
        return replace(last, request_id=self.request_id, neurons=neurons)

    def cost(self) -> None:
        """Emit what an answer that does not end well has cost. Its calls may lack pieces."""
        self._emit(replace(self._last(), finish_reason=None, tool_calls=()))

    def _follow(self, data: Iterable[str]) -> bool:
        """Say each frame. True once the end mark has come."""
        for frame in data:
            if frame.strip() == DONE:
                return True
            self._framed = True
            self._say(self._reading.frame(frame))
        return False

    def _say(self, text: str) -> None:
        if not text:
            return
        if self.begun:
            return self._emit(Chunk(text=text, model=self._model))
        self._told()
        self._still_there()
        self._emit(Chunk(text=text, model=self._model, request_id=self.request_id))
        self.begun = True

    def _told(self) -> None:
        if self._exchange.frames_tell_model and isinstance(self._reading.model, str):
            self._model = self._model or plain(self._reading.model) or None

    def _watched(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        for part in parts:
            if self.begun and time.monotonic() > self._noted + _NOTE_SECONDS:
                self._still_there()
            yield part

    def _still_there(self) -> None:
        self._noted = time.monotonic()
        self.line.within(self._exchange.timeouts.stall, self._silence)

    def _finish(self, arriving: Iterator[bytes]) -> None:
        """Read the few bytes after the end mark, if they come at once: the connection is then kept."""
        import httpx

        self.line.within(_REST_SECONDS, "the answer did not end after its end mark")
        left = _REST_BYTES
        with contextlib.suppress(httpx.TransportError, httpx.DecodingError):
            while left > 0 and (part := next(arriving, None)) is not None:
                left -= len(part)
        self.line.release()

    def _without_end(self, head: bytes, kind: str) -> MistralError:
        """The error for a body without an end mark, which begins with `head`, its blanks left out."""
        if self.line.expired:
            return RequestTimeout(self.line.expired)
        if not head or self._framed or any(head.startswith(name[: len(head)]) for name in _SSE):
            return self.cut_off("no end mark")
        told = f" ({clean(kind, self._exchange.token)})" if kind else ""
        return BackendError(
            f"{self._exchange.who} answers with what is no event stream{told}. Check its address, and whether the "
            "network wants a login first",
            status=200,
        )

    def cut_off(self, detail: str) -> StreamTruncated:
        when = "before its end" if self.begun else "before the first text"
        kept = "; the text so far is kept" if self.begun else ""
        return StreamTruncated(f"{self._exchange.peer} broke the answer off {when} ({detail}){kept}. Ask again")


def _number(header: str | None) -> float | None:
    try:
        return _finite(float(header)) if header else None
    except ValueError:
        return None


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None
