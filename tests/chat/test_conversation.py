"""The tree of turns: branches, deletion, undo, and the messages that it makes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mistral_nb.chat import Attachment, ChatError, Choice, Conversation, Turn, compose
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import Message


def turn(name: str, parent: str | None = None, **more: Any) -> Turn:
    return Turn(name, parent, f"ask {name}", **{"answer": f"answer {name}", "finish_reason": "stop", **more})


def tree(*turns: Turn) -> Conversation:
    conversation = Conversation()
    for each in turns:
        conversation.add(each)
    return conversation


def names(turns: Any) -> list[str]:
    return [each.id for each in turns]


@pytest.fixture
def branched() -> Conversation:
    """a - b - c and, asked later in the place of b, b2 - d."""
    return tree(turn("a"), turn("b", "a"), turn("c", "b"), turn("b2", "a"), turn("d", "b2"))


def test_iterating_gives_the_path_that_is_shown(branched: Conversation) -> None:
    assert names(branched) == ["a", "b2", "d"]
    assert names(branched.turns) == ["a", "b", "c", "b2", "d"]
    assert len(branched) == 3
    assert names(branched.branches("b")) == names(branched.branches("b2")) == ["b", "b2"]
    branched.select("b")
    assert names(branched) == ["a", "b", "c"]
    branched.select("a")
    assert names(branched) == ["a", "b2", "d"]
    assert repr(branched) == "<Conversation 'ask a': 3 turns of 5 in all>"
    assert bool(Conversation())


def test_a_deleted_turns_children_move_up_and_undo_puts_them_back(branched: Conversation) -> None:
    before = branched.turns
    branched.delete("b2")
    assert names(branched) == ["a", "d"]
    assert names(branched.branches("d")) == ["b", "d"]
    assert branched.undoable == "delete"
    assert branched.undo() == "delete"
    assert (branched.turns, branched.head) == (before, "d")
    assert branched.undo() == ""


@pytest.mark.parametrize(
    ("gone", "left"),
    [("d", ["a", "b2"]), ("b2", ["a", "b", "c"]), ("c", ["a", "b"]), ("a", ["b2"])],
)
def test_what_is_shown_after_a_deletion(gone: str, left: list[str]) -> None:
    conversation = tree(turn("a"), turn("b", "a"), turn("c", "b"), turn("b2", "a"))
    if gone == "d":
        conversation.add(turn("d", "b2"))
    if gone == "c":
        conversation.select("c")
    conversation.delete(gone)
    assert names(conversation) == left


def test_undo_keeps_what_was_asked_since(branched: Conversation) -> None:
    branched.delete("d")
    branched.add(turn("e", "b2"))
    branched.clear()
    branched.add(turn("f"))
    assert branched.undo() == "clear"
    assert names(branched) == ["a", "b2", "e"]
    assert names(branched.branches("a")) == ["a", "f"]
    assert branched.undo() == "delete"
    assert names(branched) == ["a", "b2", "d"]
    assert names(branched.branches("d")) == ["d", "e"]
    assert names(branched.turns) == ["a", "b", "c", "b2", "d", "e", "f"]


def test_a_deletion_in_the_middle_is_taken_back_under_what_follows(branched: Conversation) -> None:
    branched.delete("b2")
    branched.add(turn("e", "d"))
    branched.undo()
    assert names(branched) == ["a", "b2", "d", "e"]


def test_any_steps_are_taken_back_one_by_one() -> None:
    chance = random.Random(7)
    for _ in range(50):
        conversation, states = Conversation(), []
        for number in range(40):
            ids = names(conversation.turns)
            step = chance.random()
            if step < 0.6 or not ids:
                parent = chance.choice([None, *ids])
                pair = ("x", "y") if chance.random() < 0.3 else ("",)
                group = f"g{number}" if len(pair) > 1 else None
                conversation.add(*(turn(f"t{number}{each}", parent, group=group) for each in pair))
            elif step < 0.75:
                conversation.select(chance.choice(ids))
            elif step < 0.95:
                states.append(({each.id: each for each in conversation.turns}, set(ids)))
                conversation.delete(chance.choice(ids))
            else:
                states.append(({each.id: each for each in conversation.turns}, set(ids)))
                conversation.clear()
            _check(conversation)
        while states:
            before, kept = states.pop()
            assert conversation.undo()
            _check(conversation)
            after = {each.id: each for each in conversation.turns}
            assert {name: after[name] for name in kept} == before
        assert conversation.undoable == ""


def _check(conversation: Conversation) -> None:
    """A parent before its children, and a path from the head to the root."""
    seen: set[str | None] = {None}
    for each in conversation.turns:
        assert each.parent in seen
        seen.add(each.id)
        assert each.id in names(conversation.branches(each.id))
    assert conversation.head in seen
    assert (conversation.head is None) <= (len(conversation) == 0)


def test_loading_is_taken_back_too(branched: Conversation) -> None:
    before = branched.turns
    branched.replace_with(tree(turn("a"), turn("x", "a")))
    assert names(branched) == ["a", "x"]
    branched.delete("x")
    assert [branched.undo(), branched.undo()] == ["delete", "load"]
    assert (branched.turns, branched.head) == (before, "d")


def test_what_was_asked_since_a_load_stays_when_that_is_taken_back(branched: Conversation) -> None:
    before = branched.turns
    branched.replace_with(tree(turn("x")))
    branched.add(turn("y", "x"))
    assert branched.undo() == "load"
    assert (names(branched), names(branched.turns)) == (["a", "b2", "d"], ["a", "b", "c", "b2", "d", "x", "y"])
    branched.select("x")
    assert names(branched) == ["x", "y"]
    assert {each.id: each for each in branched.turns}.items() >= {each.id: each for each in before}.items()


def test_a_load_of_what_was_saved_earlier_is_taken_back_as_it_was() -> None:
    """Also where a turn was deleted since it was saved, and one is asked again in its place."""
    conversation = tree(turn("a"), turn("b", "a"), turn("c", "b"), turn("d", "c", answer="", finish_reason="error"))
    saved = Conversation.from_json(conversation.to_json())
    conversation.delete("b")
    conversation.select("c")
    conversation.replace_with(saved)
    conversation.select("b")
    conversation.undo()
    assert names(conversation) == names(conversation.turns) == ["a", "c", "d"]
    conversation.replace_with(saved)
    conversation.change("d", answer="at last", finish_reason="stop")
    conversation.add(turn("e", "b"))
    assert conversation.undo() == "load"
    _check(conversation)
    assert {each.id: each.parent for each in conversation.turns} == {"a": None, "c": "a", "d": "c", "b": "a", "e": "b"}
    assert conversation.turn("d").answer == "at last"
    assert names(conversation) == ["a", "b", "e"]


def test_what_another_conversation_still_writes_is_cancelled_here() -> None:
    conversation, other = Conversation(), tree(turn("x", answer="half", finish_reason=None))
    conversation.replace_with(other)
    assert (conversation.turn("x").finish_reason, conversation.turn("x").answer) == ("cancelled", "half")
    assert other.is_running("x")


def test_a_comparison_is_one_branch() -> None:
    conversation = tree(turn("a"), turn("b", "a"))
    conversation.add(turn("x", "a", group="g"), turn("y", "a", group="g"))
    assert conversation.head == "x"
    assert names(conversation.compared("y")) == ["x", "y"]
    assert names(conversation.compared("b")) == ["b"]
    assert names(conversation.branches("x")) == ["b", "x"]
    assert names(conversation.branches("y")) == ["b", "y"]
    conversation.select("y")
    assert names(conversation) == ["a", "y"]
    assert names(conversation.branches("b")) == ["b", "y"]
    conversation.add(turn("z", "y"))
    conversation.select("b")
    conversation.select("a")
    assert names(conversation) == ["a", "y", "z"]
    conversation.select("x")
    conversation.delete("x")
    assert names(conversation) == ["a", "y", "z"]


def test_messages_are_those_with_an_answer() -> None:
    system = Choice(system="Be brief.")
    conversation = tree(
        turn("a", sent="ask a, in full"),
        turn("b", "a", answer="", finish_reason="error", error="gone"),
        turn("c", "b", answer="half of", finish_reason="cancelled"),
        turn("d", "c", answer=" \n"),
        turn("e", "d", answer="", finish_reason=None, choice=system),
    )
    told = [
        Message("system", "Be brief."),
        Message("user", "ask a, in full"),
        Message("assistant", "answer a"),
        Message("user", "ask c"),
        Message("assistant", "half of"),
    ]
    assert list(conversation.messages()) == told
    assert list(conversation.asking("e")) == [*told, Message("user", "ask e")]
    assert list(conversation.asking("e", left_out=1)) == [told[0], *told[3:], Message("user", "ask e")]
    for count in (2, 9):
        assert list(conversation.asking("e", left_out=count)) == [told[0], Message("user", "ask e")]
    assert conversation.asking("a") == (Message("user", "ask a, in full"),)


def test_an_answer_longer_than_a_message_does_not_end_the_chat() -> None:
    conversation = tree(turn("a", answer="x" * 200_000), turn("b", "a"))
    assert [len(message.content) for message in conversation.asking("b")] == [5, 131_072, 5]


def test_an_unknown_turn_is_named_and_changes_nothing(branched: Conversation) -> None:
    before = branched.turns
    for use in (branched.select, branched.delete, branched.branches, branched.turn, branched.change, branched.asking):
        with pytest.raises(ChatError, match="there is no turn 'zz'"):
            use("zz")
    with pytest.raises(ChatError, match="no turn 'zz'"):
        branched.add(turn("new"), turn("other", "zz"))
    with pytest.raises(ChatError, match="there is a turn a already"):
        branched.add(turn("a"))
    assert branched.write("zz", answer="x") is branched.write("a", answer="x") is None
    assert (branched.turns, branched.undoable) == (before, "")


def test_a_long_conversation_is_walked_without_recursion() -> None:
    conversation = tree(*(turn(f"t{number}", f"t{number - 1}" if number else None) for number in range(5000)))
    conversation.select("t0")
    assert len(conversation) == 5000
    assert conversation.head == "t4999"


def test_those_who_watch_are_told(branched: Conversation) -> None:
    told: list[str] = []
    end = branched.watch(told.append)
    branched.select("c")
    branched.delete("c")
    branched.undo()
    branched.clear()
    branched.clear()
    end()
    branched.undo()
    assert told == ["select", "delete", "undo", "clear"]


def test_a_choice_is_checked_and_says_what_is_wrong() -> None:
    assert Choice(fields={"temperature": 1, "seed": None, "stop": "x"}).fields == {"temperature": 1.0, "stop": ("x",)}
    assert Choice(system="  ", model="").system is None
    assert Choice(fields={"seed": 1}).with_fields(seed=None, top_k=3).fields == {"top_k": 3}
    wrong: list[Any] = [{"temperature": 9}, {"temprature": 1}, {"functions": []}, {"messages": []}, {"raw": True}, [1]]
    for fields in wrong:
        with pytest.raises(InvalidRequest):
            Choice(fields=fields)


def test_an_attachment_cannot_close_its_own_fence() -> None:
    text = compose("Why?", [Attachment("error", "ValueError", "a\n````\nb"), Attachment("cell", "In [3]", "1/0\n")])
    assert text == ("Why?\n\nThe error ValueError:\n`````\na\n````\nb\n`````\n\nThe cell In [3]:\n```python\n1/0\n```")
