"""Conversations that outgrow the context: the oldest turns are left out, and nothing else is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mistral_nb.chat import ChatSession, StatusSaid, Turn
from mistral_nb.chat.context import more_left_out
from mistral_nb.errors import ContextOverflow
from mistral_nb.types import GenerationRequest, Message
from tests.backends.scripted import PATIENCE, Peer
from tests.chat.conftest import CLOUD, Heard, says, too_long


def filled(session: ChatSession, count: int, size: int = 100) -> None:
    """So many turns before, each of `size` characters."""
    for number in range(count):
        question = f"q{number}"
        answer = "x" * (size - len(question))
        session.conversation.add(
            Turn(f"t{number}", session.conversation.head, question, answer=answer, finish_reason="stop")
        )


def questions(peer: Peer) -> list[list[str]]:
    """Of each request, which questions it held."""
    return [[each["content"] for each in seen.json["messages"] if each["role"] == "user"] for seen in peer.seen]


def test_the_oldest_turns_are_left_out(session: ChatSession, heard: Heard, peer: Peer) -> None:
    """Of 1,050 tokens 50 are too many and 100 are for the answer: two turns of 100 characters, at a token each."""
    filled(session, 10)
    peer.scripts = [too_long(1050, 1000), says("ok")]
    session.choice = replace(CLOUD, system="s" * 49, fields={"max_tokens": 100})
    (turn,) = session.send("?")
    assert session.wait(PATIENCE)
    assert questions(peer) == [[*(f"q{n}" for n in range(10)), "?"], [*(f"q{n}" for n in range(2, 10)), "?"]]
    assert all(seen.json["messages"][0] == {"role": "system", "content": "s" * 49} for seen in peer.seen)
    shown = session.conversation.turn(turn.id)
    assert (shown.answer, shown.left_out, shown.error) == ("ok", 2, None)
    assert [event.status for event in heard.of(StatusSaid)] == [
        "The context is full: leaving out the 2 oldest turns",
    ]
    assert len(session.conversation) == 11


def test_it_goes_on_until_it_fits(session: ChatSession, peer: Peer) -> None:
    filled(session, 3)
    peer.scripts = [too_long(9, 8), too_long(9, 8), too_long(9, 8), says("ok")]
    session.choice = CLOUD.with_fields(max_tokens=1)
    (turn,) = session.send("?")
    assert session.wait(PATIENCE)
    assert [len(each) for each in questions(peer)] == [4, 3, 2, 1]
    assert session.conversation.turn(turn.id).left_out == 3


def test_the_next_question_leaves_out_the_same_at_once(session: ChatSession, heard: Heard, peer: Peer) -> None:
    filled(session, 3)
    session.choice = CLOUD.with_fields(max_tokens=1)
    peer.scripts = [too_long(9, 8), says("ok")]
    session.ask("first")
    session.ask("second")
    assert questions(peer)[1:] == [["q1", "q2", "first"], ["q1", "q2", "first", "second"]]
    assert [turn.left_out for turn in session.conversation][3:] == [1, 1]
    assert session.wait(PATIENCE)
    told = "The context is full: leaving out the oldest turn"
    assert [event.status for event in heard.of(StatusSaid)] == [told, told]
    session.choice = replace(session.choice, model="@cf/another/model")
    session.ask("third")
    assert questions(peer)[-1][0] == "q0"


def test_after_a_deletion_what_fits_is_found_anew(session: ChatSession, peer: Peer) -> None:
    """What was left out may be what was deleted; and a question too long for any context says nothing of the next."""
    filled(session, 2)
    session.choice = CLOUD.with_fields(max_tokens=1)
    peer.scripts = [too_long(9, 8), says("ok")]
    session.ask("first")
    session.conversation.delete("t0")
    session.ask("second")
    assert questions(peer)[-1] == ["q1", "first", "second"]
    peer.scripts = [too_long(5000, 1000)]
    with pytest.raises(ContextOverflow):
        session.ask("too much")
    peer.scripts = [says("ok")]
    session.ask("last")
    assert questions(peer)[-1] == ["q1", "first", "second", "last"]


def test_only_a_question_that_does_not_fit_alone_is_an_error(session: ChatSession, peer: Peer) -> None:
    filled(session, 2)
    peer.scripts = [too_long(5000, 1000)]
    with pytest.raises(ContextOverflow) as caught:
        session.ask("?")
    assert (caught.value.prompt_tokens, caught.value.limit) == (5000, 1000)
    assert questions(peer) == [["q0", "q1", "?"], ["?"]]
    turn = session.conversation.path[-1]
    assert (turn.finish_reason, turn.left_out, turn.answer) == ("error", 2, "")
    assert "shorten it" in (turn.error or "")


def test_a_peer_whose_numbers_are_wrong_is_not_asked_for_each_turn(session: ChatSession, peer: Peer) -> None:
    filled(session, 200, size=10)
    peer.scripts = [too_long(100_001, 100_000)]
    session.choice = CLOUD.with_fields(max_tokens=1)
    session.send("?")
    assert session.wait(PATIENCE)
    assert len(peer.seen) < 20
    assert questions(peer)[-1] == ["?"]


def test_stopping_ends_the_leaving_out(session: ChatSession, heard: Heard, peer: Peer) -> None:
    filled(session, 3)
    peer.scripts = [too_long(9, 8)]
    session.listen(lambda event: session.stop() if isinstance(event, StatusSaid) else None)
    (turn,) = session.send("?")
    assert session.wait(PATIENCE)
    assert session.conversation.turn(turn.id).finish_reason == "cancelled"
    assert heard.about(turn.id) == ["TurnStarted", "StatusSaid", "TurnEnded"]


@pytest.mark.parametrize(
    ("overflow", "left_out", "more"),
    [((112, 100), 0, 2), ((101, 100), 0, 1), ((100_000, 10), 0, 5), ((0, 0), 0, 1), ((101, 100), 4, 6)],
)
def test_how_many_more(overflow: tuple[int, int], left_out: int, more: int) -> None:
    messages: list[Any] = [Message("system", "s")]
    for _ in range(5):
        messages += [Message("user", "123456"), Message("assistant", "7890")]
    request = GenerationRequest(messages=(*messages, Message("user", "x" * 49)), max_tokens=1)
    assert more_left_out(ContextOverflow(*overflow), request, left_out) == more
    alone = request.with_(messages=(messages[0], Message("user", "x")))
    assert more_left_out(ContextOverflow(*overflow), alone, left_out) is None
