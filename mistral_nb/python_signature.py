"""The arguments of a Python function as a JSON schema, read from its source, which is never run."""

from __future__ import annotations

import ast
import inspect
import threading
import warnings
from typing import Any

__all__ = ["described", "find_function"]

Definition = ast.FunctionDef | ast.AsyncFunctionDef

_SIMPLE: dict[str, dict[str, Any]] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "bool": {"type": "boolean"},
    "None": {"type": "null"},
    "list": {"type": "array"},
    "tuple": {"type": "array"},
    "set": {"type": "array"},
    "Sequence": {"type": "array"},
    "Iterable": {"type": "array"},
    "dict": {"type": "object"},
    "Mapping": {"type": "object"},
}
_OTHER_NAMES = {"List": "list", "Tuple": "tuple", "Set": "set", "frozenset": "set", "Dict": "dict"}
_TOO_DEEP = (RecursionError, MemoryError)

_parsing = threading.Lock()


def find_function(source: str, name: str) -> Definition | None:
    """The function `name` that `source` defines at its top, else the only one there.

    None where the source is no Python or defines no function. Raises `LookupError` where it defines several, none of
    them by that name, and `ValueError` where it is nested too deeply to be read.
    """
    try:
        tree = _parsed(source)
    except _TOO_DEEP as error:
        raise ValueError("is nested too deeply to be read; shorten it") from error
    except (SyntaxError, ValueError):  # ValueError: a null byte, before Python 3.12
        return None
    found = [node for node in tree.body if isinstance(node, Definition)]
    named = [node for node in found if node.name == name]
    if not named and len(found) > 1:
        raise LookupError(f"defines {', '.join(node.name for node in found)}, but not {name!r}; send that function's")
    candidates = named or found
    return candidates[-1] if candidates else None


def described(function: Definition) -> tuple[str, dict[str, Any]]:
    """The docstring and the JSON schema of the arguments.

    Annotations give the types: the built-in ones, `list[T]`, `dict[str, T]`, `Optional`, unions, `Literal` and
    `Annotated` with a text. Any other, and none at all, takes every JSON value. Parameters without a default are
    required; `*args` is left out, `**kwargs` allows further arguments. Raises `ValueError` where an annotation is
    nested too deeply.
    """
    try:
        return _described(function)
    except _TOO_DEEP as error:
        raise ValueError("has an annotation that is nested too deeply to be read; shorten it") from error


def _parsed(source: str) -> ast.Module:
    """The filters of warnings are the process's: an escape such as "\\d" in a docstring must not print in its log."""
    with _parsing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source, filename="<functions>")


def _described(function: Definition) -> tuple[str, dict[str, Any]]:
    signature = function.args
    positional = [*signature.posonlyargs, *signature.args]
    defaults = [*[None] * (len(positional) - len(signature.defaults)), *signature.defaults]
    parameters = dict(zip(positional, defaults, strict=True))
    parameters |= zip(signature.kwonlyargs, signature.kw_defaults, strict=True)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {node.arg: _property(node.annotation, default) for node, default in parameters.items()},
        "required": [node.arg for node, default in parameters.items() if default is None],
        "additionalProperties": _schema(signature.kwarg.annotation) if signature.kwarg else False,
    }
    return inspect.cleandoc(ast.get_docstring(function) or ""), schema


def _property(annotation: ast.expr | None, default: ast.expr | None) -> dict[str, Any]:
    schema = _schema(annotation)
    values = _literal(default)
    return {**schema, "default": values[0]} if values else schema


def _literal(node: ast.expr | None) -> list[Any]:
    """The value of a literal that JSON has, alone in a list; nothing for anything else."""
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return [-value]
        case ast.Constant(value) if value is None or isinstance(value, str | int | float):
            return [value]
    return []


def _schema(node: ast.expr | None) -> dict[str, Any]:
    """The JSON schema of what an annotation names."""
    match node:
        case ast.Constant(str(text)):
            try:
                body = _parsed(text).body
            except (SyntaxError, ValueError):
                return {}
            return _schema(body[0].value) if len(body) == 1 and isinstance(body[0], ast.Expr) else {}
        case ast.Constant(None):
            return _SIMPLE["None"]
        case ast.BinOp(left, ast.BitOr(), right):
            return _any_of([left, right])
        case ast.Subscript(origin, index):
            return _generic(_name(origin), index.elts if isinstance(index, ast.Tuple) else [index])
        case ast.Name() | ast.Attribute():
            return dict(_SIMPLE.get(_name(node), {}))
    return {}


def _name(node: ast.expr) -> str:
    last = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return _OTHER_NAMES.get(last, last)


def _generic(name: str, arguments: list[ast.expr]) -> dict[str, Any]:
    if not arguments:
        return dict(_SIMPLE.get(name, {}))
    match name:
        case "Optional":
            return _any_of([*arguments, ast.Constant(None)])
        case "Union":
            return _any_of(arguments)
        case "Literal":
            return _enum(arguments)
        case "Annotated":
            notes = [value for node in arguments[1:] for value in _literal(node) if isinstance(value, str)]
            schema = _schema(arguments[0])
            return {**schema, "description": notes[0]} if notes else schema
        case "list" | "set" | "Sequence" | "Iterable":
            return {"type": "array", "items": _schema(arguments[0])}
        case "tuple":
            return _tuple(arguments)
        case "dict" | "Mapping":
            return {"type": "object", "additionalProperties": _schema(arguments[-1])}
    return {}


def _any_of(nodes: list[ast.expr]) -> dict[str, Any]:
    choices: list[dict[str, Any]] = []
    for node in nodes:
        schema = _schema(node)
        if not schema:
            return {}
        inner = schema["anyOf"] if schema.keys() == {"anyOf"} else [schema]
        choices += [choice for choice in inner if choice not in choices]
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _enum(nodes: list[ast.expr]) -> dict[str, Any]:
    values = [value for node in nodes for value in _literal(node)]
    return {"enum": values} if len(values) == len(nodes) else {}


def _tuple(arguments: list[ast.expr]) -> dict[str, Any]:
    if isinstance(arguments[-1], ast.Constant) and arguments[-1].value is Ellipsis:
        return {"type": "array", "items": _schema(arguments[0])}
    items = [_schema(argument) for argument in arguments]
    return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items), "maxItems": len(items)}
