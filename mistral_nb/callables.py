"""The user's Python functions: the code by which a model is told of them, and arguments checked for a call."""

from __future__ import annotations

import functools
import inspect
import json
import math
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mistral_nb.annotations import fitted
from mistral_nb.errors import InvalidRequest
from mistral_nb.python_signature import described, find_function
from mistral_nb.type_schemas import object_schema, schema_of

__all__ = ["bound", "code_of", "name_of"]

_MAX_DOC = 2000
_MAX_BITS = 64
"""Of a default that is told: JSON's readers do not take a number of any length."""
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_LITERALS = (bool, int, float, str, type(None))


def name_of(function: Any) -> str:
    """The name that a model calls. `InvalidRequest` for what is no function, a class, a partial, or nameless."""
    if not callable(function):
        raise InvalidRequest("functions", function, "is no function; define one with def")
    for kind, what in ((type, "a class"), (functools.partial, "a partial")):
        if isinstance(function, kind):
            name = getattr(function, "__name__", "functools.partial")
            raise InvalidRequest("functions", name, f"is {what}; define a function with def that calls it")
    name = getattr(function, "__name__", None) or type(function).__name__
    if not str(name).isidentifier():
        raise InvalidRequest("functions", name, "has no name of its own; define it with def")
    return str(name)


def code_of(name: str, function: Callable[..., Any]) -> str:
    """The function's source where that alone tells of its arguments all that is known; else the JSON that does.

    `InvalidRequest` where nothing tells the parameters.
    """
    try:
        parameters = _schema(function)
        told = {"description": (inspect.getdoc(function) or "")[:_MAX_DOC], "parameters": parameters}
        code = json.dumps(told, ensure_ascii=False)
    except (TypeError, ValueError, NameError, RecursionError) as error:
        problem = "does not tell its parameters; wrap it into a def of your own"
        raise InvalidRequest("functions", name, problem) from error
    source = _source(function)
    return source if _reads_as(source, name, parameters) else code


def bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as the function takes them. `TypeError` says which one is missing, unknown, or of another type."""
    parameters = inspect.signature(function).parameters.values()
    hints = _hints(function, parameters)
    extras = [hints[each.name] for each in parameters if each.kind is each.VAR_KEYWORD]
    named = [each for each in parameters if each.kind not in _VARIADIC]
    names = [each.name for each in named]
    unknown = [name for name in arguments if not extras and name not in names]
    missing = [each.name for each in named if each.default is each.empty and each.name not in arguments]
    if missing or unknown:
        problems = [f"missing: {', '.join(missing)}"] if missing else []
        problems += [f"unknown: {', '.join(unknown)}"] if unknown else []
        raise TypeError(f"arguments {'; '.join(problems)}; it takes {', '.join(names) or 'none'}")
    checked = {
        name: fitted(value, hints[name] if name in names else extras[0], name) for name, value in arguments.items()
    }
    before = [checked.pop(each.name, each.default) for each in named if each.kind is each.POSITIONAL_ONLY]
    return before, checked


def _source(function: Callable[..., Any]) -> str:
    """The source of a plain function, at its left margin; empty for all else."""
    if not inspect.isfunction(function) or isinstance(inspect.unwrap(function), type):
        return ""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of the arguments."""
    parameters = inspect.signature(function).parameters.values()
    hints = _hints(function, parameters)
    others = [schema_of(hints[each.name]) for each in parameters if each.kind is each.VAR_KEYWORD]
    named = [each for each in parameters if each.kind not in _VARIADIC]
    return object_schema(
        {each.name: hints[each.name] for each in named},
        [each.name for each in named if each.default is each.empty],
        {each.name: each.default for each in named if _is_literal(each.default)},
        others[0] if others else False,
    )


def _is_literal(value: Any) -> bool:
    """Whether JSON can say it."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return False
    return type(value) in _LITERALS and not (isinstance(value, float) and not math.isfinite(value))


def _reads_as(source: str, name: str, parameters: Mapping[str, Any]) -> bool:
    """Whether those who read the source find these parameters."""
    try:
        found = find_function(source, name)
        return found is not None and described(found)[1] == parameters
    except (LookupError, ValueError):
        return False


def _hints(function: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> dict[str, Any]:
    """The annotations as types, `Any` where there is none and where one cannot be resolved."""
    plain: Any = inspect.unwrap(function)
    if not inspect.isroutine(plain):
        plain = inspect.unwrap(type(plain).__call__)
    names = {each.__name__: each for each in getattr(plain, "__type_params__", ())}
    return {each.name: _resolved(each, getattr(plain, "__globals__", {}), names) for each in parameters}


def _resolved(parameter: inspect.Parameter, module: dict[str, Any], names: dict[str, Any]) -> Any:
    """An annotation is a text under `from __future__ import annotations`, and so is what is quoted within it."""
    if parameter.annotation is parameter.empty:
        return Any

    def holder() -> None: ...

    holder.__annotations__ = {"it": parameter.annotation}
    try:
        hint = typing.get_type_hints(holder, module, names, include_extras=True)["it"]
        return typing.Optional[hint] if parameter.default is None else hint  # noqa: UP045
    except Exception:  # the user's own expression may fail in any way; then its parameter is not checked
        return Any
