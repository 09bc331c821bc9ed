"""`ask` and `stream`: what a cell does, for Python code with or without a notebook."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_nb.answer import Answer, Result
from mistral_nb.config import load_settings
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import GenerationRequest, Message

__all__ = ["ask", "make_request", "read_to_end", "stream"]

Prompt = str | Sequence[Message | Mapping[str, Any]]


def ask(
    prompt: Prompt,
    *,
    backend: str | None = None,
    model: str | None = None,
    system: str | None = None,
    call: bool = False,
    max_rounds: int | None = None,
    **fields: Any,
) -> Result:
    """Ask, wait for the whole answer, and return it.

    `prompt` is a text, or a conversation as messages ({"role": ..., "content": ...}); `system` is a text that comes
    before it; `fields` are those of `GenerationRequest`, such as `temperature=0` or `max_tokens=100`. `backend` is
    "cloudflare", "local", "openai" or the https:// address of a `mistral-nb serve`, `model` a name of that backend's;
    without them the settings choose. `functions` may hold Python functions: with `call` the calls that the model asks
    for are run on these, for at most `max_rounds` (4) answers, and are in the result's `calls`; calls that it asks for
    beyond these are not run, and are in `tool_calls`.

    Raises `MistralError` with the partial answer in its `result`. An interrupt cancels the generation, and its
    `KeyboardInterrupt` has the partial answer in `result` too, with the calls that have run.
    """
    if call:
        return _with_calls(prompt, backend, model, system, max_rounds, fields)
    if max_rounds is not None:
        raise InvalidRequest("max_rounds", max_rounds, "goes with call=True only")
    with stream(prompt, backend=backend, model=model, system=system, **fields) as answer:
        return read_to_end(answer)


def _with_calls(
    prompt: Prompt,
    backend: str | None,
    model: str | None,
    system: str | None,
    max_rounds: int | None,
    fields: Mapping[str, Any],
) -> Result:
    from mistral_nb.backends import resolve
    from mistral_nb.call_rounds import MAX_ROUNDS, Rounds
    from mistral_nb.calling import Toolbox

    functions = fields.get("functions")
    if isinstance(functions, str) or not isinstance(functions, Sequence) or not functions:
        raise InvalidRequest("functions", functions, "must be a list of Python functions, since call=True runs them")
    toolbox = Toolbox(functions)
    request = make_request(prompt, system, {**fields, "functions": toolbox.offered})
    rounds = Rounds(request, toolbox, MAX_ROUNDS if max_rounds is None else max_rounds)
    chosen = resolve(load_settings(), backend=backend, model=model).backend

    def one(request: GenerationRequest) -> Result:
        with Answer(chosen, request) as answer:
            return read_to_end(answer)

    return rounds.converse(one)


def stream(
    prompt: Prompt, *, backend: str | None = None, model: str | None = None, system: str | None = None, **fields: Any
) -> Answer:
    """Ask, and return the answer while it comes: iterate over it for chunks, look at its `result` at any time.

    Takes and raises what `ask` does. Leaving a `with` block of it, or `close()` from any thread, cancels it.
    """
    from mistral_nb.backends import resolve

    request = make_request(prompt, system, fields)
    return Answer(resolve(load_settings(), backend=backend, model=model).backend, request)


def read_to_end(answer: Answer) -> Result:
    """The whole answer. An interrupt cancels it, and its `KeyboardInterrupt` has the partial answer in `result`."""
    try:
        deque(answer, maxlen=0)
    except KeyboardInterrupt as interrupt:
        answer.close()
        deque(answer, maxlen=0)
        interrupt.result = answer.result  # type: ignore[attr-defined]
        raise
    return answer.result


def make_request(prompt: Prompt, system: str | None, fields: Mapping[str, Any]) -> GenerationRequest:
    """The request for a prompt or messages with an optional system text before. Raises `InvalidRequest`.

    A field that is None is unset.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if "functions" in given:
        from mistral_nb.calling import offered

        given["functions"] = offered(given["functions"])
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
