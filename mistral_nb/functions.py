"""Functions offered to a model: what their `code` says about their arguments, and the calls that come back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from mistral_nb.errors import InvalidRequest
from mistral_nb.python_signature import described, find_function
from mistral_nb.types import Function

__all__ = ["Tool", "parse_calls", "tools_of"]

MAX_TOOLS = 128
MAX_CODE = 262_144
"""Characters of all functions' code together, which take Python half a second to read, and at worst some two."""

_NAME = re.compile(r"[\w.-]{1,64}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_COMPOSED = {"$ref", "additionalProperties", "allOf", "anyOf", "oneOf", "patternProperties"}
_AROUND_SCHEMA = {"description", "name", "parameters", "strict"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function as a model is told of it. `parameters` is the JSON schema of its arguments, which are an object."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}


def tools_of(functions: Sequence[Function]) -> tuple[Tool, ...]:
    """What each function's `code` says. It is read and never run. `InvalidRequest` names `functions[i]`.

    - JSON: `{"description", "parameters": SCHEMA}`, the same inside OpenAI's `{"type": "function", "function": ...}`,
      or the schema of the arguments alone. An object that lists `properties` and does not speak of others has none.
    - Python: the signature and the docstring of the `def` by that name, or of the only one.
    - Anything else, such as JavaScript: its arguments are any JSON object.

    Names are at most 64 letters, digits, `_`, `-` and `.`, each once. At most 128 functions, of 262144 characters.
    """
    if len(functions) > MAX_TOOLS:
        raise InvalidRequest("functions", f"{len(functions)} functions", f"holds at most {MAX_TOOLS}; leave some out")
    length = sum(len(function.code) for function in functions)
    if length > MAX_CODE:
        raise InvalidRequest(
            "functions", f"{length} characters", f"the code of all holds at most {MAX_CODE}; shorten it"
        )
    tools: list[Tool] = []
    for index, function in enumerate(functions):
        if not _NAME.fullmatch(function.name):
            _refuse(index, function.name, "a name is 1 to 64 letters, digits, '_', '-' and '.'; rename it")
        if any(tool.name == function.name for tool in tools):
            _refuse(index, function.name, "is the name of an earlier function too; rename one")
        tools.append(_tool(index, function))
    return tuple(tools)


def parse_calls(text: str) -> tuple[dict[str, Any], ...] | None:
    """The calls in a text that is a JSON list of `{"name", "arguments"}` and nothing else; None for any other text.

    A number that JSON cannot say again (over 4300 digits, or beyond a double) makes it another text, and so does an
    object with the same key twice, however it is spelled; half of a surrogate pair becomes U+FFFD.
    """
    try:
        calls = json.loads(text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_distinct)
        whole = _SURROGATE.sub("\ufffd", json.dumps(calls, ensure_ascii=False))
        calls = json.loads(whole, object_pairs_hook=_distinct)
    except (ValueError, RecursionError):
        return None
    if not isinstance(calls, list) or not calls:
        return None
    for call in calls:
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
    return tuple(calls)


def _refuse(index: int, value: Any, problem: str) -> NoReturn:
    raise InvalidRequest(f"functions[{index}]", value, problem)


def _tool(index: int, function: Function) -> Tool:
    if function.code.lstrip().startswith(("{", "[")):
        description, parameters = _from_json(index, function)
    else:
        description, parameters = _from_source(index, function)
    tool = Tool(function.name, description, parameters)
    try:
        json.dumps(tool.to_dict(), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        _refuse(index, function.name, "holds a lone surrogate, a number that is not finite, or too deep a nesting")
    return tool


def _from_source(index: int, function: Function) -> tuple[str, Mapping[str, Any]]:
    try:
        definition = find_function(function.code, function.name)
        return ("", _ANY_OBJECT) if definition is None else described(definition)
    except (LookupError, ValueError) as error:
        _refuse(index, function.name, f"its code {error.args[0]}")


def _from_json(index: int, function: Function) -> tuple[str, Mapping[str, Any]]:
    try:
        data = json.loads(function.code)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        _refuse(index, function.name, f"its code begins as JSON and is none ({error.msg} at {at}); correct it")
    except (ValueError, RecursionError):
        _refuse(index, function.name, "its code is nested too deeply or holds a number with too many digits")
    if isinstance(data, dict) and data.get("type") == "function" and isinstance(data.get("function"), dict):
        data = data["function"]
    if not isinstance(data, dict):
        _refuse(index, function.name, "its code is a JSON list; send a JSON schema, which is an object")
    if "parameters" not in data and (not data or data.keys() - _AROUND_SCHEMA):
        return _text(index, function, data.get("description")), _closed(index, function, data)
    parameters = data.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    return _text(index, function, data.get("description")), _closed(index, function, parameters)


def _text(index: int, function: Function, description: Any) -> str:
    if not isinstance(description, str | None):
        _refuse(index, function.name, "its description must be a text")
    return description or ""


def _closed(index: int, function: Function, schema: Any) -> Mapping[str, Any]:
    """The schema of an object, whose properties are all that it has unless it says otherwise."""
    if not isinstance(schema, dict):
        _refuse(index, function.name, "its parameters must be a JSON schema, which is an object")
    if schema.get("type", "object") != "object":
        _refuse(index, function.name, f"the arguments are an object, so its schema's type is not {schema['type']!r}")
    if "properties" in schema and not _COMPOSED & schema.keys():
        schema = {**schema, "additionalProperties": False}
    return {"type": "object", **schema}


def _finite(number: str) -> float:
    value = float(number)
    if value in (float("inf"), float("-inf")) or value != value:
        raise ValueError(f"{number} is no number that JSON has")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found
