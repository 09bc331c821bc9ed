"""The wire's answers, read without I/O: bytes to frames, frames to text, usage, calls and finish reason.

Seen on the wire and read here: `response` as a text, a number, null or an object; frames without it; usage in every
frame (the last counts) and with a null response; `finish_reason` in the middle; OpenAI-shaped frames, their calls in
pieces; two `[DONE]`; errors as frames; plain JSON where a stream was asked for; frames split at any byte, with LF or
CRLF, and a last line without its newline.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_nb.types import Chunk, FinishReason, Usage

__all__ = ["DONE", "PeerFailure", "Reading", "frames", "peer_failure"]

DONE = "[DONE]"
MAX_LINE = 16 << 20
# Without one of these keys it is no error.
_MARKS = frozenset({"errors", "error", "object", "detail", "success"})
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


class PeerFailure(Exception):
    """The peer said that it failed. `code` is the wire's own, None where it gave none."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def frames(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event in a body that comes in `parts`, split anywhere.

    Raises `PeerFailure` for a line of more than 16 MiB.
    """
    import httpx
    from httpx_sse import EventSource

    # Two newlines more let an event through whose end the peer left out.
    body = httpx.Response(
        200,
        headers={"content-type": "text/event-stream; charset=utf-8"},
        content=itertools.chain(_bounded(parts), (b"\n\n",)),
    )
    for event in EventSource(body).iter_sse():
        if event.data.strip():
            yield event.data


def _bounded(parts: Iterable[bytes]) -> Iterator[bytes]:
    line = 0
    for part in parts:
        end = part.rfind(b"\n")
        line = len(part) - end - 1 if end >= 0 else line + len(part)
        if line > MAX_LINE:
            raise PeerFailure(f"it sent a line of more than {MAX_LINE >> 20} MiB")
        yield part


@dataclass(slots=True)
class Reading:
    """What the frames of one answer have said so far.

    `tool_calls` are as they came: OpenAI's are pieces of calls. `model` is who answers by OpenAI's frames.
    """

    usage: Usage | None = None
    neurons: float | None = None
    finish_reason: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    model: str | None = None

    def frame(self, data: str) -> str:
        """Take one frame and give its text. Raises `PeerFailure` for an error and for what cannot be read."""
        return self._take(_read(data))

    def body(self, data: str) -> str:
        """Take a whole answer that is not streamed, in Cloudflare's envelope or without it, and give its text."""
        value = _read(data)
        result = value.get("result", value)
        if not isinstance(result, dict) or not result.keys() & {"response", "choices", "tool_calls"}:
            raise PeerFailure(f"the answer holds no response: {_short(data)}")
        return self._take(result)

    def last(self, max_tokens: int) -> Chunk:
        """The last chunk. Where the peer told no reason, a full measure of tokens means `length`."""
        reason: FinishReason = _REASONS.get(self.finish_reason or "", "stop")
        if self.tool_calls:
            reason = "tool_calls"
        elif self.finish_reason is None and self.usage and self.usage.completion_tokens >= max_tokens:
            reason = "length"
        return Chunk(finish_reason=reason, usage=self.usage, tool_calls=self.tool_calls, neurons=self.neurons)

    def _take(self, value: Mapping[str, Any]) -> str:
        if "usage" in value:
            self.usage = _usage(value["usage"]) or self.usage
            self.neurons = _neurons(value["usage"]) or self.neurons
        reason = value.get("finish_reason")
        calls = value.get("tool_calls")
        spoken: Mapping[str, Any] = value
        if "choices" in value:
            choice = _first(value["choices"])
            self.model = self.model or value.get("model")
            spoken = choice.get("delta") or choice.get("message") or choice
            reason = reason or choice.get("finish_reason")
            calls = calls or spoken.get("tool_calls")
        if reason:
            self.finish_reason = reason
        if calls:
            self.tool_calls += tuple(call for call in calls if isinstance(call, dict))
        if "response" in value:
            return _text(value["response"])
        return _text(spoken.get("content", spoken.get("text")))


def peer_failure(value: Any) -> PeerFailure | None:
    """The error in a frame or body, or None. `success` false counts without a message too.

    Read are Cloudflare's `errors`, OpenAI's `error`, vLLM's `object: error` and FastAPI's `detail`.
    """
    if not isinstance(value, dict):
        return PeerFailure(f"an answer that is not an object: {_short(json.dumps(value))}")
    errors = value.get("errors") or value.get("error")
    if not errors and value.get("object") == "error":
        errors = value
    if not errors and "detail" in value and not value.keys() & {"response", "choices", "result"}:
        errors = value["detail"] or "no reason given"
    if not errors and value.get("success", True) is not False:
        return None
    first = errors[0] if isinstance(errors, list) and errors else errors
    if not isinstance(first, dict):
        return PeerFailure(str(first) if first else "no reason given")
    code = str(first.get("code"))
    message = first.get("message") or first.get("msg") or "no reason given"
    return PeerFailure(str(message), int(code) if code.isdecimal() else None)


def _read(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PeerFailure(f"it is not a JSON object: {_short(data)}")
    if not _MARKS.isdisjoint(value) and (failure := peer_failure(value)):
        raise failure
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _usage(value: Any) -> Usage | None:
    """Token counts, or None when the peer gave none that can be read."""
    if not isinstance(value, dict):
        return None
    counts = [value.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    if not all(isinstance(count, int | float) and float(count).is_integer() for count in counts):
        return None
    return Usage(*(int(count) for count in counts))


def _neurons(value: Any) -> float | None:
    neurons = value.get("neurons") if isinstance(value, dict) else None
    return float(neurons) if isinstance(neurons, int | float) else None


def _first(value: Any) -> dict[str, Any]:
    found = value[0] if isinstance(value, list) and value else None
    return found if isinstance(found, dict) else {}


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
