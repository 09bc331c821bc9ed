"""What a function's code says of its arguments, read without running it, and calls read out of a text."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.errors import InvalidRequest
from mistral_nb.functions import Tool, parse_calls, tools_of
from mistral_nb.types import Function

SOURCE = '''
import os
from typing import Annotated, Literal, Optional

@os.system("touch ran")
def forecast(
    city: str,
    days: int = 3,
    unit: Literal["celsius", "fahrenheit"] = "celsius",
    *skipped,
    precise: Optional[bool] = None,
    where: Annotated[dict[str, list[float]], "Coordinates"] = os.system("touch ran"),
    anything=...,
    later: "int | str" = -1,
):
    r"""The weather of a city.

        A second line: \\d.
    """
    open("ran", "w")
'''
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
CLOSED = {**SCHEMA, "additionalProperties": False}


def tool(code: str, name: str = "f") -> Tool:
    (found,) = tools_of([Function(name, code)])
    return found


def parameters(signature: str) -> Any:
    return tool(f"def f({signature}): ...").parameters


def test_a_python_signature() -> None:
    found = tool(SOURCE, "forecast")
    assert found.description == "The weather of a city.\n\nA second line: \\d."
    assert found.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "default": 3},
            "unit": {"enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "precise": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
            "where": {
                "type": "object",
                "additionalProperties": {"type": "array", "items": {"type": "number"}},
                "description": "Coordinates",
            },
            "anything": {},
            "later": {"anyOf": [{"type": "integer"}, {"type": "string"}], "default": -1},
        },
        "required": ["city"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        ("list", {"type": "array"}),
        ("list[int]", {"type": "array", "items": {"type": "integer"}}),
        ("typing.List[str]", {"type": "array", "items": {"type": "string"}}),
        ("tuple[int, str]", {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}),
        ("tuple[int, ...]", {"type": "array", "items": {"type": "integer"}}),
        ("tuple[()]", {"type": "array"}),
        ("Union[int, None, int]", {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
        ("int | None | str", {"anyOf": [{"type": "integer"}, {"type": "null"}, {"type": "string"}]}),
        ("int | int", {"type": "integer"}),
        ("Literal[1, 'x', None, True]", {"enum": [1, "x", None, True]}),
        ("Literal[Colour.RED]", {}),
        ("None", {"type": "null"}),
        ("'list[bool]'", {"type": "array", "items": {"type": "boolean"}}),
        ("'not python'", {}),
        ("Colour", {}),
        ("int | Colour", {}),
        ("Any", {}),
        ("f(x)[0]", {}),
    ],
)
def test_an_annotation(annotation: str, schema: dict[str, Any]) -> None:
    found = parameters(f"x: {annotation}")["properties"]["x"]
    assert {key: found[key] for key in schema} == schema
    assert bool(found) == bool(schema)


def test_which_parameters_are_required() -> None:
    assert parameters("a, /, b, *, c, d=1")["required"] == ["a", "b", "c"]
    assert parameters("**more: int")["additionalProperties"] == {"type": "integer"}
    assert parameters("**more")["additionalProperties"] == {}
    assert parameters("")["properties"] == {}


def test_which_function_of_a_source() -> None:
    two = "def f(a): ...\nasync def g(b): ...\n"
    assert tool(two, "g").parameters["required"] == ["b"]
    assert tool("def other(a): ...").parameters["required"] == ["a"]
    with pytest.raises(InvalidRequest, match=r"functions\[0\].*'h'.*defines f, g, but not 'h'"):
        tool(two, "h")


@pytest.mark.parametrize(
    "code", ["function f(a) { return a }", "async (a) => a", "f = lambda a: a", "", "x\0y", "say 'hello"]
)
def test_other_code_takes_any_object(code: str) -> None:
    assert tool(code).parameters == {"type": "object"}


@pytest.mark.parametrize(
    ("code", "description", "schema"),
    [
        (SCHEMA, "", CLOSED),
        ({"description": "d", "parameters": SCHEMA}, "d", CLOSED),
        ({"type": "function", "function": {"name": "x", "description": "d", "parameters": SCHEMA}}, "d", CLOSED),
        ({"description": "d", "parameters": None}, "d", NO_ARGUMENTS),
        ({"description": "d"}, "d", NO_ARGUMENTS),
        ({}, "", {"type": "object"}),
        ({"type": "object"}, "", {"type": "object"}),
        ({**SCHEMA, "additionalProperties": True}, "", {**SCHEMA, "additionalProperties": True}),
        ({"anyOf": [SCHEMA, {}], "properties": {}}, "", {"type": "object", "anyOf": [SCHEMA, {}], "properties": {}}),
    ],
)
def test_json(code: Any, description: str, schema: dict[str, Any]) -> None:
    found = tool(json.dumps(code))
    assert found.description == description
    assert found.parameters == schema


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ('{"type": "object"', "begins as JSON and is none .*line 1, column"),
        ("[]", "is a JSON list"),
        ('{"type": "string"}', "type is not 'string'"),
        ('{"parameters": [1]}', "parameters must be a JSON schema"),
        ('{"description": 1, "parameters": {}}', "description must be a text"),
        ('{"description": "\\ud800"}', "lone surrogate"),
        ('{"properties": {"a": {"default": NaN}}}', "not finite"),
        ('{"a":' * 20_000, "nested too deeply"),
        ('{"maximum": ' + "9" * 5000 + "}", "too many digits"),
        ("def f(x=1e999): ...", "not finite"),
        ('def f():\n    "\\ud800"\n', "lone surrogate"),
    ],
)
def test_code_that_is_refused(code: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as caught:
        tools_of([Function("first", "{}"), Function("f", code)])
    assert caught.value.field == "functions[1]"


@pytest.mark.parametrize(
    "code",
    [
        "def f(x: " + "(" * 9000 + ")" * 9000 + "): ...",
        "x = " + "-" * 60_000 + "1",
        "x = 1" + "+1" * 60_000,
        "def f(x: " + "a|" * 40_000 + "b): ...",
        "def f(x: " + "list[" * 90 + "int" + "]" * 90 + "): ...",
        "def f(x: '" + "list[" * 9000 + "'): ...",
        "def f(x=" + "9" * 100_000 + "): ...",
    ],
)
def test_monstrous_code_is_read_or_refused(code: str) -> None:
    assert outcome(code) in ("object", "refused")


def outcome(code: str) -> Any:
    try:
        return tool(code).parameters["type"]
    except InvalidRequest as error:
        return "refused" if "shorten it" in str(error) else error


@pytest.mark.parametrize("within", ["list[", "Optional[", "int | (", "tuple[int, ", "Annotated["])
def test_an_annotation_that_is_nested_deeply_is_refused(within: str) -> None:
    """Each of many unions within each other is put together again: seconds of work."""

    def nested(times: int) -> str:
        ends = within.count("[") * "]" + within.count("(") * ")"
        return f"def f(x: {within * times}str{ends * times}): ..."

    assert outcome(nested(20)) == "object"
    assert outcome(nested(21)) == "refused"
    assert outcome(f'def f(x: "{nested(21)[9:-6]}"): ...') == "refused"


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "a" * 65, 'say"', "f()", "\u200b"])
def test_a_name_that_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"functions\[0\]"):
        tools_of([Function(name, "{}")])


def test_names() -> None:
    assert [found.name for found in tools_of([Function(name, "{}") for name in ("größe", "a-b.c_1", "2d")])]
    with pytest.raises(InvalidRequest, match=r"functions\[1\].*earlier"):
        tools_of([Function("f", "{}"), Function("f", "{}")])
    with pytest.raises(InvalidRequest, match="at most 128"):
        tools_of([Function(f"f{index}", "{}") for index in range(129)])
    with pytest.raises(InvalidRequest, match=r"'300000 characters'.*262144"):
        tools_of([Function(f"f{index}", " " * 100_000) for index in range(3)])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "hello",
        '[{"name": "f"}]',
        '[{"name": "f", "arguments": "{}"}]',
        '[{"name": 1, "arguments": {}}]',
        '[{"name": "f", "arguments": {}, "more": 1}]',
        '[{"name": "f", "arguments": {}}, 1]',
        '[{"name": "f", "arguments": {}}] and',
        '[{"name": "f", "arguments": {"a": 1e999}}]',
        '[{"name": "f", "arguments": {"a": NaN}}]',
        '[{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}]",
        '[{"name": "f", "arguments": {"a": ' + "[" * 100_000,
        '[{"name": "f", "arguments": {"a": 1, "a": 2}}]',
        '[{"name": "f", "arguments": {"a": 1, "\\u0061": "x"}}]',
        '[{"name": "f", "arguments": {"a": {"\\ud800": 1, "\\udfff": 2}}}]',
        '[{"name": "f", "name": "g", "arguments": {}}]',
    ],
)
def test_a_text_that_is_no_list_of_calls(text: str) -> None:
    assert parse_calls(text) is None


def test_a_list_of_calls() -> None:
    text = (
        '\n[{"arguments": {"a": [1, 2.5, {"b": "\\ud83d\\ude00 \\ud83d"}]}, "name": "f"}, {"name":"g","arguments":{}}] '
    )
    assert parse_calls(text) == (
        {"arguments": {"a": [1, 2.5, {"b": "\U0001f600 \ufffd"}]}, "name": "f"},
        {"name": "g", "arguments": {}},
    )


def test_reading_from_several_threads_leaves_the_filters_of_warnings() -> None:
    """They are the process's: two readers at once would each put back what the other had set."""
    code = 'def f(a: "int"):\n    "\\d"\n'
    filters, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            for _ in range(20):
                found = list(threads.map(tool, [code] * 200))
                assert list(warnings.filters) == filters
                assert {item.description for item in found} == {"\\d"}
    finally:
        sys.setswitchinterval(interval)


AUDITED = """
import json, sys
from mistral_nb.functions import tools_of
from mistral_nb.types import Function

functions = [Function(**entry) for entry in json.loads(sys.stdin.read())]
tools_of(functions)
events = []
sys.addaudithook(lambda event, arguments: events.append((event, str(arguments))))
tools_of(functions)
print(json.dumps([entry for entry in list(events) if entry[0] != "compile"]))
"""


def test_code_is_never_run(tmp_path: Path) -> None:
    """In Python, nothing at all happens that an audit hook sees, but for the parsing."""
    names = [("forecast", SOURCE), ("f", "__import__('os').system('touch ran')\ndef f(a=open('ran', 'w')): ...")]
    functions = [{"name": name, "code": code} for name, code in names]
    functions.append({"name": "g", "code": "{\"description\": \"__import__('os').system('touch ran')\"}"})
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", AUDITED],
        input=json.dumps(functions),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        check=False,
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[]\n")
    assert not list(tmp_path.iterdir())
