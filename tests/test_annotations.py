"""The user's own types as annotations: told to a model as JSON schemas, and made from the JSON of its calls."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar

import pytest

from mistral_nb.annotations import fitted
from mistral_nb.calling import CallRecord, Toolbox
from mistral_nb.functions import tools_of
from mistral_nb.type_schemas import schema_of


class Unit(enum.Enum):
    METRIC = "m"
    IMPERIAL = "ft"


@dataclasses.dataclass
class Place:
    lat: float
    lon: float
    unit: Unit = Unit.METRIC
    tags: list[str] = dataclasses.field(default_factory=list)


class Span(NamedTuple):
    first: int
    last: int = 9


class Trip(TypedDict, total=False):
    places: list[Place]
    note: Annotated[str, "What for"]


@dataclasses.dataclass
class Tree:
    value: int
    below: "list[Tree]" = dataclasses.field(default_factory=list)  # noqa: UP037


class Size(enum.Enum):
    SMALL = (1, 2)
    LARGE = (3, 4)


T = TypeVar("T")


@dataclasses.dataclass
class Box(Generic[T]):
    item: T
    others: list[T] = dataclasses.field(default_factory=list)


Celsius = float
Key = NewType("Key", int)


def run(function: Callable[..., Any], arguments: Any) -> CallRecord:
    return Toolbox([function]).run({"name": function.__name__, "arguments": arguments})


PLACE = {
    "type": "object",
    "properties": {
        "lat": {"type": "number"},
        "lon": {"type": "number"},
        "unit": {"enum": ["m", "ft"]},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["lat", "lon"],
    "additionalProperties": False,
}
HERE = {"lat": 1, "lon": 2.5, "unit": "ft"}
THERE = Place(1.0, 2.5, Unit.IMPERIAL)
INTEGER, TEXT = {"type": "integer"}, {"type": "string"}


def closed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@pytest.mark.parametrize(
    ("hint", "schema", "value", "result"),
    [
        (Unit, {"enum": ["m", "ft"]}, "ft", Unit.IMPERIAL),
        (Place, PLACE, HERE, THERE),
        ("list[Place]", {"type": "array", "items": PLACE}, [HERE], [THERE]),
        (list["Place"], {"type": "array", "items": PLACE}, [HERE], [THERE]),
        (dict[str, Place], {"type": "object", "additionalProperties": PLACE}, {"ä": HERE}, {"ä": THERE}),
        (Place | None, {"anyOf": [PLACE, {"type": "null"}]}, HERE, THERE),
        (Span, closed({"first": INTEGER, "last": INTEGER}, ["first"]), {"first": 3}, Span(3, 9)),
        (
            Trip,
            closed({"places": {"type": "array", "items": PLACE}, "note": {**TEXT, "description": "What for"}}, []),
            {"places": [HERE]},
            {"places": [THERE]},
        ),
        (
            Tree,
            closed({"value": INTEGER, "below": {"type": "array", "items": {}}}, ["value"]),
            {"value": 1, "below": [{"value": 2}]},
            Tree(1, [Tree(2)]),
        ),
        (
            Box[int],
            closed({"item": INTEGER, "others": {"type": "array", "items": INTEGER}}, ["item"]),
            {"item": 1},
            Box(1),
        ),
        (Literal[Unit.METRIC, "x"], {"enum": ["m", "x"]}, "m", Unit.METRIC),
        (Literal[Unit.METRIC, Unit.IMPERIAL], {"enum": ["m", "ft"]}, "IMPERIAL", Unit.IMPERIAL),
        (Literal[Size.LARGE], {"enum": ["LARGE"]}, "LARGE", Size.LARGE),
        (tuple[()], {"type": "array", "prefixItems": [], "items": False, "minItems": 0, "maxItems": 0}, [], ()),
        (dict[str], {"type": "object"}, {"a": 1}, {"a": 1}),  # type: ignore[misc]
        (Celsius, {"type": "number"}, 20, 20.0),
        (Key, INTEGER, 1, 1),
    ],
)
def test_the_users_own_types_are_told_and_made(hint: Any, schema: dict[str, Any], value: Any, result: Any) -> None:
    def take(x: Any) -> Any:
        return x

    take.__annotations__ = {"x": hint}
    (tool,) = tools_of(Toolbox([take]).offered)
    assert tool.parameters == closed({"x": schema}, ["x"])
    record = run(take, {"x": value})
    assert (record.error, record.result) == ("", result)


@pytest.mark.parametrize(
    ("hint", "value", "problem"),
    [
        (Place, {"lat": 1}, "x lacks lon; it takes lat, lon, unit, tags"),
        (Place, {**HERE, "zoom": 1}, "x has no zoom; it takes lat, lon, unit, tags"),
        (list[Place], [{**HERE, "lat": "1"}], "x[0].lat must be a number, not '1'"),
        (Place, [1, 2], "x must be an object, not [1, 2]"),
        (Box[int], {"item": 1, "others": ["a"]}, "x.others[0] must be a whole number, not 'a'"),
        (Literal[Unit.METRIC, Size.LARGE], "ft", "x must be one of 'm', 'LARGE', not 'ft'"),
        (tuple[()], [1], "x must be a list of 0, not [1]"),
        (Trip, {"note": 1}, "x.note must be a text, not 1"),
        (Key, "1", "x must be a whole number, not '1'"),
    ],
)
def test_what_fits_none_of_the_users_own_types(hint: Any, value: Any, problem: str) -> None:
    with pytest.raises(TypeError, match=re.escape(problem)):
        fitted(value, hint, "x")


def test_a_parameter_whose_default_is_none_takes_null() -> None:
    def later(days: int = None) -> Any:  # type: ignore[assignment]  # noqa: RUF013
        return days

    offered = Toolbox([later]).offered
    assert offered[0].code.startswith("def later(")
    nullable = {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}
    assert tools_of(offered)[0].parameters["properties"] == {"days": nullable}
    assert run(later, {"days": None}).error == ""


def test_results_of_the_users_own_types_are_told_as_arguments_say_them() -> None:
    def visit() -> Any:
        return {"at": [THERE], "kind": Unit.METRIC, "size": Size.LARGE, "span": Span(1), "type": Place}

    told = json.loads(run(visit, {}).told)
    assert told["at"] == [{"lat": 1.0, "lon": 2.5, "unit": "ft", "tags": []}]
    assert (told["kind"], told["size"], told["type"]) == ("m", "LARGE", str(Place))
    assert told["span"] == {"first": 1, "last": 9}


def test_a_class_of_the_users_own_comes_before_the_bare_value() -> None:
    assert fitted(HERE, dict[str, Any] | Place, "x") == THERE
    assert fitted("ft", str | Unit, "x") is Unit.IMPERIAL
    assert fitted("else", Unit | str, "x") == "else"
    assert fitted({"a": 1}, Place | dict[str, int], "x") == {"a": 1}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the statement came with Python 3.12")
def test_an_alias_of_itself() -> None:
    names: dict[str, Any] = {}
    exec("type Nested = list[Nested] | int\ndef take(x: Nested): return x", names)
    (tool,) = tools_of(Toolbox([names["take"]]).offered)
    assert tool.parameters["properties"]["x"] == {"anyOf": [{"type": "array", "items": {}}, INTEGER]}
    assert run(names["take"], {"x": [1, [2]]}).result == [1, [2]]
    assert "x[1][0] must be a whole number, not 'a'" in run(names["take"], {"x": [1, ["a"]]}).error


SIMPLE: dict[str, list[Any]] = {
    "integer": [0, -1],
    "number": [1, -2.5],
    "string": ["", "ä"],
    "boolean": [True, False],
    "null": [None],
}


def admitted(schema: Mapping[str, Any]) -> Iterator[Any]:
    """Some values that a schema allows; none where it allows all."""
    if "enum" in schema:
        yield from schema["enum"]
    for choice in schema.get("anyOf", ()):
        yield from admitted(choice)
    yield from SIMPLE.get(schema.get("type", ""), [])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            yield [next(admitted(each)) for each in schema["prefixItems"]]
        else:
            yield from ([], list(admitted(schema.get("items") or {})))
    if schema.get("type") == "object":
        properties = {name: list(admitted(each)) for name, each in schema.get("properties", {}).items()}
        required = schema.get("required", ())
        yield {name: values[0] for name, values in properties.items() if name in required}
        yield {name: values[-1] for name, values in properties.items()}
        if further := schema.get("additionalProperties"):
            yield {f"key {index}": each for index, each in enumerate(admitted(further))}


@pytest.mark.parametrize(
    "hint",
    [
        *(int, float, str, bool, None, list, tuple, dict, Unit, Size, Place, Span, Trip, Tree, Box[Unit], Key),
        *(list[Unit], set[float], frozenset[str], Sequence[Place], tuple[()], tuple[int, ...], tuple[Unit, Place]),
        *(dict[str, Size], dict[str, list[Place]], Mapping[str, int | None], dict[str]),  # type: ignore[misc]
        *(Literal[1, True, "a", None], Literal[Unit.METRIC, Size.SMALL, "m"], Place | dict[str, int] | None),
        *(Unit | str, float | int, Annotated[list[Key] | Span, "Either"]),
    ],
    ids=str,
)
def test_what_the_schema_admits_fits(hint: Any) -> None:
    values = list(admitted(schema_of(hint)))
    assert values
    for value in values:
        fitted(value, hint, "x")


def test_types_that_are_not_alike_are_kept_apart() -> None:
    assert type(fitted(1, float | int, "x")) is int
    assert type(fitted(1, float, "x")) is float
    assert fitted([1, "a"], tuple[int, str], "x") == (1, "a")
    assert fitted({"a": 1}, dict[str, int], "x") == {"a": 1}
    assert fitted({"m": 1, "IMPERIAL": 2}, dict[Unit, int], "x") == {Unit.METRIC: 1, Unit.IMPERIAL: 2}
    with pytest.raises(TypeError, match=r"holds the key 1\.0 twice"):
        fitted({"1": 1, "1.0": 1}, dict[float, int], "x")
    for value, hint in ((True, Literal[1]), ("1", bool), ([1], tuple[int, int]), ({"a": "1"}, dict[str, int])):
        with pytest.raises(TypeError):
            fitted(value, hint, "x")
