"""From what a peer said went wrong to the error that is raised: by the wire's code first, then by the HTTP status.

The local engine's messages are whole: they name the next step. Cloudflare's get one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from time import time

from mistral_nb.config import FALLBACK_MODEL, USE_LOCAL
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ContextOverflow,
    InvalidRequest,
    MistralError,
    ModelError,
    RateLimited,
    RequestTimeout,
    UnknownModel,
)
from mistral_nb.types import FIELDS, GenerationRequest

__all__ = ["Failure", "Withdrawn", "seconds", "to_error"]


_LONGEST = 10 * 365 * 86400.0


class Withdrawn(ModelError):
    """The peer has served the model once, and does so no more."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed exchange.

    `peer` is who failed, in words; `retry_after` the header; `trace` the peer's request id; `engine` marks the local
    engine.
    """

    peer: str
    model: str
    request: GenerationRequest
    message: str
    code: int | None = None
    status: int | None = None
    retry_after: str | None = None
    trace: str | None = None
    engine: bool = False

    def with_hint(self, hint: str) -> str:
        """The whole message: who failed, what it said, and what to do next."""
        server = self.status is not None and self.status >= 500
        trace = f" [request {self.trace}]" if server and self.trace else ""
        return f"{self.peer}: {self.said}{trace}" if self.engine else f"{self.peer}: {self.said}{trace}. {hint}"

    @property
    def said(self) -> str:
        """The peer's message without its prefixes and ids, with code and status; the local engine's as it is."""
        if self.engine:
            return self.message
        text = re.sub(r"^(AiError:\s*)+", "", self.message.strip())
        text = re.sub(r"\([0-9a-f]{8}-[0-9a-f-]{27}\)$", "", text).rstrip().rstrip(".")
        marks = [
            f"code {self.code}" if self.code and self.code != self.status else "",
            f"HTTP {self.status}" if self.status else "",
        ]
        marked = ", ".join(mark for mark in marks if mark)
        return f"{text} ({marked})" if marked else text


def to_error(failure: Failure) -> MistralError:
    """The typed error. Its message is the peer's, then what to do next."""
    make = _BY_CODE.get(failure.code or -1) or _BY_STATUS.get(failure.status or -1) or _other
    return make(failure)


_Make = Callable[[Failure], MistralError]


def _backend(kind: type[BackendError], hint: str) -> _Make:
    def make(failure: Failure) -> MistralError:
        return kind(
            failure.with_hint(hint),
            code=failure.code,
            status=failure.status,
            retry_after=seconds(failure.retry_after),
        )

    return make


def _model(kind: type[ModelError], hint: str) -> _Make:
    def make(failure: Failure) -> MistralError:
        unknown = replace(failure, peer=f"{failure.peer} does not answer for {failure.model}")
        return kind(unknown.with_hint(hint))

    return make


def _lora(problem: str) -> _Make:
    def make(failure: Failure) -> MistralError:
        told = failure.said if failure.engine else f"{problem} ({failure.peer}: {failure.said})"
        return InvalidRequest("lora", failure.request.lora, told)

    return make


_OWN_FIELD = re.compile(r"(?P<field>\w+) = .*?: (?P<problem>.+)", re.DOTALL)
_NAMED_FIELD = re.compile(rf"\b({'|'.join(field.name for field in FIELDS)})\b")


def _invalid(failure: Failure) -> MistralError:
    """`InvalidRequest` for the field that the message names, `request` where it names none."""
    own = _OWN_FIELD.fullmatch(failure.message) if failure.engine else None
    named = _NAMED_FIELD.search(failure.message)
    field = own["field"] if own else named[1] if named else "request"
    value = getattr(failure.request, field, None)
    error = InvalidRequest(field, value, own["problem"] if own else failure.said)
    error.args = (failure.message if own else failure.with_hint("Correct the field that it names"),)
    return error


_OVERFLOWS = (
    re.compile(r"(?:prompt|messages) = '(\d{1,9}) tokens': does not fit the context of (\d{1,9}) tokens"),
    re.compile(
        r"number of input and maximum output tokens \((\d[\d,]{0,11})\) exceeded .{0,80}?"
        r"context window \w{0,20}\s?\((\d[\d,]{0,11})\b"
    ),
)


def _overflow(failure: Failure) -> MistralError:
    """`ContextOverflow` where the message tells both numbers of tokens."""
    found = next((match for form in _OVERFLOWS if (match := form.search(failure.message))), None)
    if failure.code == 5021 and found:
        prompt_tokens, limit = (int(number.replace(",", "")) for number in found.groups())
        return ContextOverflow(prompt_tokens, limit, "prompt" if failure.request.prompt else "messages")
    size = sum(len(message.content) for message in failure.request.messages or ()) or len(failure.request.prompt or "")
    return InvalidRequest(
        "prompt", f"{size} characters", f"is too long for {failure.model} ({failure.said}); shorten it or max_tokens"
    )


def _other(failure: Failure) -> MistralError:
    """Any status without a rule of its own."""
    server = failure.status is not None and failure.status >= 500
    redirects = failure.status is not None and 300 <= failure.status < 400
    hint = "Try again in a moment" if server else "Check the address" if redirects else "Check the request"
    return _backend(BackendError, hint)(failure)


def seconds(header: str | None) -> float | None:
    """Seconds to wait from a Retry-After header, which holds seconds or a date: 10 years at most."""
    if not header:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", header.strip()):
        return min(float(header), _LONGEST)
    try:
        return min(max(0.0, parsedate_to_datetime(header).timestamp() - time()), _LONGEST)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


_TOKEN = _backend(AuthenticationError, "Check the token, and what it permits: on Cloudflare, Workers AI")
_REFUSED = _backend(
    AuthenticationError, "Accept the model's terms or enable it in the dashboard, or name another model"
)
_SLOW = _backend(RequestTimeout, "Try again, or lower max_tokens")
_ROUTE = _backend(BackendError, "Check the model id and the address; on Cloudflare, the account id")
_NO_MODEL = _model(UnknownModel, "Check its name; `%mistral models` or `mistral-nb models` lists the local ones")

_BY_CODE: dict[int, _Make] = {
    10000: _TOKEN,
    6003: _TOKEN,
    7000: _ROUTE,
    7003: _ROUTE,
    5007: _NO_MODEL,
    3042: _NO_MODEL,
    5028: _model(Withdrawn, f"For the weights of Mistral-7B-Instruct v0.2 ask {FALLBACK_MODEL}"),
    **dict.fromkeys((5018, 3041, 3023, 5016, 5035), _REFUSED),
    5006: _invalid,
    5005: _lora("the model takes no LoRA adapter; leave lora out or name a model that does"),
    3037: _lora("no such adapter; check its name, or wait a moment if it was just uploaded"),
    3039: _lora("the adapter lacks files; upload adapter_config.json and adapter_model.safetensors"),
    3006: _overflow,
    5021: _overflow,
    **dict.fromkeys((3007, 3008, 3046), _SLOW),
    **dict.fromkeys((3036, 4006), _backend(RateLimited, f"The day's allowance is spent until 00:00 UTC; {USE_LOCAL}")),
    3040: _backend(RateLimited, f"No capacity now; try again in a moment, or {USE_LOCAL}"),
    3043: _backend(BackendError, "Try again in a moment"),
    971: _backend(RateLimited, "The account sends too much at once; wait and try again"),
}
_BY_STATUS: dict[int, _Make] = {
    401: _TOKEN,
    403: _TOKEN,
    404: _ROUTE,
    408: _SLOW,
    410: _BY_CODE[5028],
    413: _overflow,
    429: _backend(RateLimited, "Wait a moment and try again"),
}
