"""Calls from a model on the user's own functions: offered, checked, run, and told."""

from __future__ import annotations

import asyncio
import enum
import inspect
import json
import math
import signal
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import pytest

from mistral_nb.calling import MAX_ARGUMENTS, MAX_RESULT, MAX_SHOWN, CallRecord, Toolbox
from mistral_nb.errors import InvalidRequest
from mistral_nb.functions import tools_of


class Unit(enum.Enum):
    METRIC = "m"
    IMPERIAL = "ft"


def add(a: int, b: int = 2) -> int:
    """Adds."""
    return a + b


def measure(length: float, unit: Unit, tags: list[str] | None = None, kind: Literal["x", "y"] = "x") -> Any:
    return [length, unit, tags, kind]


def positional(a: int, /, b: int, *, c: int = 3) -> tuple[int, ...]:
    return a, b, c


async def later(text: str) -> str:
    await asyncio.sleep(0)
    return text.upper()


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def up(self, by: int = 1) -> int:
        """Counts up."""
        self.count += by
        return self.count

    def paint(self, unit: Unit = Unit.METRIC, *, note: str = "-", sides: list[int] | None = None) -> None:
        """Paints."""


class Broken:
    def __repr__(self) -> str:
        raise ValueError("has no text")


def unresolved(x: "int", y: Missing = None, z: 1 / 0 = None) -> int:  # type: ignore  # noqa: F821, UP037
    return x


def extras(a: int, /, **kw: int) -> dict[str, int]:
    return {"a": a, **kw}


def table(rows: dict[int, float]) -> Any:
    return rows


def anything(x: Any) -> Any:
    return x


def run(function: Callable[..., Any], arguments: Any) -> CallRecord:
    return Toolbox([function]).run({"name": function.__name__, "arguments": arguments})


def test_a_function_is_offered_with_its_source() -> None:
    (offered,) = Toolbox([add]).offered
    assert offered.name == "add"
    assert offered.code.startswith("def add(a: int, b: int = 2) -> int:")
    assert "return a + b" in offered.code


def test_what_has_no_source_of_its_own_is_offered_by_its_signature() -> None:
    method, builtin, variadic = tools_of(Toolbox([Counter().up, sorted, math.gcd]).offered)
    assert method.description == "Counts up."
    assert method.parameters["properties"] == {"by": {"type": "integer", "default": 1}}
    assert builtin.parameters["properties"] == {"iterable": {}, "key": {"default": None}, "reverse": {"default": False}}
    assert builtin.parameters["required"] == ["iterable"]
    assert variadic.parameters == {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


@pytest.mark.parametrize(
    ("functions", "problem"),
    [
        ([lambda x: x], "has no name of its own"),
        ([3], "is no function"),
        ([add, add], "two functions have this name"),
        ([max], "does not tell its parameters"),
        ([Counter], "'Counter': is a class; define a function with def"),
        ([partial(add, 1)], "'functools.partial': is a partial; define a function with def"),
    ],
)
def test_what_cannot_be_offered(functions: Sequence[Any], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        Toolbox(functions)


@pytest.mark.parametrize(
    ("function", "arguments", "result"),
    [
        (add, {"a": 1}, 3),
        (add, {"a": 1, "b": 5}, 6),
        (add, '{"a": 4}', 6),
        (measure, {"length": 2, "unit": "m"}, [2.0, Unit.METRIC, None, "x"]),
        (measure, {"length": 2.5, "unit": "IMPERIAL", "tags": ["a"], "kind": "y"}, [2.5, Unit.IMPERIAL, ["a"], "y"]),
        (positional, {"a": 1, "b": 2}, (1, 2, 3)),
        (positional, {"a": 1, "b": 2, "c": 4}, (1, 2, 4)),
        (unresolved, {"x": 1, "y": "anything"}, 1),
        (extras, {"a": 1, "kw": 2, "more": 3}, {"a": 1, "kw": 2, "more": 3}),
        (table, {"rows": {"1": 2}}, {1: 2.0}),
        (anything, {"x": "\ud800"}, "\ufffd"),
        (anything, '{"x": "\\ud800"}', "\ufffd"),
        (later, {"text": "grüße 🦊"}, "GRÜSSE 🦊"),
    ],
)
def test_a_call_runs(function: Callable[..., Any], arguments: Any, result: Any) -> None:
    record = Toolbox([function]).run({"name": function.__name__, "arguments": arguments})
    assert (record.error, record.result) == ("", result)
    assert record.seconds >= 0


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        ({"name": "subtract", "arguments": {}}, "there is no function 'subtract'; there are add, measure, fail"),
        ({"name": "add", "arguments": {}}, "arguments missing: a; it takes a, b"),
        ({"name": "add", "arguments": {"a": 1, "c": 2}}, "arguments unknown: c; it takes a, b"),
        ({"name": "add", "arguments": {"a": "1"}}, "a must be a whole number, not '1'"),
        ({"name": "add", "arguments": {"a": True}}, "a must be a whole number, not True"),
        ({"name": "add", "arguments": {"a": 1.5}}, "a must be a whole number, not 1.5"),
        ({"name": "add", "arguments": "{a: 1}"}, "the arguments are not JSON"),
        ({"name": "add", "arguments": [1]}, "the arguments must be a JSON object"),
        ({"name": "measure", "arguments": {"length": 1, "unit": "km"}}, "unit must be one of 'm', 'ft', not 'km'"),
        (
            {"name": "measure", "arguments": {"length": 1, "unit": "m", "tags": [1]}},
            "tags[0] must be a text, not 1; or tags must be null, not [1]",
        ),
        ({"name": "measure", "arguments": {"length": 1, "unit": "m", "kind": "z"}}, "kind must be one of 'x', 'y'"),
        ({"name": "fail", "arguments": {}}, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_goes_wrong_is_told(call: dict[str, Any], problem: str) -> None:
    def fail() -> float:
        return 1 / 0

    record = Toolbox([add, measure, fail]).run(call)
    assert record.error.startswith(problem)
    assert record.result is None
    assert json.loads(record.told) == {"error": record.error}


@pytest.mark.parametrize(
    ("function", "arguments", "problem"),
    [
        (unresolved, {"x": "1"}, "x must be a whole number, not '1'"),
        (extras, {"a": 1, "more": "3"}, "more must be a whole number, not '3'"),
        (table, {"rows": {"a": 1}}, "the key 'a' of rows must be a whole number, not 'a'"),
        (table, {"rows": {"1": "a"}}, "rows['1'] must be a number, not 'a'"),
        (measure, {"length": 10**400, "unit": "m"}, "length must be a number that a double holds"),
        (anything, "[" * 200_000, "the arguments are nested too deeply"),
        (anything, {"x": json.loads("[" * 100 + "]" * 100)}, "the arguments are nested too deeply"),
        (anything, '{"x": 1e999}', "the arguments hold a number that JSON cannot say"),
        (anything, '{"x": 1, "\\u0078": 2}', "the arguments hold a number that JSON cannot say, or one key twice"),
        (anything, {"x": math.inf}, "the arguments hold a number that JSON cannot say"),
        (anything, {"x": math.nan}, "the arguments hold a number that JSON cannot say"),
        (anything, f'{{"x": {"1" * 5000}}}', "the arguments are not JSON"),
        (anything, {"x": "x" * MAX_ARGUMENTS}, "the arguments have 600"),
    ],
)
def test_arguments_that_do_not_fit(function: Callable[..., Any], arguments: Any, problem: str) -> None:
    record = run(function, arguments)
    assert record.error.startswith(problem)
    assert json.loads(record.told) == {"error": record.error}
    assert str(record)


def test_a_result_that_cannot_be_told_is_an_error() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    for result, problem in ((10**5000, "ValueError"), (cycle, "RecursionError"), (Broken(), "ValueError: has no text")):

        def give(result: Any = result) -> Any:
            return result

        record = run(give, {})
        assert record.error.startswith(problem)
        assert record.result is result
        assert json.loads(record.told) == {"error": record.error}
        assert "failed: " in str(record)


def test_a_default_that_is_no_literal_of_json_is_not_told() -> None:
    def far(to: int = 10**5000, speed: float = math.inf, unit: Unit = Unit.METRIC, note: str = "-") -> None: ...

    (tool,) = tools_of(Toolbox([far]).offered)
    assert tool.parameters["required"] == []
    assert {name: each.get("default") for name, each in tool.parameters["properties"].items()} == {
        "to": None,
        "speed": None,
        "unit": None,
        "note": "-",
    }


def test_an_error_without_a_text_is_told_by_its_type() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    def fail() -> None:
        raise Mute

    assert run(fail, {}).error == "Mute"


def test_a_function_does_not_change_the_arguments_in_the_record() -> None:
    def grow(items: Any) -> int:
        items.append(1)
        return len(items)

    record = run(grow, {"items": []})
    assert (record.result, record.arguments) == (1, {"items": []})


def test_every_signature_is_told_to_the_model() -> None:
    def column_0(city: str, days: int = 1) -> None:
        """The weather.
        at column 0
        """

    def source_is_another(a: int) -> None: ...

    source_is_another.__signature__ = inspect.signature(add)  # type: ignore[attr-defined]
    painted, nested, other = (
        tool.parameters for tool in tools_of(Toolbox([Counter().paint, column_0, source_is_another]).offered)
    )
    assert painted["required"] == []
    assert painted["properties"] == {
        "unit": {"enum": ["m", "ft"]},
        "note": {"type": "string", "default": "-"},
        "sides": {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}], "default": None},
    }
    assert nested["properties"] == {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}}
    assert list(other["properties"]) == ["a", "b"]


def test_an_async_function_runs_in_the_callers_context() -> None:
    seen: ContextVar[str] = ContextVar("seen", default="unset")

    async def look() -> str:
        return seen.get()

    seen.set("set")
    assert run(look, {}).result == "set"


def test_a_call_is_shown_to_its_end_before_it_runs() -> None:
    command = f"ls {'a' * 200} && rm -rf b"
    begun: list[CallRecord] = []
    Toolbox([anything]).run({"name": "anything", "arguments": {"x": command}}, begun.append)
    assert [record.asked for record in begun] == [f"anything(x={command!r})"]
    longer = run(anything, {"x": f"ls {'a' * 50_000} && rm -rf b"})
    assert longer.asked.startswith("anything(x='ls aaa")
    assert longer.asked.endswith("aaa && rm -rf b')")
    assert " … " in longer.asked
    assert len(longer.asked) <= MAX_SHOWN + len("anything(x=)")


def test_an_interrupt_cancels_what_is_awaited() -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(KeyboardInterrupt):
        run(wait, {})
    assert cancelled.wait(180)


def test_what_an_async_function_leaves_behind_is_ended() -> None:
    ended: list[str] = []

    async def linger() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("task")

    async def numbers() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            ended.append("generator")

    async def work() -> int:
        kept.append(asyncio.ensure_future(linger()))
        kept.append(numbers())
        await asyncio.sleep(0)
        return await anext(kept[1])

    async def give_up() -> None:
        raise asyncio.CancelledError

    kept: list[Any] = []
    assert run(work, {}).result == 1
    assert sorted(ended) == ["generator", "task"]
    assert run(give_up, {}).error == "RuntimeError: what it awaits was cancelled"


def test_an_interrupt_goes_through() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    async def stop_later() -> None:
        raise KeyboardInterrupt

    for function in (stop, stop_later):
        with pytest.raises(KeyboardInterrupt):
            Toolbox([function]).run({"name": function.__name__, "arguments": {}})


def test_an_async_function_runs_inside_a_running_loop() -> None:
    async def cell() -> Any:
        return Toolbox([later]).run({"name": "later", "arguments": {"text": "a"}}).result

    assert asyncio.run(cell()) == "A"


def test_a_long_result_is_cut_for_the_model_only() -> None:
    def long() -> str:
        return "x" * (MAX_RESULT + 1)

    record = Toolbox([long]).run({"name": "long", "arguments": {}})
    assert record.result == long()
    assert record.told.endswith(f"(cut; {MAX_RESULT + 1} characters in all)")
    assert len(str(record)) < 300
