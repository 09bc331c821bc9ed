"""The arguments of a Python function as a JSON schema, read from its source, which is never run."""

from __future__ import annotations

import ast
import functools
import inspect
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Union

from mistral_nb.type_schemas import object_schema, schema_of

__all__ = ["described", "find_function"]

Definition = ast.FunctionDef | ast.AsyncFunctionDef

_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "None": None,
    "list": list,
    "List": list,
    "tuple": tuple,
    "Tuple": tuple,
    "set": set,
    "Set": set,
    "frozenset": frozenset,
    "Sequence": Sequence,
    "Iterable": Iterable,
    "dict": dict,
    "Dict": dict,
    "Mapping": Mapping,
}
_CONTAINERS = (list, set, frozenset, Sequence, Iterable, dict, Mapping)
_TOO_DEEP = (RecursionError, MemoryError)
_MAX_DEPTH = 20

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
    nested more than 20 times.
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
    schema = object_schema(
        {node.arg: _parameter_type(node, default) for node, default in parameters.items()},
        [node.arg for node, default in parameters.items() if default is None],
        {node.arg: value for node, default in parameters.items() for value in _literal(default)},
        schema_of(_type(signature.kwarg.annotation)) if signature.kwarg else False,
    )
    return inspect.cleandoc(ast.get_docstring(function) or ""), schema


def _parameter_type(node: ast.arg, default: ast.expr | None) -> Any:
    """The type of a parameter; one whose default is None takes None, whatever it says."""
    hint = _type(node.annotation)
    return _union([hint, None]) if _literal(default) == [None] else hint


def _literal(node: ast.expr | None) -> list[Any]:
    """The value of a literal that JSON has, alone in a list; nothing for anything else."""
    match node:
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
            return [-value]
        case ast.Constant(value) if value is None or isinstance(value, str | int | float):
            return [value]
    return []


def _type(node: ast.expr | None, depth: int = _MAX_DEPTH) -> Any:
    """The type that an annotation names, put together without running anything; `Any` for one that is not known.

    Raises `RecursionError` for one with more than `depth` others within each other.
    """
    if depth < 0:
        raise RecursionError
    inner = functools.partial(_type, depth=depth - 1)
    match node:
        case ast.Constant(str(text)):
            try:
                body = _parsed(text).body
            except (SyntaxError, ValueError):
                return Any
            return inner(body[0].value) if len(body) == 1 and isinstance(body[0], ast.Expr) else Any
        case ast.Constant(None):
            return None
        case ast.BinOp(_, ast.BitOr(), _):
            return _union(map(inner, _choices(node)))
        case ast.Subscript(origin, index):
            return _generic(_name(origin), index.elts if isinstance(index, ast.Tuple) else [index], inner)
        case ast.Name() | ast.Attribute():
            return _TYPES.get(_name(node), Any)
    return Any


def _choices(node: ast.expr) -> list[ast.expr]:
    """What stands between the bars of `a | b | c`."""
    found = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        found.append(node.right)
        node = node.left
    return [node, *reversed(found)]


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _generic(name: str, arguments: list[ast.expr], inner: Callable[[ast.expr], Any]) -> Any:
    kind = _TYPES.get(name, Any)
    if not arguments:
        return tuple[()] if kind is tuple else kind
    values = [value for node in arguments for value in _literal(node)]
    match name:
        case "Optional":
            return _union([inner(arguments[0]), None])
        case "Union":
            return _union(map(inner, arguments))
        case "Literal":
            return Literal[tuple(values)] if len(values) == len(arguments) else Any
        case "Annotated":
            notes = [value for node in arguments[1:] for value in _literal(node) if isinstance(value, str)]
            return Annotated[inner(arguments[0]), notes[0]] if notes else inner(arguments[0])
        case "tuple" | "Tuple":
            endless = isinstance(arguments[-1], ast.Constant) and arguments[-1].value is Ellipsis
            return types.GenericAlias(tuple, (inner(arguments[0]), ...) if endless else tuple(map(inner, arguments)))
    return types.GenericAlias(kind, tuple(map(inner, arguments))) if kind in _CONTAINERS else Any


def _union(hints: Iterable[Any]) -> Any:
    return Union[tuple(hints)]  # noqa: UP007
