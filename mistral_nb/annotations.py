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

__all__ = ["OF_JSON", "Fields", "fields_of", "fitted", "places_of", "said", "underlying"]

OF_JSON = (str, int, float, bool, types.NoneType)

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
    """What a class of data is made from: the class, the annotation of each field, and the fields that must be given."""

    kind: Any
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


def said(choice: Any) -> Any:
    """How JSON says one of some choices: a member of an Enum by its value, or by its name where JSON has no such value.

    Any other choice as it is.
    """
    if isinstance(choice, enum.Enum):
        return choice.value if type(choice.value) in OF_JSON else choice.name
    return choice


def fields_of(hint: Any) -> Fields | None:
    """The fields of a dataclass, a NamedTuple or a TypedDict, generic ones too; None for all else."""
    kind = typing.get_origin(hint) or hint
    if typing.is_typeddict(kind):
        names, required = list(kind.__annotations__), kind.__required_keys__
    elif isinstance(kind, type) and (dataclasses.is_dataclass(kind) or hasattr(kind, "_field_defaults")):
        parameters = inspect.signature(kind).parameters
        names = list(parameters)
        required = {name for name, each in parameters.items() if each.default is each.empty}
    else:
        return None
    try:
        known = dict(zip(getattr(kind, "__parameters__", ()), typing.get_args(hint), strict=False))
        plain = typing.get_type_hints(kind, include_extras=True)
        hints = {name: _substituted(each, known) for name, each in plain.items()}
    except Exception:  # the user's own expressions may fail in any way; then the fields are not checked
        hints = {}
    return Fields(kind, {name: hints.get(name, Any) for name in names}, [name for name in names if name in required])


def places_of(hint: Any) -> tuple[Any, ...] | None:
    """The types of a tuple of a fixed length, one for each place; None for all else."""
    inner = typing.get_args(hint)
    fixed = typing.get_origin(hint) is tuple and hint is not typing.Tuple and inner[-1:] != (Ellipsis,)  # noqa: UP006
    return inner if fixed else None


def _substituted(hint: Any, known: Mapping[Any, Any]) -> Any:
    """The annotation of a generic class's field with the types that `known` gives for its variables."""
    if isinstance(hint, typing.TypeVar):
        return known.get(hint, Any)
    variables = getattr(hint, "__parameters__", ()) if typing.get_origin(hint) else ()
    return hint[tuple(known.get(each, Any) for each in variables)] if variables else hint


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
        return _chosen(value, inner, where)
    if hint is types.NoneType:
        return _expect(value, value is None, where, "null")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _chosen(value, list(hint), where)
    if fields := fields_of(hint):
        return _made(value, fields, where)
    base = origin or hint
    if base is float:
        return _float(value, where)
    if base in (int, str, bool):
        return _expect(
            value, isinstance(value, base) and isinstance(value, bool) == (base is bool), where, _NAMES[base]
        )
    if base in (list, tuple, set, frozenset, Sequence, Iterable):
        return _items(value, hint, where)
    if base in (dict, Mapping):
        _expect(value, isinstance(value, dict), where, _NAMES[dict])
        return _entries(value, inner, where) if len(inner) == 2 else value
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
    """The value as the first of `hints` that it fits.

    One that makes a class of the user's of it comes before the others, and then one that it fits as it is.
    """
    fits: list[Any] = []
    problems: list[str] = []
    for hint in hints:
        try:
            fits.append(fitted(value, hint, where))
        except TypeError as error:
            problems.append(str(error))
    if fits:
        return max(fits, key=lambda fit: (type(fit).__module__ != "builtins", type(fit) is type(value)))
    raise TypeError("; or ".join(problems))


def _chosen(value: Any, choices: Sequence[Any], where: str) -> Any:
    """The choice that is the value; of an Enum's members the one with this value, or else with this name."""
    for each in choices:
        plain = each.value if isinstance(each, enum.Enum) else each
        if plain == value and type(plain) is type(value):  # 1 == True, but they are not the same choice
            return each
    for each in choices:
        if isinstance(each, enum.Enum) and isinstance(value, str) and type(each).__members__.get(value) is each:
            return each
    told = ", ".join(repr(said(each)) for each in choices)
    raise TypeError(f"{where} must be one of {told}, not {value!r}")


def _made(value: Any, fields: Fields, where: str) -> Any:
    """An object of the class, of an object's entries."""
    _expect(value, isinstance(value, dict), where, _NAMES[dict])
    missing = [name for name in fields.required if name not in value]
    unknown = [name for name in value if name not in fields.hints]
    if missing or unknown:
        problem = f"lacks {', '.join(missing)}" if missing else f"has no {', '.join(unknown)}"
        raise TypeError(f"{where} {problem}; it takes {', '.join(fields.hints)}")
    return fields.kind(**{name: fitted(each, fields.hints[name], f"{where}.{name}") for name, each in value.items()})


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


def _items(value: Any, hint: Any, where: str) -> Any:
    base, inner, places = typing.get_origin(hint) or hint, typing.get_args(hint), places_of(hint)
    _expect(value, isinstance(value, list), where, _NAMES[list])
    if places is not None:
        _expect(value, len(value) == len(places), where, f"a list of {len(places)}")
    hints = places if places is not None else [inner[0] if inner else Any] * len(value)
    items = [
        fitted(each, hint, f"{where}[{index}]") for index, (each, hint) in enumerate(zip(value, hints, strict=True))
    ]
    return items if base in (list, Sequence, Iterable) else base(items)
