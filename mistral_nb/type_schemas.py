"""The JSON schema of what a type takes: int, list[str], Literal, Optional, Enum, dataclasses, TypedDict and so on."""

from __future__ import annotations

import enum
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mistral_nb.annotations import OF_JSON, fields_of, places_of, said, underlying

__all__ = ["object_schema", "schema_of"]

_SIMPLE: dict[Any, str] = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}
_ARRAYS = (list, tuple, set, frozenset, Sequence, Iterable)
_OBJECTS = (dict, Mapping)


def schema_of(hint: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The schema of `hint`, which stands within the types `within`; empty where every value may do."""
    plain = underlying(hint)
    if plain is not hint:
        if hint in within:
            return {}
        within, hint = (*within, hint), plain
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        notes = [note for note in inner[1:] if isinstance(note, str)]
        return {**schema_of(inner[0], within), **({"description": notes[0]} if notes else {})}
    if origin in (typing.Union, types.UnionType):
        return _any_of([schema_of(each, within) for each in inner])
    if origin is typing.Literal:
        choices = [said(each) for each in inner]
        return {"enum": choices} if all(type(each) in OF_JSON for each in choices) else {}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [said(each) for each in hint]}
    if fields := fields_of(hint):
        inside = (*within, fields.kind)
        return {} if fields.kind in within else object_schema(fields.hints, fields.required, within=inside)
    base = hint if origin is None else origin
    places = places_of(hint)
    if places is not None:
        items = [schema_of(each, within) for each in places]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items), "maxItems": len(items)}
    if any(base is each for each in _ARRAYS):
        return {"type": "array", **({"items": schema_of(inner[0], within)} if inner else {})}
    if any(base is each for each in _OBJECTS):
        return {"type": "object", **({"additionalProperties": schema_of(inner[1], within)} if len(inner) == 2 else {})}
    return {"type": _SIMPLE[base]} if isinstance(base, type) and base in _SIMPLE else {}


def object_schema(
    hints: Mapping[str, Any],
    required: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
    others: dict[str, Any] | bool = False,
    within: tuple[Any, ...] = (),
) -> dict[str, Any]:
    """The schema of an object with these entries; `others` is that of all further ones, False where there are none."""
    properties = {name: schema_of(hint, within) for name, hint in hints.items()}
    for name, default in (defaults or {}).items():
        properties[name]["default"] = default
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": others}


def _any_of(schemas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    choices = list({json.dumps(schema): schema for schema in schemas}.values())
    if {} in choices:
        return {}
    return choices[0] if len(choices) == 1 else {"anyOf": choices}
