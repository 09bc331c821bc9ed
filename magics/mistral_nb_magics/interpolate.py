"""`{{name}}` in a prompt: the user's variables put into the user's text, once."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from IPython.core.error import UsageError

__all__ = ["holes", "interpolate", "lookup", "near_miss"]

_HOLE = re.compile(r"\{\{([^{}\n]+)\}\}")
_ESCAPE = "--no-interpolate leaves braces as they are"


def interpolate(text: str, namespace: Mapping[str, Any]) -> str:
    """`text` with each `{{name}}`, `{{name.attribute}}` and `{{name[0]}}` replaced by the str of its value.

    Done once: braces inside a value stay. Single braces and `$` are never touched. Raises `UsageError` naming what is
    unknown, or what is not a name, attribute or index.
    """
    return _HOLE.sub(lambda hole: _text(hole[1].strip(), namespace), text)


def holes(text: str) -> list[str]:
    """What `interpolate` replaces, as it stands there."""
    return [hole[0] for hole in _HOLE.finditer(text)]


def _text(expression: str, namespace: Mapping[str, Any]) -> str:
    value = lookup(expression, namespace)
    try:
        return str(value)
    except Exception as error:  # the value's own code
        raise _broken(expression, error) from error


def lookup(expression: str, namespace: Mapping[str, Any]) -> Any:
    """The value of a name with attributes and indexes. Nothing is called. Raises `UsageError`."""
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:
        _refuse(expression)
    return _value(tree, expression, namespace)


def near_miss(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known names closest to `name`, or nothing."""
    close = difflib.get_close_matches(name, sorted(known), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def _value(node: ast.expr, expression: str, namespace: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(name):
            if name not in namespace:
                known = (each for each in namespace if not each.startswith("_"))
                raise UsageError(f"{{{{{expression}}}}}: no variable {name!r}{near_miss(name, known)}; {_ESCAPE}")
            return namespace[name]
        case ast.Attribute(inner, name):
            owner = _value(inner, expression, namespace)
            try:
                return getattr(owner, name)
            except AttributeError:
                hint = near_miss(name, dir(owner))
                raise UsageError(f"{{{{{expression}}}}}: {_kind(owner)} has no attribute {name!r}{hint}") from None
            except Exception as error:  # the value's own code
                raise _broken(expression, error) from error
        case ast.Subscript(inner, index):
            return _item(_value(inner, expression, namespace), _index(index, expression), expression)
    _refuse(expression)


def _index(node: ast.expr, expression: str) -> int | str:
    match node:
        case ast.Constant(int() | str() as value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value))):
            return -value
    _refuse(expression)


def _item(owner: Any, index: int | str, expression: str) -> Any:
    try:
        return owner[index]
    except (LookupError, TypeError) as error:
        raise UsageError(
            f"{{{{{expression}}}}}: {_kind(owner)} has nothing at [{index!r}] ({type(error).__name__})"
        ) from None
    except Exception as error:  # the value's own code
        raise _broken(expression, error) from error


def _broken(expression: str, error: Exception) -> UsageError:
    return UsageError(f"{{{{{expression}}}}}: reading it raised {type(error).__name__}: {error}")


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"


def _refuse(expression: str) -> NoReturn:
    raise UsageError(
        f"{{{{{expression}}}}}: only a name with attributes and indexes, such as {{{{name}}}} or "
        f"{{{{table.columns[0]}}}}; compute anything else in a cell before. {_ESCAPE}"
    )
