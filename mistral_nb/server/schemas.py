"""Bodies of the Workers AI wire: what a request must look like, and the envelopes, frames and errors that answer it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

from mistral_nb.errors import ContextOverflow, InvalidRequest, MistralError
from mistral_nb.types import GenerationRequest

if TYPE_CHECKING:  # generation.py imports the errors of this module
    from mistral_nb.server.generation import Piece

__all__ = [
    "DONE",
    "MAX_BODY",
    "MAX_ECHO",
    "Shape",
    "WireError",
    "WorkersShape",
    "envelope",
    "event",
    "parse_json",
    "parse_request",
    "shortened",
    "wire_error",
]

MAX_BODY = 8 << 20
"""Bytes of the largest request body: several texts of the greatest length, however their JSON is escaped."""

MAX_ECHO = 200
"""Characters of what a client sent that an error shows, and of a name that is compared with those that there are."""

_LONGEST_MESSAGE = 4000

DONE = b"data: [DONE]\n\n"


class WireError(Exception):
    """An answer other than success: HTTP `status`, the wire's own `code`, a message for the user, and the field."""

    def __init__(self, status: int, code: int, message: str, field: str | None = None) -> None:
        super().__init__(shortened(_encodable(message), _LONGEST_MESSAGE))
        self.status = status
        self.code = code
        self.field = field and shortened(_encodable(field))

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [{"message": str(self), "code": self.code}]

    @property
    def body(self) -> dict[str, Any]:
        return {"errors": self.errors, "success": False, "result": {}, "messages": []}


def shortened(text: str, longest: int = MAX_ECHO) -> str:
    """`text`, without its middle where it has more than `longest` characters: a message ends with the next step."""
    half = longest // 2 - 3
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def _encodable(text: str) -> str:
    """`text` with any half of a surrogate pair written out."""
    return text.encode("utf-8", "backslashreplace").decode()


def wire_error(error: MistralError) -> WireError:
    """How the wire says `error`: 5021 for a prompt over the context, 5006 for a bad field, else 3043 (503)."""
    match error:
        case ContextOverflow():
            return WireError(413, 5021, str(error), error.field)
        case InvalidRequest():
            return WireError(400, 5006, str(error), error.field)
    return WireError(503, 3043, str(error))


class Shape(Protocol):
    """How one interface writes an answer: whole, or as the frames of an event stream."""

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """The body that is not streamed; `last` has usage, finish reason and calls."""

    def begin(self) -> bytes:
        """The frames before the first piece."""

    def frames(self, piece: Piece) -> bytes:
        """The frames of a piece, with the end mark after the last."""

    def failure(self, error: WireError) -> bytes:
        """The last frame of a stream that failed; no end mark follows."""

    def of(self, model: str) -> Shape:
        """The same for an answer of `model`, where the interface names the model that answers."""


class WorkersShape:
    """Cloudflare's: an envelope, or frames with `response`."""

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        return envelope({"response": text, **_end(last)})

    def begin(self) -> bytes:
        return b""

    def frames(self, piece: Piece) -> bytes:
        frames = event({"response": piece.text}) if piece.text else b""
        return frames + event({"response": "", **_end(piece)}) + DONE if piece.finish_reason else frames

    def failure(self, error: WireError) -> bytes:
        return event({"errors": error.errors, "success": False})

    def of(self, model: str) -> WorkersShape:
        return self


def _end(last: Piece) -> dict[str, Any]:
    assert last.usage is not None
    calls = {"tool_calls": list(last.tool_calls)} if last.tool_calls else {}
    adapter = {"adapter": last.adapter} if last.adapter else {}
    usage = {**last.usage.to_dict(), "prompt_tokens_details": {"cached_tokens": last.reused}}
    return {**calls, "usage": usage, **adapter, "finish_reason": last.finish_reason}


def envelope(result: Any) -> dict[str, Any]:
    """The body of a success."""
    return {"result": result, "success": True, "errors": [], "messages": []}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def parse_request(body: bytes) -> GenerationRequest:
    """The request in a JSON body, whatever its content type. `stream` is false where the body does not say.

    Raises `WireError` 5006 for what is not JSON, with its position; `InvalidRequest` for a field that is wrong.
    """
    data = parse_json(body)
    if isinstance(data, dict):
        data = {"stream": False, **data}
    return GenerationRequest.from_dict(data)


def parse_json(body: bytes) -> Any:
    """The JSON in a body; `WireError` 5006 says where it is none."""
    try:
        return json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise WireError(400, 5006, f"the body is not UTF-8 (byte {error.start}); send JSON as UTF-8") from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise WireError(400, 5006, f"the body is not JSON ({error.msg} at {at}); send a JSON object") from error
    except ValueError as error:
        raise WireError(400, 5006, f"the body holds a number with too many digits ({error})") from error
    except RecursionError as error:
        raise WireError(400, 5006, "the body is nested too deeply; send a flat JSON object") from error
