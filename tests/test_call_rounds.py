"""Rounds of calls: what the model is asked next, what a limit and an interrupt leave, and `ask` against a peer."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import mistral_nb
from mistral_nb.backends.openai_wire import body_of
from mistral_nb.call_rounds import MAX_CALLS, Rounds
from mistral_nb.calling import MAX_ARGUMENTS, Toolbox
from mistral_nb.engine.functions import NOTHING, in_words
from mistral_nb.errors import BackendError, InvalidRequest
from mistral_nb.types import MAX_NAME, MAX_TEXT, GenerationRequest
from tests.backends.scripted import TOKEN, Peer, body, frame, head

ACCOUNT = "0123456789abcdef0123456789abcdef"


def add(a: int, b: int = 2) -> int:
    """Adds."""
    return a + b


def anything(x: Any) -> Any:
    return x


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


def test_what_is_said_beside_a_call_stays_in_the_conversation() -> None:
    rounds = Rounds(GenerationRequest(prompt="Add."), Toolbox([add]))
    assert rounds.take([{"name": "add", "arguments": {"a": 1}}], "Let me see.\ud800")
    turns = [(turn.role, turn.content) for turn in rounds.request.messages or ()]
    calls = '[{"name": "add", "arguments": {"a": 1}}]'
    assert turns[1:] == [("assistant", "Let me see.?"), ("assistant", calls), ("tool", "3")]
    sent = body_of(rounds.request, "m")["messages"]
    assert [turn["role"] for turn in sent] == ["user", "assistant", "tool"]
    assert (sent[1]["content"], len(sent[1]["tool_calls"])) == ("Let me see.?", 1)
    told = in_words(rounds.request.messages or (), NOTHING)
    assert [turn.role for turn in told] == ["user", "assistant", "user"]
    assert told[1].content == f"Let me see.?\n{calls}"


def test_calls_of_any_kind_can_be_told_of_on_the_next_wire() -> None:
    rounds = Rounds(GenerationRequest(prompt="Add."), Toolbox([add]))
    arguments: tuple[Any, ...] = ("[" * 200_000, {"a": math.inf}, {"a": "\ud800"}, {"a": "x" * 200_000}, 3)
    calls: list[dict[str, Any]] = [{"name": "add", "arguments": each} for each in arguments]
    assert rounds.take([*calls, {"name": "\ud800" * 2000, "arguments": None}, {"name": None}])
    assert all(record.error for record in rounds.records)
    assert len(body_of(rounds.request, "m")["messages"]) == 2 + len(rounds.records)
    long = Rounds(GenerationRequest(prompt="Add."), Toolbox([anything]))
    assert long.take([{"name": "anything", "arguments": {"x": "x" * (MAX_ARGUMENTS - 100)}}] * 3)
    assert [len(record.result) for record in long.records] == [MAX_ARGUMENTS - 100] * 3
    assert body_of(long.request, "m")["messages"][1]["tool_calls"][0]["function"]["arguments"] == "{}"


def test_only_so_many_calls_of_one_answer_are_run() -> None:
    rounds = Rounds(GenerationRequest(prompt="Go."), Toolbox([anything]))
    shown: list[str] = []
    call = {"name": "anything", "arguments": {"x": 1}}
    assert rounds.take([call] * 6000, show=shown.append)
    assert [record.error for record in rounds.records[:-1]] == [""] * MAX_CALLS
    problem = f"too many calls in one answer: {MAX_CALLS} of 6000 were run; ask for fewer"
    assert rounds.records[-1].error == problem
    assert shown[-1] == f"anything(x=1) → failed: {problem}"
    assert len(shown) == 2 * MAX_CALLS + 1
    turns = rounds.request.messages or ()
    assert len(json.loads(turns[1].content)) == len(turns) - 2 == MAX_CALLS + 1
    assert rounds.take([{"name": "\x01" * MAX_NAME, "arguments": {}}] * 6000)
    assert max(len(turn.content) for turn in rounds.request.messages or ()) <= MAX_TEXT


CALL = [head(), frame({"response": "", "tool_calls": [{"name": "add", "arguments": {"a": 40}}]}), frame("[DONE]")]
CALL_TO_STOP = [
    head(),
    frame({"response": "", "tool_calls": [{"name": "add", "arguments": {"a": 1}}, {"name": "halt", "arguments": {}}]}),
    frame("[DONE]"),
]
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
    shown, _ = result._repr_mimebundle_()
    assert shown["text/plain"].startswith("add(a=40) → 42\n\nIt is 42.\n\n")
    assert shown["text/markdown"].startswith("```text\nadd(a=40) → 42\n```\n\nIt is 42.\n\n<small>")


def test_without_call_nothing_is_run(cloud: Peer) -> None:
    cloud.scripts = [CALL]
    ran: list[int] = []

    def add(a: int) -> None:
        ran.append(a)

    result = mistral_nb.ask("What is 40 + 2?", functions=[add])
    assert (result.finish_reason, ran, result.calls) == ("tool_calls", [], ())
    assert result.tool_calls == ({"name": "add", "arguments": {"a": 40}},)
    for shown in result._repr_mimebundle_()[0].values():
        assert '"name": "add"' in shown


def test_a_failure_after_a_call_keeps_the_calls(cloud: Peer) -> None:
    cloud.scripts = [CALL, body({"errors": [{"message": "no", "code": 5018}], "success": False}, "403 Forbidden")]
    with pytest.raises(BackendError) as caught:
        mistral_nb.ask("What is 40 + 2?", functions=[add], call=True)
    assert caught.value.result
    assert [record.result for record in caught.value.result.calls] == [42]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_call_keeps_the_calls_before(cloud: Peer, stop: type[BaseException]) -> None:
    cloud.scripts = [CALL, CALL_TO_STOP]

    def halt() -> None:
        error = stop()
        error.result = "of another conversation"  # type: ignore[attr-defined]
        raise error

    with pytest.raises(stop) as caught:
        mistral_nb.ask("What is 40 + 2?", functions=[add, halt], call=True)
    result = caught.value.result  # type: ignore[attr-defined]
    assert [record.result for record in result.calls] == [42, 3, None]
    assert str(result.calls[-1]) == "halt() → failed: stopped before it ended"


def test_calls_beyond_the_limit_stay_in_the_result(cloud: Peer) -> None:
    cloud.scripts = [CALL]
    result = mistral_nb.ask("What is 40 + 2?", functions=[add], call=True, max_rounds=1)
    assert [record.result for record in result.calls] == [42]
    assert result.tool_calls == ({"name": "add", "arguments": {"a": 40}},)
    assert len(cloud.seen) == 2


def test_the_limit_of_rounds_is_checked(cloud: Peer) -> None:
    for limit in (0, -1, True, 1.5, "3", 1000):
        with pytest.raises(InvalidRequest, match=r"max_rounds = .*: must be a whole number from 1 to 999"):
            mistral_nb.ask("Hi", functions=[add], call=True, max_rounds=limit)  # type: ignore[arg-type]
    assert cloud.seen == []


def test_call_without_functions_to_run() -> None:
    for functions in (None, [], "add", [{"name": "add", "code": "1"}]):
        with pytest.raises(InvalidRequest, match="functions"):
            mistral_nb.ask("Hi", functions=functions, call=True)
    with pytest.raises(InvalidRequest, match="max_rounds"):
        mistral_nb.ask("Hi", functions=[add], max_rounds=3)
