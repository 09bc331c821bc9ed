"""The user's Python functions: the code by which a model is told of them, and arguments checked for a call."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from mistral_nb.annotations import fitted
from mistral_nb.errors import InvalidRequest
from mistral_nb.python_signature import find_function

__all__ = ["bound", "code_of", "name_of"]

_MAX_DOC = 2000
_MAX_BITS = 64
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
    """The function's source where its signature can be read back from it; else the signature and docstring as a `def`.

    `InvalidRequest` where neither tells the parameters.
    """
    cause: Exception | None = None
    try:
        signature = inspect.signature(function)
        code = _source(function)
        if not _tells(code, name, signature):
            code = _stub(name, signature, inspect.getdoc(function) or "")
        if _tells(code, name, signature):
            return code
    except (TypeError, ValueError, NameError) as error:
        cause = error
    raise InvalidRequest("functions", name, "does not tell its parameters; wrap it into a def of your own") from cause


def bound(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as the function takes them. `TypeError` says which one is missing, unknown, or of another type."""
    parameters = inspect.signature(function).parameters.values()
    hints = _hints(function, {each.name: each.annotation for each in parameters})
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


def _stub(name: str, signature: inspect.Signature, told: str) -> str:
    """A `def` by `signature`: annotations as texts, which always parse; defaults that are no literals as `Ellipsis`."""
    parameters = [
        each.replace(
            annotation=_as_text(each.annotation),
            default=each.default if each.default is each.empty or _is_literal(each.default) else ...,
        )
        for each in signature.parameters.values()
    ]
    plain = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return f"def {name}{plain}:\n    {told[:_MAX_DOC]!r}\n"


def _is_literal(value: Any) -> bool:
    return type(value) in _LITERALS and not (isinstance(value, int) and value.bit_length() > _MAX_BITS)


def _as_text(annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return annotation
    return inspect.formatannotation(annotation)


def _tells(code: str, name: str, signature: inspect.Signature) -> bool:
    """Whether `code` defines a function of just these parameters for those who read it."""
    try:
        found = find_function(code, name)
    except (LookupError, ValueError):
        return False
    if found is None:
        return False
    read = [each.arg for each in (*found.args.posonlyargs, *found.args.args, *found.args.kwonlyargs)]
    return read == [each.name for each in signature.parameters.values() if each.kind not in _VARIADIC]


def _hints(function: Callable[..., Any], annotations: Mapping[str, Any]) -> dict[str, Any]:
    """The annotations as types, `Any` where there is none and where one cannot be resolved."""
    plain: Any = inspect.unwrap(function)
    if not inspect.isroutine(plain):
        plain = inspect.unwrap(type(plain).__call__)
    names = {each.__name__: each for each in getattr(plain, "__type_params__", ())}
    return {name: _resolved(each, getattr(plain, "__globals__", {}), names) for name, each in annotations.items()}


def _resolved(annotation: Any, module: dict[str, Any], names: Mapping[str, Any]) -> Any:
    """An annotation is a text under `from __future__ import annotations`, and a text in a text where it is quoted."""
    hint = Any if annotation is inspect.Parameter.empty else annotation
    for _ in range(2):
        if isinstance(hint, str):
            try:
                hint = eval(hint, module, names)
            except Exception:  # the user's own expression may fail in any way; then its parameter is not checked
                return Any
    return hint
