"""The Workers AI wire, read without I/O: bytes to frames, frames to text, usage and finish reason.

Seen on the wire and read here: `response` as a text, a number, null or an object; frames without it; usage in every
frame (the last counts) and with a null response; `finish_reason` in the middle; OpenAI-shaped frames; two `[DONE]`;
errors as frames; plain JSON where a stream was asked for; frames split at any byte, with LF or CRLF, and a last line
without its newline.
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
_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "tool_calls": "tool_calls"}


class PeerFailure(Exception):
    """The peer said that it failed. `code` is the wire's own, None where it gave none."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code


def frames(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event in a body that comes in `parts`, split anywhere."""
    import httpx
    from httpx_sse import EventSource

    # Two newlines more let an event through whose end the peer left out.
    body = httpx.Response(
        200,
        headers={"content-type": "text/event-stream; charset=utf-8"},
        content=itertools.chain(parts, (b"\n\n",)),
    )
    for event in EventSource(body).iter_sse():
        if event.data.strip():
            yield event.data


@dataclass(slots=True)
class Reading:
    """What the frames of one answer have said so far."""

    usage: Usage | None = None
    finish_reason: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    def frame(self, data: str) -> str:
        """Take one frame and give its text. Raises `PeerFailure` for an error and for what cannot be read."""
        value = _json(data)
        failure = peer_failure(value)
        if failure:
            raise failure
        return self._take(value)

    def body(self, data: str) -> str:
        """Take a whole answer that is not streamed, in Cloudflare's envelope or without it, and give its text."""
        value = _json(data)
        failure = peer_failure(value)
        if failure:
            raise failure
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
        return Chunk(finish_reason=reason, usage=self.usage, tool_calls=self.tool_calls)

    def _take(self, value: Mapping[str, Any]) -> str:
        choice = _first(value.get("choices"))
        spoken = choice.get("delta") or choice.get("message") or choice
        usage = _usage(value.get("usage"))
        self.usage = usage or self.usage
        self.finish_reason = value.get("finish_reason") or choice.get("finish_reason") or self.finish_reason
        calls = value.get("tool_calls") or spoken.get("tool_calls") or ()
        self.tool_calls += tuple(call for call in calls if isinstance(call, dict))
        if "response" in value:
            return _text(value["response"])
        return _text(spoken.get("content", spoken.get("text")))


def peer_failure(value: Any) -> PeerFailure | None:
    """The error in a frame or body, or None. `success` false counts without a message too."""
    if not isinstance(value, dict):
        return PeerFailure(f"an answer that is not an object: {_short(json.dumps(value))}")
    errors = value.get("errors") or value.get("error")
    if not errors and value.get("success", True) is not False:
        return None
    first = errors[0] if isinstance(errors, list) else errors
    if not isinstance(first, dict):
        return PeerFailure(str(first) if first else "no reason given")
    code = str(first.get("code"))
    return PeerFailure(str(first.get("message") or "no reason given"), int(code) if code.isdecimal() else None)


def _json(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise PeerFailure(f"it is not a JSON object: {_short(data)}")
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
    if not all(isinstance(count, int | float) for count in counts):
        return None
    return Usage(*(int(count) for count in counts))


def _first(value: Any) -> dict[str, Any]:
    found = value[0] if isinstance(value, list) and value else None
    return found if isinstance(found, dict) else {}


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
