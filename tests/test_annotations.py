"""The user's own types as annotations: told to a model as JSON schemas, and made from the JSON of its calls."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, NewType, TypedDict

import pytest

from mistral_nb.annotations import fitted
from mistral_nb.calling import CallRecord, Toolbox
from mistral_nb.functions import tools_of


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
        return {"at": [THERE], "kind": Unit.METRIC, "type": Place}

    told = json.loads(run(visit, {}).told)
    assert told["at"] == [{"lat": 1.0, "lon": 2.5, "unit": "ft", "tags": []}]
    assert (told["kind"], told["type"]) == ("m", str(Place))


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
