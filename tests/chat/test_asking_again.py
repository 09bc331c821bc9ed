"""Questions that are asked again: regenerated, edited, retried, and put to two at once."""

from __future__ import annotations

import threading
from dataclasses import replace

from mistral_nb.chat import (
    Attachment,
    ChatSession,
    Choice,
    TurnEnded,
)
from tests.backends.scripted import PATIENCE, Peer, frame, head
from tests.chat.conftest import CLOUD, Heard, fails, says


def test_regenerate_and_edit_keep_the_old_branch(session: ChatSession, peer: Peer) -> None:
    peer.scripts = [says("one"), says("two"), says("other"), says("edited")]
    (first,) = session.send("Q", attachments=[Attachment("variable", "x", "1")])
    session.wait(PATIENCE)
    (second,) = session.send("R")
    session.wait(PATIENCE)
    session.choice = CLOUD.with_fields(temperature=0.5)
    (again,) = session.regenerate(first.id)
    session.wait(PATIENCE)
    (edited,) = session.edit(again.id, "Q2")
    session.wait(PATIENCE)
    conversation = session.conversation
    assert [each.id for each in conversation.branches(first.id)] == [first.id, again.id, edited.id]
    assert [each.answer for each in conversation] == ["edited"]
    assert (again.choice.fields, again.sent) == ({"temperature": 0.5}, first.sent)
    assert edited.sent == "Q2\n\nThe variable x:\n```\n1\n```"
    conversation.select(first.id)
    assert [each.id for each in conversation] == [first.id, second.id]
    assert [len(seen.json["messages"]) for seen in peer.seen] == [1, 3, 1, 1]


def test_retry_asks_anew_in_place_or_beside_a_partial_answer(session: ChatSession, heard: Heard, peer: Peer) -> None:
    peer.scripts = [fails(10000, "no", "401 No"), [head(), frame({"response": "half"})], says("whole")]
    (turn,) = session.send("Q")
    session.wait(PATIENCE)
    failed = session.conversation.turn(turn.id)
    assert (failed.finish_reason, failed.footer.count("error")) == ("error", 1)
    session.choice = CLOUD.with_fields(seed=5)
    (same,) = session.retry(turn.id)
    session.wait(PATIENCE)
    partial = session.conversation.turn(turn.id)
    assert (same.id, same.running, same.error, same.choice.fields["seed"]) == (turn.id, True, None, 5)
    assert (partial.answer, partial.finish_reason) == ("half", "truncated")
    assert len(session.conversation.turns) == 1
    (other,) = session.retry(turn.id)
    session.wait(PATIENCE)
    assert [each.answer for each in session.conversation.branches(turn.id)] == ["half", "whole"]
    assert session.conversation.head == other.id
    kinds = heard.about(turn.id)
    assert [kind for kind in kinds if kind != "StatusSaid"] == [
        *("TurnStarted", "TurnEnded"),
        *("TurnStarted", "TextAdded", "TurnEnded"),
    ]


def test_a_comparison_asks_two_at_once_with_the_same_seed(session: ChatSession, heard: Heard, peer: Peer) -> None:
    both = threading.Barrier(2)
    meet: list[object] = [lambda: both.wait(PATIENCE), *says("hi")]
    peer.scripts = [meet, meet, says("then")]  # type: ignore[list-item]
    session.choice = CLOUD.with_fields(seed=42)
    session.compare = replace(CLOUD, model="@cf/mistral/other", fields={"temperature": 0, "seed": 1})
    first, second = session.send("Which?")
    assert session.wait(PATIENCE)
    assert (first.parent, first.group) == (second.parent, second.group)
    assert first.group
    assert [first.choice.fields, second.choice.fields] == [{"seed": 42}, {"temperature": 0, "seed": 42}]
    asked = {seen.path.rpartition("/ai/run/")[2] for seen in peer.seen}
    assert (len(asked), "@cf/mistral/other" in asked) == (2, True)
    assert [seen.json["seed"] for seen in peer.seen] == [42, 42]
    assert [each.answer for each in session.conversation.compared(second.id)] == ["hi", "hi"]
    assert [each.id for each in session.conversation] == [first.id]
    session.conversation.select(second.id)
    (third,) = session.send("Then?", compare=False)
    assert session.wait(PATIENCE)
    assert third.parent == second.id
    assert len(session.regenerate(second.id)) == 2
    assert session.wait(PATIENCE)
    assert len(heard.of(TurnEnded)) == 5


def test_one_of_a_comparison_fails_and_is_retried_alone(session: ChatSession, peer: Peer) -> None:
    session.choice = Choice(backend="openai")
    session.compare = CLOUD
    peer.scripts = [says("fine"), says("mended")]
    first, second = session.send("Which?")
    session.wait(PATIENCE)
    lost, fine = session.conversation.compared(first.id)
    assert (lost.answer, fine.answer) == ("", "fine")
    assert "openai" in (lost.error or "").lower()
    assert lost.served is None
    session.choice = CLOUD
    (again,) = session.retry(first.id)
    session.wait(PATIENCE)
    assert (again.id, again.group, again.choice) == (first.id, second.group, CLOUD)
    assert [each.answer for each in session.conversation.compared(first.id)] == ["mended", "fine"]
