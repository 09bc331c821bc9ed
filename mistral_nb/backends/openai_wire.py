"""The OpenAI wire without I/O: the body of a request, calls put together from their pieces, and errors in its words."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from mistral_nb.backends.adapter_paths import refuse_path
from mistral_nb.backends.failures import Failure, to_error
from mistral_nb.backends.wire import mended
from mistral_nb.errors import (
    AuthenticationError,
    BackendError,
    ContextOverflow,
    InvalidRequest,
    MistralError,
    UnknownModel,
)
from mistral_nb.functions import parse_calls, tools_of
from mistral_nb.types import FIELDS, GenerationRequest, Message

__all__ = ["assemble", "body_of", "explain", "path_of"]


def path_of(request: GenerationRequest) -> str:
    """Where a request goes, below the base URL."""
    return "completions" if request.raw else "chat/completions"


def body_of(request: GenerationRequest, model: str) -> dict[str, Any]:
    """The body for `model`. Raises `InvalidRequest` for what the wire cannot say.

    A prompt is one turn of the user's, in `raw` a plain prompt. An adapter is a model of its own name. `top_k` and
    the repetition penalty are fields of the servers' own, the latter by the name that vLLM and SGLang know and by the
    one that llama.cpp knows. Functions are tools by what their code says, as the local engine reads it.
    """
    if request.lora_scale is not None:
        raise InvalidRequest("lora_scale", request.lora_scale, "an OpenAI-compatible server has no such field; drop it")
    refuse_path(request, "give the name under which the server has it", slash_in_names=True)
    if request.raw and request.functions:
        raise InvalidRequest("functions", len(request.functions), "needs the chat template; leave raw out")
    messages = request.messages or (Message("user", request.prompt or ""),)
    body: dict[str, Any] = {"model": request.lora or model}
    if request.raw:
        body["prompt"] = "".join(message.content for message in messages)
    else:
        body["messages"] = _turns(messages)
    if request.functions:
        body["tools"] = [{"type": "function", "function": tool.to_dict()} for tool in tools_of(request.functions)]
    body |= {"stream": request.stream, "max_tokens": request.max_tokens, **_sampling(request)}
    return body | ({"stream_options": {"include_usage": True}} if request.stream else {})


def _sampling(request: GenerationRequest) -> dict[str, Any]:
    """What is set, in this wire's ranges: 0 for top_p, which keeps one token, is greedy; 0 for a repetition penalty
    is none.
    """
    greedy = request.top_p == 0
    penalty = request.repetition_penalty or None
    fields = {
        "temperature": 0.0 if greedy else request.temperature,
        "top_p": None if greedy or request.top_p is None else min(request.top_p, 1.0),
        "top_k": request.top_k,
        "seed": request.seed,
        "repetition_penalty": penalty,
        "repeat_penalty": penalty,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "stop": list(request.stop) if request.stop else None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The conversation. An assistant's turn that `tool` turns follow is the JSON of its calls: it becomes calls with
    ids, beside the text of an assistant's turn before it, and each result names the call that it answers.
    """
    turns: list[dict[str, Any]] = []
    waiting: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        if message.role == "tool":
            turns.append(_result(message, waiting))
            continue
        waiting = []
        answered = message.role == "assistant" and messages[number + 1 : number + 2]
        if answered and messages[number + 1].role == "tool":
            calls = _calls_in(message.content)
            ids = [f"call{number:03d}{place:02d}" for place in range(len(calls))]
            waiting = [(call["name"], its_id) for call, its_id in zip(calls, ids, strict=True)]
            beside = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else None
            turns.append({"role": "assistant", "content": beside, "tool_calls": list(map(_call, calls, ids))})
        else:
            turns.append(dict(message.to_dict()))
    return turns


def _calls_in(content: str) -> tuple[dict[str, Any], ...]:
    calls = parse_calls(content)
    if calls is None:
        raise InvalidRequest(
            "messages",
            content,
            'the turn before a tool\'s result must be its calls: [{"name": ..., "arguments": {...}}]',
        )
    return calls


def _call(call: Mapping[str, Any], its_id: str) -> dict[str, Any]:
    """Chat templates of Mistral's want nine letters and digits for an id."""
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {"id": its_id, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _result(message: Message, waiting: list[tuple[str, str]]) -> dict[str, Any]:
    """The result of the first call of that name that has none yet, or of the first call where none has the name."""
    if not waiting:
        raise InvalidRequest("messages", message.name or "tool", "a tool's result must follow the turn that called it")
    place = next((place for place, (name, _) in enumerate(waiting) if name == message.name), 0)
    return {"role": "tool", "content": message.content, "tool_call_id": waiting.pop(place)[1]}


def assemble(pieces: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Calls as {"name", "arguments"} from `tool_calls` deltas, by their index and then as they came.

    Pieces of one call share its index; a new id begins a new call, and a piece without an index is a call of its own,
    after those with one. Arguments are an object; text that is no JSON object, as of a call that was cut off, stays a
    text.
    """
    calls: list[dict[str, Any]] = []
    open_calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        index, its_id = piece.get("index"), piece.get("id")
        function = piece.get("function")
        told = function if isinstance(function, Mapping) else piece
        call = open_calls.get(index) if isinstance(index, int) else None
        if call is None or (its_id and call["id"] and its_id != call["id"]):
            call = {"id": its_id, "name": "", "arguments": "", "place": index if isinstance(index, int) else math.inf}
            calls.append(call)
            if isinstance(index, int):
                open_calls[index] = call
        name, more = told.get("name"), told.get("arguments")
        call["name"] = call["name"] or (mended(name) if isinstance(name, str) else "")
        if isinstance(more, str) and isinstance(call["arguments"], str):
            call["arguments"] += more
        elif isinstance(more, dict):
            call["arguments"] = more
    calls.sort(key=itemgetter("place"))
    return tuple({"name": call["name"], "arguments": _arguments(call["arguments"])} for call in calls)


def _arguments(given: str | dict[str, Any]) -> str | dict[str, Any]:
    given = mended(given) if isinstance(given, str) else given
    try:
        value = json.loads(given or "{}") if isinstance(given, str) else given
        value = json.loads(mended(json.dumps(value, ensure_ascii=False)))
    except (ValueError, RecursionError):
        return given
    return value if isinstance(value, dict) else given


_TOO_LONG = re.compile(
    r"context.length|context.size|context.window|maximum model length|does not fit the context", re.IGNORECASE
)
_LIMIT = re.compile(r"(?:context (?:length|size) (?:is |of |\()|model length of |context of |model with )(\d{1,9})\b")
_PROMPT = re.compile(
    r"\b(?P<a>\d{1,9}) in the (?:messages|prompt)|(?:contains|resulted in|request has)(?: at least)? (?P<b>\d{1,9})\b"
    r"|\((?:length )?(?P<c>\d{1,9})(?: tokens)?\) (?:is longer|exceeds)|\b(?P<d>\d{1,9}) tokens': does not fit"
)
_NAMED_FIELD = re.compile(rf"\b({'|'.join(field.name for field in FIELDS)})\b")
_KEY = "Check openai_api_key (MISTRAL_NB_OPENAI_API_KEY)"
_ADDRESS = "Check openai_base_url, which ends with the version as in https://host:port/v1"


def explain(failure: Failure) -> MistralError:
    """The typed error for what an OpenAI-compatible server said, in the words of vLLM, SGLang, llama.cpp and OpenAI.

    Their codes are texts or HTTP statuses, so only the status and the message count; an error that comes as a frame
    has its status there alone. A failure to say which models there are has no model.
    """
    status = failure.status or (failure.code if failure.code in range(400, 600) else None)
    failure = replace(failure, code=None, status=status)
    request = failure.request
    if status in (401, 403):
        return AuthenticationError(failure.with_hint(_KEY), status=status)
    if status == 404 and failure.model and "model" in failure.message.lower():
        if request.lora is not None:
            return InvalidRequest("lora", request.lora, f"{failure.peer} has no such adapter ({failure.said})")
        told = replace(failure, peer=f"{failure.peer} does not answer for {failure.model}")
        return UnknownModel(told.with_hint("Leave the model out to be told which there are"))
    if status is not None and (300 <= status < 400 or status in (404, 405)):
        return BackendError(failure.with_hint(_ADDRESS), status=status)
    if status in (400, 413, 422, 500, None) and _TOO_LONG.search(failure.message):
        return _overflow(failure)
    if status in (400, 422):
        return _invalid(failure)
    return to_error(failure)


def _overflow(failure: Failure) -> MistralError:
    limit, prompt = _LIMIT.search(failure.message), _PROMPT.search(failure.message)
    if limit and prompt:
        return ContextOverflow(int(next(filter(None, prompt.groups()))), int(limit[1]))
    return to_error(replace(failure, status=413))


def _invalid(failure: Failure) -> MistralError:
    """`InvalidRequest` for the field that the message names; what names none is told as it is."""
    request, named = failure.request, _NAMED_FIELD.search(failure.message)
    field = named[1] if named else "functions" if request.functions and "tool" in failure.message.lower() else ""
    if not field:
        return to_error(failure)
    error = InvalidRequest(field, getattr(request, field), failure.said)
    error.args = (failure.with_hint(f"Correct {field}, leave it out, or set the server up for it"),)
    return error
