"""What a chat's page is sent: whatever happens, and whenever, it ends as a page that has just come."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from mistral_nb.chat import ChatError, ChatSession, Choice, TextAdded, Turn, TurnEnded, TurnStarted
from mistral_nb.config import load_settings
from mistral_nb_magics.chat.outbox import Outbox
from tests.backends.scripted import PATIENCE, TOKEN, Peer, eventually, frame, head
from tests.chat.conftest import ACCOUNT, CLOUD, fails, says
from tests.magics.pages import Page

PIECES = (
    "# A title\n\n",
    "Words, ",
    "more words. ",
    "\n\n- an item\n",
    "```python\nx = 1\n",
    "```\n\n",
    "$x$ ",
    "\U0001f600",
)


class Show:
    """A session that asks the peer, and a page that shows it."""

    def __init__(self, peer: Peer) -> None:
        given = {
            "cloudflare_account_id": ACCOUNT,
            "cloudflare_api_token": TOKEN,
            "cloudflare_base_url": peer.url,
            "cloudflare_trust_base_url": True,
            "retry_deadline": 0.0,
        }
        self.session = ChatSession(choice=CLOUD, settings=lambda: load_settings(given))
        self.settled: list[int] = []
        self.page = Page()
        self.outbox = self._outbox(self.page, lambda: self.settled.append(len(self.session.conversation)))
        self.session.listen(self.outbox.put)
        self._marks = 0

    def _outbox(self, page: Page, settled: Callable[[], None]) -> Outbox:
        conversation = self.session.conversation
        return Outbox(
            conversation,
            page.take,
            lambda: {"title": conversation.title, "undo": conversation.undoable, "system": self.session.choice.system},
            settled,
        )

    def hello(self) -> None:
        self.outbox.put({"type": "snapshot", "ref": "hello"})

    def sync(self) -> None:
        """Wait until the page has all that there is now."""
        assert self.session.wait(PATIENCE)
        self._marks += 1
        self.outbox.put({"type": "done", "ref": self._marks})
        self.page.answer(self._marks)

    def fresh(self) -> dict[str, Any]:
        """What a page shows that comes now."""
        page = Page()
        outbox = self._outbox(page, lambda: None)
        outbox.put({"type": "snapshot", "ref": 0})
        page.answer(0)
        outbox.close()
        return page.shows

    def close(self) -> None:
        self.session.stop()
        assert self.session.wait(PATIENCE)
        self.outbox.close()


@pytest.fixture
def show(peer: Peer) -> Iterator[Show]:
    show = Show(peer)
    yield show
    show.close()


def held(*texts: str) -> list[Any]:
    """An answer that stops in its middle until the client goes."""
    return [head(), *(frame({"response": text}) for text in texts), "hold"]


def test_a_page_that_comes_in_the_middle_of_an_answer_goes_on_with_it(peer: Peer, show: Show) -> None:
    more = threading.Event()
    start, *rest = says("One, ", "two, ", "three.")
    peer.scripts = [[start, rest[0], more, *rest[1:]]]
    turn = show.session.send("Count.")[0]
    assert eventually(lambda: show.session.conversation.turn(turn.id).answer != "")
    show.hello()
    show.page.until(lambda: bool(show.page.turns))
    assert show.page.text(turn.id) == "<p>One,</p>"
    assert show.page.state["busy"] is True
    more.set()
    show.sync()
    assert show.page.text(turn.id) == "<p>One, two, three.</p>"
    assert len(show.page.of("snapshot")) == 1
    assert show.page.shows == show.fresh()


def test_without_a_page_nothing_is_sent_or_rendered_but_the_transcript_is_written(peer: Peer, show: Show) -> None:
    peer.scripts = [says("Yes.")]
    show.session.send("Is it?")
    show.sync()
    assert [message["type"] for message in show.page.heard] == ["done"]
    assert eventually(lambda: show.settled == [1])


def test_an_answer_on_a_branch_that_is_not_shown_sends_nothing(peer: Peer, show: Show) -> None:
    more = threading.Event()
    start, *rest = says("Yes, ", "indeed.")
    peer.scripts = [says("No."), [start, rest[0], more, *rest[1:]]]
    show.hello()
    first = show.session.send("Is it?")[0]
    show.sync()
    second = show.session.regenerate(first.id)[0]
    show.page.until(lambda: second.id in show.page.turns and bool(show.page.turns[second.id]["blocks"]))
    show.session.conversation.select(first.id)
    show.page.until(lambda: first.id in show.page.turns)
    assert show.page.state["busy"] is True
    before = len(show.page.of("patch"))
    more.set()
    show.sync()
    assert len(show.page.of("patch")) == before
    assert show.page.state["busy"] is False
    show.session.conversation.select(second.id)
    show.sync()
    assert show.page.text(second.id) == "<p>Yes, indeed.</p>"
    assert show.page.shows == show.fresh()


def test_a_turn_that_is_deleted_while_it_streams_goes_and_comes_back(peer: Peer, show: Show) -> None:
    peer.scripts = [held("Once upon a time")]
    show.hello()
    turn = show.session.send("Tell a story.")[0]
    show.page.until(lambda: turn.id in show.page.turns and bool(show.page.turns[turn.id]["blocks"]))
    show.session.conversation.delete(turn.id)
    show.sync()
    assert show.page.turns == {}
    assert show.page.state["busy"] is False
    assert show.session.conversation.undo() == "delete"
    show.sync()
    assert show.page.turns[turn.id]["finish"] == "cancelled"
    assert show.page.text(turn.id) == "<p>Once upon a time</p>"
    assert show.page.shows == show.fresh()


def test_a_retry_takes_the_place_of_what_failed(peer: Peer, show: Show) -> None:
    peer.scripts = [fails(5004, "no such thing"), says("Yes.")]
    show.hello()
    turn = show.session.send("Is it?")[0]
    show.sync()
    assert show.page.turns[turn.id]["error"]
    show.session.retry(turn.id)
    show.sync()
    assert show.page.turns[turn.id]["error"] == ""
    assert show.page.text(turn.id) == "<p>Yes.</p>"
    assert show.page.shows == show.fresh()


def test_a_comparison_streams_side_by_side(peer: Peer, show: Show) -> None:
    peer.scripts = [says("Yes.")]
    show.hello()
    show.session.compare = Choice(backend="cloudflare", fields={"temperature": 0})
    turns = show.session.send("Is it?", compare=True)
    show.sync()
    assert list(show.page.turns) == [turn.id for turn in turns]
    assert len(show.page.of("snapshot")) == 1
    assert show.page.shows == show.fresh()


def test_a_question_below_others_sends_no_snapshot_and_no_old_text(peer: Peer, show: Show) -> None:
    peer.scripts = [says("Some words that need not come again.")]
    show.hello()
    show.session.send("First?")
    show.sync()
    before = len(show.page.heard)
    show.session.send("Second?")
    show.sync()
    assert "need not come again" not in str([each for each in show.page.heard[before:] if each["type"] != "patch"])
    assert not any("system" in each or "history" in each for each in show.page.heard[before:])


def test_a_message_that_cannot_be_sent_costs_no_other(peer: Peer, show: Show, caplog: pytest.LogCaptureFixture) -> None:
    """What cannot be sent may be a patch on which the next ones build: all is sent again."""
    peer.scripts = [says("Yes, ", "it is.")]
    show.hello()
    say, failed = show.outbox._say, []

    def fail_once(message: Any) -> None:
        if message["type"] == "patch" and not failed:
            failed.append(message)
            raise OSError("the socket is closed")
        say(message)

    show.outbox._say = fail_once
    show.session.send("Is it?")
    show.sync()
    assert failed
    assert "could not be sent" in caplog.text
    assert show.page.shows == show.fresh()


def test_a_snapshot_that_is_ahead_of_the_events_gets_no_text_twice(show: Show) -> None:
    """Events that wait while it is made are in it already."""
    conversation = show.session.conversation
    conversation.add(Turn("t", None, "Count.", answer="One, "))
    show.hello()
    show.page.until(lambda: "t" in show.page.turns)
    show.outbox.put(TextAdded("t", "One, ", 0))
    conversation.change("t", answer="One, two.")
    show.outbox.put(TextAdded("t", "two.", 5))
    ended = conversation.change("t", finish_reason="stop")
    assert ended is not None
    show.outbox.put(TurnEnded(ended, None))
    show.sync()
    assert show.page.text("t") == "<p>One, two.</p>"
    assert not [each for each in show.page.of("turn") if "blocks" in each["turn"]]


def test_a_snapshot_that_has_the_end_already_is_not_taken_back(show: Show) -> None:
    started = Turn("t", None, "Count.")
    ended = replace(started, answer="One.", finish_reason="stop")
    show.session.conversation.add(ended)
    show.hello()
    for event in (TurnStarted(started), TextAdded("t", "One.", 0), TurnEnded(ended, None)):
        show.outbox.put(event)
    show.sync()
    assert show.page.text("t") == "<p>One.</p>"
    assert not [each for each in show.page.of("turn") if each["turn"]["running"]]


def random_script(chance: random.Random) -> list[Any]:
    texts = [chance.choice(PIECES) for _ in range(chance.randint(1, 12))]
    kind = chance.random()
    if kind < 0.15:
        return fails(5004, "no such thing")
    if kind < 0.4:
        return held(*texts)
    if kind < 0.5:
        return [head(), *(frame({"response": text}) for text in texts)]  # cut off
    return says(*texts)


def random_step(show: Show, chance: random.Random) -> None:
    session, conversation = show.session, show.session.conversation
    ids = [turn.id for turn in conversation.turns] or ["none"]
    one = chance.choice(ids)
    steps: list[Callable[[], object]] = [
        *[lambda: session.send(f"Question {chance.randint(0, 9)}?")] * 5,
        lambda: session.send("Both?", compare=True),
        *[lambda: session.stop()] * 3,
        lambda: session.stop(one),
        *[lambda: session.regenerate(one)] * 2,
        *[lambda: session.retry(one)] * 3,
        lambda: session.edit(one, "Another?"),
        *[lambda: conversation.delete(one)] * 2,
        lambda: conversation.clear(),
        *[lambda: conversation.undo()] * 2,
        *[lambda: conversation.select(one)] * 2,
        *[lambda: show.hello()] * 2,
        lambda: show.outbox.put({"type": "state"}),
        *[lambda: session.wait(0.2)] * 2,
    ]
    with contextlib.suppress(ChatError):  # busy, or there is no such turn
        chance.choice(steps)()


@pytest.mark.parametrize("seed", range(6))
def test_after_anything_the_page_shows_what_a_new_one_would(peer: Peer, show: Show, seed: int) -> None:
    chance = random.Random(seed)
    peer.scripts = [random_script(chance) for _ in range(40)] + [says("The last.")]
    show.session.compare = Choice(backend="cloudflare", fields={"seed": 1})
    show.hello()
    pause = threading.Event()
    for _ in range(70):
        random_step(show, chance)
        if chance.random() < 0.5:
            pause.wait(chance.random() / 50)  # to be at another point of the answers, and not to wait for one
    show.session.stop()
    show.sync()
    assert show.page.shows == show.fresh()
    assert show.page.state["busy"] is False
    assert eventually(lambda: not show.outbox._unsettled)
