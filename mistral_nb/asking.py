"""`ask` and `stream`: what a cell does, for Python code with or without a notebook."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_nb.answer import Answer, Result
from mistral_nb.config import load_settings
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import GenerationRequest, Message

__all__ = ["ask", "make_request", "stream"]

Prompt = str | Sequence[Message | Mapping[str, Any]]


def ask(
    prompt: Prompt, *, backend: str | None = None, model: str | None = None, system: str | None = None, **fields: Any
) -> Result:
    """Ask, wait for the whole answer, and return it.

    `prompt` is a text, or a conversation as messages ({"role": ..., "content": ...}); `system` is a text that comes
    before it; `fields` are those of `GenerationRequest`, such as `temperature=0` or `max_tokens=100`. `backend` is
    "cloudflare" or "local", `model` a name of that backend's; without them the settings choose.

    Raises `MistralError` with the partial answer in its `result`. An interrupt cancels the generation, and its
    `KeyboardInterrupt` has the partial answer in `result` too.
    """
    with stream(prompt, backend=backend, model=model, system=system, **fields) as answer:
        try:
            deque(answer, maxlen=0)
        except KeyboardInterrupt as interrupt:
            answer.close()
            deque(answer, maxlen=0)
            interrupt.result = answer.result  # type: ignore[attr-defined]
            raise
        return answer.result


def stream(
    prompt: Prompt, *, backend: str | None = None, model: str | None = None, system: str | None = None, **fields: Any
) -> Answer:
    """Ask, and return the answer while it comes: iterate over it for chunks, look at its `result` at any time.

    Takes and raises what `ask` does. Leaving a `with` block of it, or `close()` from any thread, cancels it.
    """
    from mistral_nb.backends import resolve

    request = make_request(prompt, system, fields)
    return Answer(resolve(load_settings(), backend=backend, model=model).backend, request)


def make_request(prompt: Prompt, system: str | None, fields: Mapping[str, Any]) -> GenerationRequest:
    """The request for a prompt or messages with an optional system text before. Raises `InvalidRequest`.

    A field that is None is unset.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(prompt, Mapping) or not isinstance(prompt, str | Sequence):
        raise InvalidRequest("prompt", prompt, "must be a text, or a conversation as a list of messages")
    if "messages" in given:
        raise InvalidRequest(
            "messages",
            given["messages"],
            "give exactly one of prompt and messages: a conversation goes in the place of the prompt",
        )
    request = GenerationRequest.from_dict({**given, "prompt" if isinstance(prompt, str) else "messages": prompt})
    if system is None:
        return request
    turns = request.messages or (Message("user", request.prompt or ""),)
    if any(turn.role == "system" for turn in turns):
        raise InvalidRequest("system", system, "the messages hold a system turn already; leave one of the two out")
    return request.with_(prompt=None, messages=(Message("system", system), *turns))
