"""Values from JSON against the annotations of Python functions: int, list[str], Literal, Enum, dataclasses and so on.

What an annotation does not say in these terms is not checked.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["Fields", "fields_of", "fitted", "underlying"]

_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Fields:
    """What a class of data is made from: the annotation of each field, and the fields that must be given."""

    hints: Mapping[str, Any]
    required: Sequence[str]


def underlying(hint: Any) -> Any:
    """The type under the names that an annotation gives it: `NewType`, `type X = ...`, `Required`."""
    while True:
        if isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":  # of Python 3.12
            hint = hint.__value__
        elif typing.get_origin(hint) in (typing.Required, typing.NotRequired):
            hint = typing.get_args(hint)[0]
        else:
            return types.NoneType if hint is None else hint


def fields_of(hint: Any) -> Fields | None:
    """The fields of a dataclass, a NamedTuple or a TypedDict; None for all else."""
    if typing.is_typeddict(hint):
        names, required = list(hint.__annotations__), hint.__required_keys__
    elif isinstance(hint, type) and (dataclasses.is_dataclass(hint) or hasattr(hint, "_field_defaults")):
        parameters = inspect.signature(hint).parameters
        names = list(parameters)
        required = {name for name, each in parameters.items() if each.default is each.empty}
    else:
        return None
    try:
        hints = typing.get_type_hints(hint, include_extras=True)
    except Exception:  # the user's own expressions may fail in any way; then the fields are not checked
        hints = {}
    return Fields({name: hints.get(name, Any) for name in names}, [name for name in names if name in required])


def fitted(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it: a whole number becomes a float, a name a member of an Enum.

    An object becomes the dataclass or the NamedTuple. Raises `TypeError` naming the argument `where` and what it must
    be.
    """
    hint = underlying(hint)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return fitted(value, inner[0], where)
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, inner, where)
    if origin is typing.Literal:
        # 1 == True, but they are not the same choice
        if any(value == choice and type(value) is type(choice) for choice in inner):
            return value
        raise TypeError(f"{where} must be one of {', '.join(map(repr, inner))}, not {value!r}")
    if hint is types.NoneType:
        return _expect(value, value is None, where, "null")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _member(value, hint, where)
    if fields := fields_of(hint):
        return _made(value, hint, fields, where)
    base = origin or hint
    if base is float:
        return _float(value, where)
    if base in (int, str, bool):
        return _expect(
            value, isinstance(value, base) and isinstance(value, bool) == (base is bool), where, _NAMES[base]
        )
    if base in (list, tuple, set, frozenset, Sequence, Iterable):
        return _items(value, base, inner, where)
    if base in (dict, Mapping):
        _expect(value, isinstance(value, dict), where, _NAMES[dict])
        return _entries(value, inner, where) if inner else value
    return value


def _expect(value: Any, holds: bool, where: str, what: str) -> Any:
    if not holds:
        shown = repr(value)
        raise TypeError(f"{where} must be {what}, not {shown if len(shown) <= 60 else shown[:59] + '…'}")
    return value


def _float(value: Any, where: str) -> float:
    _expect(value, isinstance(value, int | float) and not isinstance(value, bool), where, _NAMES[float])
    try:
        return float(value)
    except OverflowError:
        raise TypeError(f"{where} must be a number that a double holds, not one of so many digits") from None


def _any_of(value: Any, hints: Sequence[Any], where: str) -> Any:
    """The value as the first of `hints` that it fits; one that it fits as it is comes first."""
    fits: list[Any] = []
    problems: list[str] = []
    for hint in hints:
        try:
            fits.append(fitted(value, hint, where))
        except TypeError as error:
            problems.append(str(error))
    for each in fits:
        if type(each) is type(value):
            return each
    if fits:
        return fits[0]
    raise TypeError("; or ".join(problems))


def _member(value: Any, hint: type[enum.Enum], where: str) -> Any:
    """The member of an Enum with this value, or else with this name."""
    for member in hint:
        if member.value == value and type(member.value) is type(value):
            return member
    if isinstance(value, str) and value in hint.__members__:
        return hint[value]
    raise TypeError(f"{where} must be one of {', '.join(repr(member.value) for member in hint)}, not {value!r}")


def _made(value: Any, kind: Any, fields: Fields, where: str) -> Any:
    """A `kind` of an object's entries."""
    _expect(value, isinstance(value, dict), where, _NAMES[dict])
    missing = [name for name in fields.required if name not in value]
    unknown = [name for name in value if name not in fields.hints]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has no {', '.join(unknown)}"
        raise TypeError(f"{where} {problem}; it takes {', '.join(fields.hints)}")
    return kind(**{name: fitted(each, fields.hints[name], f"{where}.{name}") for name, each in value.items()})


def _entries(value: Mapping[str, Any], inner: Sequence[Any], where: str) -> dict[Any, Any]:
    """The entries of an object, its keys too: JSON's are texts, such as "1" where the annotation says int."""
    entries: dict[Any, Any] = {}
    for name, each in value.items():
        key = _key(name, inner[0], where)
        if key in entries:
            raise TypeError(f"{where} holds the key {key!r} twice")
        entries[key] = fitted(each, inner[1], f"{where}[{name!r}]")
    return entries


def _key(name: str, hint: Any, where: str) -> Any:
    """A key as `hint` wants it: the text itself, or what it says as JSON."""
    place = f"the key {name!r} of {where}"
    try:
        return fitted(name, hint, place)
    except TypeError:
        try:
            said = json.loads(name)
        except (ValueError, RecursionError):
            said = name
        return fitted(said, hint, place)


def _items(value: Any, base: Any, inner: Sequence[Any], where: str) -> Any:
    _expect(value, isinstance(value, list), where, _NAMES[list])
    if base is tuple and inner and inner[-1] is not Ellipsis:
        _expect(value, len(value) == len(inner), where, f"a list of {len(inner)}")
        hints: Sequence[Any] = inner
    else:
        hints = [inner[0] if inner else Any] * len(value)
    items = [
        fitted(each, hint, f"{where}[{index}]") for index, (each, hint) in enumerate(zip(value, hints, strict=True))
    ]
    return items if base in (list, Sequence, Iterable) else base(items)
