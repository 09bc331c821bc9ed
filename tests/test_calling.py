"""Calls from a model on the user's own functions: offered, checked, run, and told."""

from __future__ import annotations

import asyncio
import enum
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest

import mistral_nb
from mistral_nb.annotations import fitted
from mistral_nb.calling import MAX_RESULT, Rounds, Toolbox
from mistral_nb.errors import BackendError, InvalidRequest
from mistral_nb.functions import tools_of
from mistral_nb.types import GenerationRequest
from tests.backends.scripted import TOKEN, Peer, body, frame, head

ACCOUNT = "0123456789abcdef0123456789abcdef"


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


def test_a_function_is_offered_with_its_source() -> None:
    (offered,) = Toolbox([add]).offered
    assert offered.name == "add"
    assert offered.code.startswith("def add(a: int, b: int = 2) -> int:")
    assert "return a + b" in offered.code


def test_what_has_no_source_of_its_own_is_offered_by_its_signature() -> None:
    method, builtin, variadic = (Toolbox([each]).offered[0] for each in (Counter().up, sorted, math.gcd))
    assert method.code.startswith("def up(by: 'int' = 1) -> 'int':")
    assert "Counts up." in method.code
    assert builtin.code.startswith("def sorted(iterable, /, *, key=None, reverse=False):")
    assert variadic.code.startswith("def gcd(*integers):")
    for each in (method, builtin, variadic):
        assert tools_of([each])[0].parameters["type"] == "object"


@pytest.mark.parametrize(
    ("functions", "problem"),
    [
        ([lambda x: x], "has no name of its own"),
        ([3], "is no function"),
        ([add, add], "two functions have this name"),
        ([dict], "does not tell its parameters"),
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


def test_types_that_are_not_alike_are_kept_apart() -> None:
    assert fitted(1, int | float, "x") == 1
    assert type(fitted(1, float, "x")) is float
    assert fitted([1, "a"], tuple[int, str], "x") == (1, "a")
    assert fitted({"a": 1}, dict[str, int], "x") == {"a": 1}
    for value, hint in ((True, Literal[1]), ("1", bool), ([1], tuple[int, int]), ({"a": "1"}, dict[str, int])):
        with pytest.raises(TypeError):
            fitted(value, hint, "x")


def test_a_long_result_is_cut_for_the_model_only() -> None:
    def long() -> str:
        return "x" * (MAX_RESULT + 1)

    record = Toolbox([long]).run({"name": "long", "arguments": {}})
    assert record.result == long()
    assert record.told.endswith(f"(cut; {MAX_RESULT + 1} characters in all)")
    assert len(str(record)) < 300


def test_the_rounds_end_with_a_request_without_functions() -> None:
    rounds = Rounds(GenerationRequest(prompt="Add."), Toolbox([add]), limit=2)
    call = {"name": "add", "arguments": {"a": 1}}
    assert rounds.request.functions is not None
    assert rounds.take([call])
    assert rounds.request.functions is not None
    assert rounds.take([{"function": {"name": "add", "arguments": '{"a": 2}'}}])
    assert rounds.request.functions is None
    assert not rounds.take([call])
    assert [turn.to_dict() for turn in rounds.request.messages or ()] == [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": '[{"name": "add", "arguments": {"a": 1}}]'},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": '[{"name": "add", "arguments": {"a": 2}}]'},
        {"role": "tool", "content": "4", "name": "add"},
    ]
    assert not Rounds(GenerationRequest(prompt="Add."), Toolbox([add])).take([])


CALL = [head(), frame({"response": "", "tool_calls": [{"name": "add", "arguments": {"a": 40}}]}), frame("[DONE]")]
ANSWER = [head(), frame({"response": "It is 42."}), frame("[DONE]")]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Any:
    peer = Peer()
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", ACCOUNT)
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", TOKEN)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_BASE_URL", peer.url)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_TRUST_BASE_URL", "true")
    yield peer
    peer.close()


def test_ask_runs_the_calls(cloud: Peer) -> None:
    cloud.scripts = [CALL, ANSWER]
    result = mistral_nb.ask("What is 40 + 2?", functions=[add], call=True)
    assert result.text == "It is 42."
    assert [str(record) for record in result.calls] == ["add(a=40) → 42"]
    first, second = (seen.json for seen in cloud.seen)
    assert first["functions"][0]["name"] == "add"
    assert second["messages"][-1] == {"role": "tool", "content": "42", "name": "add"}


def test_without_call_nothing_is_run(cloud: Peer) -> None:
    cloud.scripts = [CALL]
    ran: list[int] = []

    def add(a: int) -> None:
        ran.append(a)

    result = mistral_nb.ask("What is 40 + 2?", functions=[add])
    assert (result.finish_reason, ran, result.calls) == ("tool_calls", [], ())
    assert result.tool_calls == ({"name": "add", "arguments": {"a": 40}},)


def test_a_failure_after_a_call_keeps_the_calls(cloud: Peer) -> None:
    cloud.scripts = [CALL, body({"errors": [{"message": "no", "code": 5018}], "success": False}, "403 Forbidden")]
    with pytest.raises(BackendError) as caught:
        mistral_nb.ask("What is 40 + 2?", functions=[add], call=True)
    assert caught.value.result
    assert [record.result for record in caught.value.result.calls] == [42]


def test_call_without_functions_to_run() -> None:
    for functions in (None, [], "add", [{"name": "add", "code": "1"}]):
        with pytest.raises(InvalidRequest, match="functions"):
            mistral_nb.ask("Hi", functions=functions, call=True)
    with pytest.raises(InvalidRequest, match="max_rounds"):
        mistral_nb.ask("Hi", functions=[add], max_rounds=3)
