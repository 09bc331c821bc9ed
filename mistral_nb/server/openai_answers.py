"""OpenAI's answers: completions of chats and of bare prompts, whole or in chunks, and its errors."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mistral_nb.server.generation import Piece
from mistral_nb.server.schemas import DONE, WireError, event

__all__ = ["ChatShape", "CompletionShape", "Head", "is_openai", "openai_error"]

_ERRORS: Mapping[int, tuple[int, str]] = {
    10000: (401, "invalid_api_key"),
    6003: (401, "invalid_api_key"),
    5007: (404, "model_not_found"),
    3037: (404, "model_not_found"),
    5021: (400, "context_length_exceeded"),
    3040: (429, "rate_limit_exceeded"),
}
"""Statuses and codes that OpenAI has for some of Workers AI's codes. Others keep status and number."""

_OPENAI = re.compile(r"(/client/v4/accounts/[^/]+/ai)?/v1/")
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(frozen=True, slots=True)
class Head:
    """What every body and chunk of one answer begins with: its id, and the model that answers."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, kind: str, choice: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        choices = [{"index": 0, **choice}] if choice else []
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }


@dataclass(frozen=True, slots=True)
class ChatShape:
    """`chat.completion`, and `chat.completion.chunk` with the role first. `usage` asks for a last chunk with it."""

    head: Head
    usage: bool = False

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if last.tool_calls:
            message |= {"content": text or None, "tool_calls": _calls(last)}
        choice = {"message": message, "logprobs": None, "finish_reason": last.finish_reason}
        return self.head.body("chat.completion", choice, usage=_usage(last))

    def begin(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def frames(self, piece: Piece) -> bytes:
        frames = self._chunk({"content": piece.text}) if piece.text else b""
        if piece.tool_calls:
            calls = [{"index": index, **call} for index, call in enumerate(_calls(piece))]
            frames += self._chunk({"tool_calls": calls})
        if piece.finish_reason:
            frames += self._chunk({}, piece.finish_reason)
            frames += _last(self.head, "chat.completion.chunk", piece) if self.usage else b""
            frames += DONE
        return frames

    def failure(self, error: WireError) -> bytes:
        return event(openai_error(error)[1])

    def of(self, model: str) -> ChatShape:
        return replace(self, head=replace(self.head, model=model))

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"delta": delta, "logprobs": None, "finish_reason": reason}
        return event(self.head.body("chat.completion.chunk", choice, **_no_usage(self.usage)))


@dataclass(frozen=True, slots=True)
class CompletionShape:
    """`text_completion`, whole and in chunks alike. `usage` asks for a last chunk with it."""

    head: Head
    usage: bool = False

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        return self.head.body("text_completion", _text(text, last.finish_reason), usage=_usage(last))

    def begin(self) -> bytes:
        return b""

    def frames(self, piece: Piece) -> bytes:
        frames = b""
        if piece.text or piece.finish_reason:
            choice = _text(piece.text, piece.finish_reason)
            frames += event(self.head.body("text_completion", choice, **_no_usage(self.usage)))
        if piece.finish_reason:
            frames += _last(self.head, "text_completion", piece) if self.usage else b""
            frames += DONE
        return frames

    def failure(self, error: WireError) -> bytes:
        return event(openai_error(error)[1])

    def of(self, model: str) -> CompletionShape:
        return replace(self, head=replace(self.head, model=model))


def _text(text: str, reason: str | None) -> dict[str, Any]:
    return {"text": text, "logprobs": None, "finish_reason": reason}


def _calls(last: Piece) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)},
        }
        for call in last.tool_calls
    ]


def _usage(last: Piece) -> dict[str, Any]:
    assert last.usage is not None
    return {**last.usage.to_dict(), "prompt_tokens_details": {"cached_tokens": last.reused}}


def _last(head: Head, kind: str, last: Piece) -> bytes:
    """The chunk with the usage, which has no choice."""
    return event(head.body(kind, None, usage=_usage(last)))


def _no_usage(wanted: bool) -> dict[str, Any]:
    """What the chunks before the one with the usage say of it."""
    return {"usage": None} if wanted else {}


def is_openai(path: str) -> bool:
    """Whether a path belongs to OpenAI's interface, at the root or below an account."""
    return _OPENAI.match(path) is not None


def openai_error(error: WireError) -> tuple[int, dict[str, Any]]:
    """Status and body of an error. What the engine calls functions are tools here."""
    status, code = _ERRORS.get(error.code, (error.status, str(error.code)))
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    message, field = (text and re.sub(r"^functions\[", "tools[", text) for text in (str(error), error.field))
    return status, {"error": {"message": message, "type": kind, "param": field, "code": code}}
