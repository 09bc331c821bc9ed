"""Bodies of the wire: what a request must look like, and the envelopes and frames that answer it."""

from __future__ import annotations

import json
from typing import Any

from mistral_nb.errors import ContextOverflow, InvalidRequest, MistralError
from mistral_nb.types import GenerationRequest, Usage

__all__ = [
    "DONE",
    "MAX_BODY",
    "WireError",
    "end_frame",
    "envelope",
    "error_frame",
    "parse_request",
    "text_frame",
    "wire_error",
]

MAX_BODY = 8 << 20
"""Bytes of the largest request body: several texts of the greatest length, however their JSON is escaped."""

DONE = b"data: [DONE]\n\n"


class WireError(Exception):
    """An answer other than success: HTTP `status`, the wire's own `code`, and a message for the user."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())
        self.status = status
        self.code = code

    @property
    def errors(self) -> list[dict[str, Any]]:
        return [{"message": str(self), "code": self.code}]

    @property
    def body(self) -> dict[str, Any]:
        return {"errors": self.errors, "success": False, "result": {}, "messages": []}


def wire_error(error: MistralError) -> WireError:
    """How the wire says `error`: 5021 for a prompt over the context, 5006 for a bad field, else 3043 (503)."""
    match error:
        case ContextOverflow():
            return WireError(413, 5021, str(error))
        case InvalidRequest():
            return WireError(400, 5006, str(error))
    return WireError(503, 3043, str(error))


def parse_request(body: bytes) -> GenerationRequest:
    """The request in a JSON body, whatever its content type. `stream` is false where the body does not say.

    Raises `WireError` 5006 for what is not JSON, with its position, and 5005 for a LoRA adapter; `InvalidRequest` for
    a field that is wrong.
    """
    data = _json(body)
    if isinstance(data, dict):
        data = {"stream": False, **data}
    request = GenerationRequest.from_dict(data)
    if request.lora is not None or request.lora_scale is not None:
        raise WireError(405, 5005, "this engine applies no LoRA adapters; leave out lora and lora_scale")
    return request


def _json(body: bytes) -> Any:
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


def envelope(text: str, usage: Usage, finish_reason: str) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    result = {"response": text, "usage": usage.to_dict(), "finish_reason": finish_reason}
    return {"result": result, "success": True, "errors": [], "messages": []}


def text_frame(text: str) -> bytes:
    return _frame({"response": text})


def end_frame(usage: Usage, finish_reason: str) -> bytes:
    """The last frame before `[DONE]`."""
    return _frame({"response": "", "usage": usage.to_dict(), "finish_reason": finish_reason})


def error_frame(error: WireError) -> bytes:
    """The last frame of a stream that failed; no `[DONE]` follows."""
    return _frame({"errors": error.errors, "success": False})


def _frame(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
