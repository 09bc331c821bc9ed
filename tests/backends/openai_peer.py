"""The frames and bodies of an OpenAI-compatible server, and a client of the peer that plays them."""

from __future__ import annotations

from typing import Any

from mistral_nb.backends import OpenAICompatible
from mistral_nb.backends.openai_compatible import openai_compatible
from mistral_nb.config import load_settings
from mistral_nb.types import GenerationRequest
from tests.backends.scripted import TOKEN, Peer, body, frame, head

MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
HELLO = GenerationRequest(prompt="Hello")
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


def make(peer: Peer, model: str | None = MODEL, **settings: Any) -> OpenAICompatible:
    given = {"openai_base_url": f"http://127.0.0.1:{peer.port}/v1", "retry_deadline": 0.0, "openai_api_key": TOKEN}
    return openai_compatible(load_settings({**given, **settings}), model)


def delta(content: str | None = None, reason: str | None = None, **more: Any) -> bytes:
    told = {} if content is None else {"content": content}
    return frame({"object": "chat.completion.chunk", "choices": [{"delta": {**told, **more}, "finish_reason": reason}]})


def stream(*frames: bytes) -> list[Any]:
    usage = frame({"object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    return [head(), delta("", role="assistant"), *frames, usage, frame("[DONE]")]


def models(*entries: dict[str, Any]) -> list[Any]:
    return body({"object": "list", "data": [{"object": "model", **entry} for entry in entries]})
