"""`--functions` and `--call`: the user's own functions, offered and run, in a real shell against a scripted peer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

from tests.backends.scripted import Peer, frame, head
from tests.magics.kernels import Kernel

RunCell = Callable[[str], ExecutionResult]
ANSWER: list[Any] = [head(), frame({"response": "It is 42."}), frame("[DONE]")]
DEFINE = """
seen = []
def add(a: int, b: int = 2) -> int:
    "Adds."
    seen.append((a, b))
    return a + b

def name(who: str) -> str:
    return "\\x1b[31m<b>" + who

tools = [{"name": "add", "code": "{}"}]
both = [add, name]
"""


def calling(*calls: Any) -> list[Any]:
    return [head(), frame({"response": "", "tool_calls": list(calls)}), frame("[DONE]")]


ADD = {"name": "add", "arguments": {"a": 40}}


def test_the_calls_are_run_and_shown(
    run: RunCell, cloud: Peer, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.scripts = [calling(ADD, {"name": "name", "arguments": {"who": "Ann"}}), calling(ADD), ANSWER]
    assert run(DEFINE).success
    result = run("%%mistral --functions add,name --call -o answer\nWhat is 40 + 2?")
    assert result.success
    assert str(result.result) == "It is 42."
    assert [record.result for record in shell.user_ns["answer"].calls] == [42, "\x1b[31m<b>Ann", 42]
    assert shell.user_ns["seen"] == [(40, 2), (40, 2)]
    told = capsys.readouterr().out
    assert told.splitlines()[:6] == [
        "add(a=40)",
        "→ 42",
        "name(who='Ann')",
        "→ '\\x1b[31m<b>Ann'",
        "add(a=40)",
        "→ 42",
    ]
    assert "\x1b[31m" not in told
    assert told.count("It is 42.") == 1
    last = cloud.seen[-1].json
    assert [turn["role"] for turn in last["messages"]] == ["user", "assistant", "tool", "tool", "assistant", "tool"]
    assert re.match(r"def add\(a: int, b: int = 2\)", last["functions"][0]["code"])


def test_without_call_the_calls_are_shown_and_nothing_runs(
    run: RunCell, cloud: Peer, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.scripts = [calling(ADD)]
    run(DEFINE)
    result = run("answer = %mistral What is 40 + 2? --functions both")
    assert result.success
    assert shell.user_ns["seen"] == []
    assert shell.user_ns["answer"].tool_calls == (ADD,)
    assert '"name": "add"' in capsys.readouterr().out
    assert [each["name"] for each in cloud.seen[-1].json["functions"]] == ["add", "name"]


def test_calls_that_are_nested_too_deeply_are_not_shown(run: RunCell, cloud: Peer) -> None:
    cloud.scripts = [ANSWER]
    result: Any = run("%mistral Hi").result
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    calls = ({"name": "add", "arguments": {"a": nested}},)
    assert "nested too deeply to be shown" in replace(result, tool_calls=calls).calls_as_json


def test_the_rounds_are_bounded(
    run: RunCell, cloud: Peer, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.scripts = [calling(ADD)]
    run(DEFINE)
    assert run("%mistral Hi --functions add --call --max-rounds 2").success
    assert len(cloud.seen) == 3
    assert ["functions" in seen.json for seen in cloud.seen] == [True, True, False]
    assert shell.user_ns["seen"] == [(40, 2)] * 2
    told = capsys.readouterr().out
    assert told.count('"name": "add"') == 1
    assert told.index('"name": "add"') < told.index("■ limit of 2 rounds reached: the calls above were not run")
    assert run("%mistral last").success
    assert "■ limit of 2 rounds reached" in capsys.readouterr().out


def test_what_goes_wrong_in_a_call_is_told_to_the_model(run: RunCell, cloud: Peer) -> None:
    cloud.scripts = [calling({"name": "add", "arguments": {"a": "x"}}), ANSWER]
    run(DEFINE)
    assert run("%mistral Hi --functions add --call").success
    assert cloud.seen[-1].json["messages"][-1]["content"] == '{"error": "a must be a whole number, not \'x\'"}'


def test_an_interrupt_in_a_call_ends_the_cell(
    run: RunCell, cloud: Peer, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    cloud.scripts = [calling(ADD), calling(ADD, {"name": "stop", "arguments": {}}), ANSWER]
    run(f"{DEFINE}\ndef stop():\n    raise KeyboardInterrupt")
    result = run("%mistral Hi --functions add,stop --call -o answer")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)
    assert len(cloud.seen) == 2
    kept = shell.user_ns["answer"]
    assert [str(record) for record in kept.calls[:2]] == ["add(a=40) → 42"] * 2
    assert str(kept.calls[2]) == "stop() → failed: stopped before it ended"
    assert "→ 42\nstop()\n" in capsys.readouterr().out
    assert run("%mistral last").result is kept
    assert result.error_in_exec.result is kept  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("Hi --call", "--call runs your own functions"),
        ("Hi --call --functions tools", "--call runs your own functions"),
        ("Hi --functions ad", "--functions ad: no variable of that name; did you mean 'add'?"),
        ("Hi --functions add,seen", "--functions seen: must be a function or a list, not of type list"),
        ("Hi --functions add --max-rounds 2", "--max-rounds goes with --call only"),
        ("Hi --functions add --call --max-rounds 0", "--max-rounds 0: must be a whole number from 1 to 999"),
        ("Hi --functions add,add --call", "two functions have this name"),
    ],
)
def test_what_cannot_be(run: RunCell, cloud: Peer, line: str, problem: str) -> None:
    run(DEFINE)
    result = run(f"%mistral {line}")
    assert isinstance(result.error_in_exec, UsageError)
    assert problem in str(result.error_in_exec)
    assert cloud.seen == []


def test_in_a_kernel_the_outputs_come_in_order(cloud: Peer, kernel: Kernel) -> None:
    cloud.scripts = [calling(ADD), ANSWER]
    assert kernel.run(DEFINE.replace("seen.append", 'print("adding"); seen.append')).status == "ok"
    reply = kernel.run("%%mistral --functions add --call\nWhat is 40 + 2?")
    assert reply.status == "ok"
    streams = [output.content["text"] for output in reply.outputs if output.kind == "stream"]
    assert "".join(streams) == "add(a=40)\nadding\n→ 42\n"
    shown = [output.plain for output in reply.outputs]
    assert shown[-1].startswith("It is 42.")
    assert "(empty)" not in "".join(shown)


def test_at_the_limit_a_kernel_shows_the_calls(cloud: Peer, kernel: Kernel) -> None:
    cloud.scripts = [calling(ADD)]
    assert kernel.run(DEFINE).status == "ok"
    reply = kernel.run("%%mistral --functions add --call --max-rounds 1\nWhat is 40 + 2?")
    assert reply.status == "ok"
    last = reply.outputs[-1].plain
    assert '"name": "add"' in last
    assert "■ limit of 1 rounds reached: the calls above were not run" in last
