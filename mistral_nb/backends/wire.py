"""The wire's answers, read without I/O: bytes to frames, frames to text, usage, calls and finish reason.

Seen on the wire and read here: `response` as a text, a number, null or an object; frames without it; usage in every
frame (the last counts) and with a null response; `finish_reason` in the middle; OpenAI-shaped frames, their calls in
pieces; two `[DONE]`; errors as frames; plain JSON where a stream was asked for; frames split at any byte, with LF,
CRLF or CR, and a last line without its newline; a character's two halves in two frames. A field of another kind than
it should be is left out.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from mistral_nb.types import Chunk, FinishReason, Usage

__all__ = ["DONE", "PeerFailure", "Reading", "frames", "mended", "peer_failure"]

DONE = "[DONE]"
MAX_EVENT = 16 << 20
# What a float holds exactly: more tokens or neurons than that no peer counts.
_MOST = 2**53
# Two ends of a line in a row, whichever they are, hold one of these.
_BLANK = (b"\n\n", b"\n\r", b"\r\r")
_TOO_DEEP = "it sent an object that is nested too deeply"
_CODE = re.compile(r"[0-9]{1,9}")
_HALF = re.compile("[\ud800-\udfff]")
_OPEN_HALF = re.compile("[\ud800-\udbff]\\Z")
# Without one of these keys it is no error.
_MARKS = frozenset({"errors", "error", "object", "detail", "success"})
_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "model_length": "length",
    "tool_calls": "tool_calls",
}
# What OpenAI, vLLM, SGLang and gateways give for an answer that they did not let come to its end.
_FAILURES = frozenset({"abort", "content_filter", "error"})


class PeerFailure(Exception):
    """The peer said that it failed, whole and not cleaned. `code` is the wire's own, None where it gave none."""

    def __init__(self, message: str, code: int | None = None) -> None:
        message = mended(message)
        super().__init__(message)
        self.message = message
        self.code = code


def frames(parts: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event in a body that comes in `parts`, split anywhere.

    Raises `PeerFailure` for an event of more than 16 MiB.
    """
    import httpx
    from httpx_sse import EventSource

    # Two newlines more let an event through whose end the peer left out.
    body = httpx.Response(
        200,
        headers={"content-type": "text/event-stream; charset=utf-8-sig"},
        content=itertools.chain(_bounded(parts), (b"\n\n",)),
    )
    for event in EventSource(body).iter_sse():
        if event.data.strip():
            yield event.data


def _bounded(parts: Iterable[bytes]) -> Iterator[bytes]:
    event, before = 0, b""
    for part in parts:
        seen = before + part
        end = max(map(seen.rfind, _BLANK))
        event = len(seen) - end - 2 if end >= 0 else event + len(part)
        if event > MAX_EVENT:
            raise PeerFailure(f"it sent an event of more than {MAX_EVENT >> 20} MiB")
        before = seen[-1:]
        yield part


def mended(text: str) -> str:
    """The text with the halves of characters that JSON's escapes leave joined; one alone is U+FFFD."""
    if text.isascii() or not _HALF.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@dataclass(slots=True)
class Reading:
    """What the frames of one answer have said so far.

    `tool_calls` are as they came: OpenAI's are pieces of calls. `model` is who answers by OpenAI's frames. The first
    half of a character at the end of a frame waits for the text that follows; without any it is left out.
    """

    usage: Usage | None = None
    neurons: float | None = None
    finish_reason: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    model: str | None = None
    _half: str = ""

    def frame(self, data: str) -> str:
        """Take one frame and give its text. Raises `PeerFailure` for an error and for what cannot be read."""
        return self._take(_read(data))

    def body(self, data: str) -> str:
        """Take a whole answer that is not streamed, in Cloudflare's envelope or without it, and give its text."""
        value = _read(data)
        result = value.get("result", value)
        if not isinstance(result, dict) or not result.keys() & {"response", "choices", "tool_calls"}:
            raise PeerFailure(f"the answer holds no response: {data}")
        return self._take(result) + ("\ufffd" if self._half else "")

    @property
    def failed(self) -> str:
        """The finish reason, where it says that the answer is no whole one; else empty."""
        return self.finish_reason if self.finish_reason in _FAILURES else ""

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
        calls = _calls(value.get("tool_calls"))
        spoken: Mapping[str, Any] = value
        if "choices" in value:
            choice = _first(value["choices"])
            self.model = self.model or _named(value.get("model"))
            spoken = _object(choice.get("delta")) or _object(choice.get("message")) or choice
            reason = reason or choice.get("finish_reason")
            calls = calls or _pieces(spoken.get("tool_calls"))
        if reason and isinstance(reason, str):
            self.finish_reason = reason
        if calls:
            self.tool_calls += calls
        said = value["response"] if "response" in value else spoken.get("content", spoken.get("text"))
        return self._joined(_text(said))

    def _joined(self, text: str) -> str:
        """The text after what waits of the one before it, without what is to wait now."""
        if not text or (text.isascii() and not self._half):
            return text
        text = self._half + text
        waits = _OPEN_HALF.search(text)
        self._half = waits[0] if waits else ""
        return mended(text[:-1] if waits else text)


def peer_failure(value: Any) -> PeerFailure | None:
    """The error in a frame or body, or None. `success` false counts without a message too.

    Read are Cloudflare's `errors`, OpenAI's `error`, vLLM's `object: error` and FastAPI's `detail`.
    """
    if not isinstance(value, dict):
        return PeerFailure(f"an answer that is not an object: {_text(value)}")
    errors = value.get("errors") or value.get("error")
    if not errors and value.get("object") == "error":
        errors = value
    if not errors and "detail" in value and not value.keys() & {"response", "choices", "result"}:
        errors = value["detail"] or "no reason given"
    if not errors and value.get("success", True) is not False:
        return None
    first = errors[0] if isinstance(errors, list) and errors else errors
    if not isinstance(first, dict):
        return PeerFailure(_text(first) if first else "no reason given")
    code = _CODE.fullmatch(_text(first.get("code")))
    message = first.get("message") or first.get("msg") or "no reason given"
    return PeerFailure(_text(message), int(code[0]) if code else None)


def _read(data: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PeerFailure(f"it is not a JSON object: {data}")
    if not _MARKS.isdisjoint(value) and (failure := peer_failure(value)):
        raise failure
    return value


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise PeerFailure(_TOO_DEEP) from None


def _usage(value: Any) -> Usage | None:
    """Token counts, or None when the peer gave none that can be read."""
    if not isinstance(value, dict):
        return None
    counts = [value.get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
    if not all(_is_amount(count) and count == int(count) for count in counts):
        return None
    return Usage(*(int(count) for count in counts))


def _neurons(value: Any) -> float | None:
    neurons = value.get("neurons") if isinstance(value, dict) else None
    return float(neurons) if _is_amount(neurons) else None


def _is_amount(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _named(value: Any) -> str | None:
    return mended(value) if isinstance(value, str) and value else None


def _pieces(value: Any) -> tuple[dict[str, Any], ...]:
    return tuple(call for call in value if isinstance(call, dict)) if isinstance(value, list) else ()


def _calls(value: Any) -> tuple[dict[str, Any], ...]:
    """Whole calls. Their texts are of whole characters."""
    try:
        return tuple(json.loads(mended(_text(call))) for call in _pieces(value))
    except RecursionError:
        raise PeerFailure(_TOO_DEEP) from None


def _first(value: Any) -> dict[str, Any]:
    return _object(value[0]) if isinstance(value, list) and value else {}
