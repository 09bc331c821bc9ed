"""OpenAI's request bodies, for chat and for bare prompts, as the one request that the engine takes.

Sampling defaults are the model's own, as on Workers AI: 256 tokens, temperature 0.6. `top_k`, `repetition_penalty`,
`lora` and `lora_scale` are taken too. A null is a field that is not there, as is an empty `stop`. Any whole number is a
`seed`: 1 to 9999999999 are the engine's own, and others are taken modulo those. A field that would change the answer
and cannot be honoured is refused by name, and so are `frequency_penalty` and `presence_penalty` below 0: here they are
0 to 2.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mistral_nb.errors import InvalidRequest
from mistral_nb.server.answering import Ask
from mistral_nb.server.openai_answers import ChatShape, CompletionShape, Head
from mistral_nb.server.schemas import parse_json, shortened
from mistral_nb.types import FIELDS, Function, GenerationRequest, Message

__all__ = ["parse_chat", "parse_completion"]

_AS_THEY_ARE = tuple(field.name for field in FIELDS if field.name not in ("prompt", "messages", "raw", "functions"))
_HARMLESS = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
)
_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "echo": False,
    "suffix": "",
}
"""Fields that are taken with the one value that asks for nothing."""

_OTHER_NAMES = {"max_completion_tokens": "max_tokens", "repeat_penalty": "repetition_penalty"}
"""OpenAI's newer name, and llama.cpp's."""

_LARGEST_SEED = next(int(field.maximum or 0) for field in FIELDS if field.name == "seed")

_CHAT = ("model", "messages", "stream_options", "tools", "tool_choice", "parallel_tool_calls")
_COMPLETION = ("model", "prompt", "stream_options")
_NO_ARGUMENTS = {"type": "object", "properties": {}}
_CHOICES = ("auto", "none", "required")


def parse_chat(body: bytes, model: str, request_id: str) -> Ask:
    """The conversation in a body; `model` is the one that answers. Raises as `schemas.parse_request` does."""
    data = _fields(body, _CHAT)
    functions = _functions(data.get("tools", []))
    messages = _messages(data.get("messages"))
    request = GenerationRequest(messages=messages, functions=functions or None, **_sampling(data))
    shape = ChatShape(Head(f"chatcmpl-{request_id}", model), _with_usage(data))
    choice = _choice(data.get("tool_choice", "auto"), functions)
    several = data.get("parallel_tool_calls", True)
    if not isinstance(several, bool):
        raise InvalidRequest("parallel_tool_calls", several, "must be true or false")
    return Ask(request, shape, choice, _model(data), single=not several)


def parse_completion(body: bytes, model: str, request_id: str) -> Ask:
    """The bare prompt in a body, which goes to the model without a template."""
    data = _fields(body, _COMPLETION)
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt", prompt, "must be one text; send one request for each prompt")
    request = GenerationRequest(prompt=prompt, raw=True, **_sampling(data))
    return Ask(request, CompletionShape(Head(f"cmpl-{request_id}", model), _with_usage(data)), model=_model(data))


def _fields(body: bytes, known: Sequence[str]) -> dict[str, Any]:
    """What the body says, without nulls and without what asks for nothing."""
    data = parse_json(body)
    if not isinstance(data, dict):
        raise InvalidRequest("body", type(data).__name__, "must be a JSON object")
    given = {name: value for name, value in data.items() if value is not None and name not in _HARMLESS}
    taken = (*known, *_AS_THEY_ARE, *_OTHER_NAMES)
    for name, value in given.items():
        if name in _NEUTRAL:
            neutral = _NEUTRAL[name]
            if type(value) is not type(neutral) or value != neutral:
                raise InvalidRequest(name, value, f"must be {json.dumps(neutral)} here, or be left out")
        elif name not in taken:
            near = difflib.get_close_matches(shortened(name), taken, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out"
            raise InvalidRequest(name, value, f"is not supported here; {hint}")
    return {name: value for name, value in given.items() if name not in _NEUTRAL}


def _sampling(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: data[name] for name in _AS_THEY_ARE if name in data}
    for other, name in _OTHER_NAMES.items():
        if other in data and fields.setdefault(name, data[other]) != data[other]:
            raise InvalidRequest(name, data[name], f"is not {other}; leave one of them out")
    if fields.get("stop") == []:
        del fields["stop"]
    seed = fields.get("seed")
    if isinstance(seed, int) and not isinstance(seed, bool):
        fields["seed"] = (seed - 1) % _LARGEST_SEED + 1
    return {"stream": False, **fields}


def _model(data: Mapping[str, Any]) -> str | None:
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidRequest("model", model, "must be a text; leave it out for the model that is held")
    return model


def _with_usage(data: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with the usage."""
    options = data.get("stream_options", {})
    if not isinstance(options, dict) or not set(options) <= {"include_usage", "include_obfuscation"}:
        raise InvalidRequest("stream_options", options, "must be an object with include_usage")
    wanted = options.get("include_usage", False)
    if not isinstance(wanted, bool):
        raise InvalidRequest("stream_options", options, "include_usage must be true or false")
    return wanted


def _functions(tools: Any) -> tuple[Function, ...]:
    """Tools as the engine's functions, each with its description and parameters as JSON."""
    if not isinstance(tools, list):
        raise InvalidRequest("tools", tools, "must be a list")
    return tuple(_function(f"tools[{index}]", tool) for index, tool in enumerate(tools))


def _function(where: str, tool: Any) -> Function:
    told = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    if not isinstance(told, dict) or not isinstance(told.get("name"), str):
        raise InvalidRequest(where, tool, 'must read {"type": "function", "function": {"name", "parameters", ...}}')
    unknown = set(told) - {"name", "description", "parameters", "strict"}
    if unknown:
        raise InvalidRequest(where, sorted(unknown), "function holds only name, description, parameters and strict")
    code = {"parameters": _NO_ARGUMENTS}
    code |= {key: told[key] for key in ("description", "parameters") if told.get(key) is not None}
    return Function(told["name"], _as_text(where, code))


def _choice(choice: Any, functions: Sequence[Function]) -> str:
    """`auto`, `none`, `required`, or the name of the function that must be called."""
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict):
        choice = choice["function"].get("name")
        if choice not in [function.name for function in functions]:
            raise InvalidRequest("tool_choice", choice, "is none of the tools; name one of them")
        if choice in _CHOICES:
            raise InvalidRequest("tool_choice", choice, "is a choice of its own; give the function another name")
    elif choice not in _CHOICES:
        raise InvalidRequest("tool_choice", choice, f"must be one of {', '.join(_CHOICES)}, or name a function")
    if choice == "required" and not functions:
        raise InvalidRequest("tool_choice", choice, "needs tools; add them or leave it out")
    assert isinstance(choice, str)
    return choice


def _messages(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise InvalidRequest("messages", turns, "must be a list with at least one entry")
    names: dict[str, str] = {}
    return tuple(_message(f"messages[{index}]", turn, names) for index, turn in enumerate(turns))


def _message(where: str, turn: Any, names: dict[str, str]) -> Message:
    """One turn. `names` tells which function each call so far was for, by the call's id; it grows."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise InvalidRequest(where, turn, "must be an object with role and content")
    given = {key: value for key, value in turn.items() if value is not None and value != []}
    role = "system" if given["role"] == "developer" else given["role"]
    content = _content(where, given.get("content", ""))
    known = {"role", "content", "name"} | {"assistant": {"tool_calls"}, "tool": {"tool_call_id"}}.get(role, set())
    if unknown := sorted(set(given) - known):
        raise InvalidRequest(where, unknown, f"a turn of the {role} holds only {', '.join(sorted(known))}")
    if role == "tool":
        call = given.get("tool_call_id")
        if not isinstance(call, str) or call not in names:
            raise InvalidRequest(where, call, "tool_call_id must be that of a call in a turn before")
        return Message(role, content, name=names[call])
    if "tool_calls" in given:
        calls = _past_calls(where, given["tool_calls"], names)
        return Message(role, f"{content}\n{calls}" if content else calls)
    return Message(role, content, name=given.get("name"))


def _content(where: str, content: Any) -> str:
    """The text of a turn, whose parts are lines."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(where, part, 'content must be a text, or parts that read {"type": "text", "text"}')
    return "\n".join(part["text"] for part in parts)


def _past_calls(where: str, calls: Any, names: dict[str, str]) -> str:
    """Calls that the model made before, in the form in which it is shown them: JSON, [{name, arguments}]."""
    shown = []
    for call in calls if isinstance(calls, list) else [calls]:
        told = call.get("function") if isinstance(call, dict) and isinstance(call.get("id"), str) else None
        if not isinstance(told, dict) or not isinstance(told.get("name"), str):
            form = 'must read {"id", "type": "function", "function": {"name", "arguments"}}'
            raise InvalidRequest(f"{where}.tool_calls", call, form)
        try:
            arguments = json.loads(told["arguments"] or "{}")
        except (KeyError, TypeError, ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequest(f"{where}.tool_calls", call, "arguments must be a JSON object in a text")
        names[call["id"]] = told["name"]
        shown.append({"name": told["name"], "arguments": arguments})
    return _as_text(f"{where}.tool_calls", shown)


def _as_text(where: str, value: Any) -> str:
    """`value` as JSON, which not everything can be written as that was read."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        raise InvalidRequest(
            where, type(value).__name__, "holds a number that is not finite, or too deep a nesting"
        ) from None
