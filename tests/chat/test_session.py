"""A chat's answers from a scripted peer: sent, stopped, deleted, failed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from mistral_nb.chat import (
    Attachment,
    ChatBusy,
    ChatSession,
    Conversation,
    StatusSaid,
    TextAdded,
    Turn,
    TurnEnded,
    TurnStarted,
)
from mistral_nb.errors import AuthenticationError, InvalidRequest, MistralError, StreamTruncated
from mistral_nb.types import Message
from tests.backends.scripted import PATIENCE, Peer, eventually, frame, head
from tests.chat.conftest import ACCOUNT, CLOUD, Heard, fails, says


def test_a_question_and_its_answer(session: ChatSession, heard: Heard, peer: Peer) -> None:
    peer.scripts = [says("Grü", "ezi ", "🦊")]
    session.choice = replace(CLOUD, system="Be brief.", fields={"seed": 7, "temperature": 0})
    (turn,) = session.send("Hello")
    assert (turn.running, turn.prompt, turn.parent, turn.choice) == (True, "Hello", None, session.choice)
    assert session.wait(PATIENCE)
    (shown,) = session.conversation
    assert shown.answer == heard.text(turn.id) == "Grüezi 🦊"
    assert (shown.finish_reason, shown.error, shown.id) == ("stop", None, turn.id)
    assert shown.footer.endswith("3 tokens · first token " + shown.footer.partition("first token ")[2])
    assert shown.served
    assert (shown.served["seed"], shown.served["backend"]) == (7, "cloudflare")
    kinds = heard.about(turn.id)
    assert (kinds[0], kinds[-1], {*kinds[1:-1]}) == ("TurnStarted", "TurnEnded", {"TextAdded"})
    (ended,) = heard.of(TurnEnded)
    assert (ended.turn, ended.result.text, ended.result.footer) == (shown, shown.answer, shown.footer)
    sent = peer.seen[0].json
    assert sent["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert (sent["seed"], sent["temperature"]) == (7, 0)


def test_later_questions_carry_what_was_said(session: ChatSession, peer: Peer) -> None:
    peer.scripts = [says("one"), fails(3043, "boom", "500 No"), [head(), frame({"response": "half"})], says("four")]
    note = Attachment("variable", "x", "[1, 2]")
    session.send("first {{x}}", sent="first [1, 2]", attachments=[note])
    session.wait(PATIENCE)
    for question in ("second", "third", "fourth"):
        session.send(question)
        session.wait(PATIENCE)
    first, second, third, fourth = session.conversation
    assert (second.answer, second.finish_reason, "boom" in (second.error or "")) == ("", "error", True)
    assert (third.answer, third.finish_reason) == ("half", "truncated")
    assert third.error
    assert (fourth.answer, fourth.error) == ("four", None)
    question = "first [1, 2]\n\nThe variable x:\n```\n[1, 2]\n```"
    assert (first.sent, first.attachments) == (question, (note,))
    told = [message["content"] for message in peer.seen[-1].json["messages"]]
    assert told == [question, "one", "third", "half", "fourth"]


def test_stop_keeps_the_text_and_frees_the_chat_at_once(session: ChatSession, heard: Heard, peer: Peer) -> None:
    peer.scripts = [[head(), "drip"], says("next")]
    (turn,) = session.send("Go on")
    heard.until(TextAdded, 3)
    session.stop(turn.id)
    assert not session.busy
    assert session.wait(PATIENCE)
    (shown,) = session.conversation
    assert (shown.finish_reason, shown.error) == ("cancelled", None)
    assert shown.answer == heard.text(turn.id) != ""
    assert "cancelled" in shown.footer
    assert peer.gone.wait(PATIENCE)
    session.send("And now?")
    assert session.wait(PATIENCE)
    assert [each.answer for each in session.conversation] == [shown.answer, "next"]
    assert heard.about(turn.id)[-1] == "TurnEnded"
    assert heard.text(turn.id) == shown.answer
    session.stop()


def test_stop_before_the_peer_has_said_anything(session: ChatSession, heard: Heard, peer: Peer) -> None:
    peer.scripts = [["hold"]]
    (turn,) = session.send("Hello?")
    assert peer.asked.wait(PATIENCE)
    session.stop()
    assert session.wait(PATIENCE)
    assert heard.about(turn.id) == ["TurnStarted", "TurnEnded"]
    assert peer.gone.wait(PATIENCE)
    assert session.conversation.turn(turn.id).finish_reason == "cancelled"


def test_stop_in_the_midst_of_the_start(session: ChatSession, heard: Heard, peer: Peer) -> None:
    """A listener stops what it hears of first, before anybody was asked."""
    peer.scripts = [["hold"]]
    end = session.listen(lambda event: session.stop() if isinstance(event, TurnStarted) else None)
    for _ in range(30):
        (turn,) = session.send("Hello?")
        assert session.wait(PATIENCE)
        assert heard.about(turn.id) == ["TurnStarted", "TurnEnded"]
    end()
    assert {each.finish_reason for each in session.conversation.turns} == {"cancelled"}


class StoppedBefore(Conversation):
    """Stops its session at the last moment before the request goes out."""

    session: ChatSession

    def asking(self, turn_id: str, left_out: int = 0) -> tuple[Message, ...]:
        self.session.stop()
        return super().asking(turn_id, left_out)


def test_stop_at_the_last_moment_leaves_no_thread_reading(make: Callable[..., ChatSession], peer: Peer) -> None:
    peer.scripts = [["hold"]]
    conversation = StoppedBefore()
    conversation.session = session = make(conversation=conversation)
    session.send("Hello?")
    assert session.wait(PATIENCE)
    assert session.conversation.path[0].finish_reason == "cancelled"
    assert eventually(lambda: "mistral-nb chat" not in [thread.name for thread in threading.enumerate()])


def test_one_question_at_a_time(session: ChatSession, heard: Heard, peer: Peer) -> None:
    peer.scripts = [[head(), "drip"]]
    (turn,) = session.send("First")
    heard.until(TextAdded)
    for again in (session.regenerate, session.retry, lambda name: session.edit(name, "x"), session.send, session.ask):
        with pytest.raises(ChatBusy, match="wait for it, or stop it first"):
            again(turn.id)
    assert len(session.conversation.turns) == 1


def test_of_threads_that_send_together_one_is_taken(session: ChatSession, peer: Peer) -> None:
    peer.scripts = [["hold"]]
    ready = threading.Barrier(8)
    outcomes: list[str] = []

    def send() -> None:
        ready.wait(PATIENCE)
        try:
            session.send("Mine")
        except ChatBusy:
            outcomes.append("busy")
        else:
            outcomes.append("taken")

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(outcomes) == ["busy"] * 7 + ["taken"]
    assert len(session.conversation.turns) == 1


def test_what_nobody_could_be_asked_is_refused_at_once(session: ChatSession) -> None:
    for bad in ("", " \n", "x" * 200_000, "\ud800"):
        with pytest.raises(InvalidRequest):
            session.send(bad)
    with pytest.raises(InvalidRequest, match="nobody to compare with"):
        session.send("x", compare=True)
    assert session.conversation.turns == ()


def test_deleting_a_running_turn_ends_it(session: ChatSession, heard: Heard, peer: Peer) -> None:
    peer.scripts = [[head(), "drip"], says("after")]
    (turn,) = session.send("Go on")
    heard.until(TextAdded, 2)
    session.conversation.delete(turn.id)
    assert not session.busy
    assert session.conversation.turns == ()
    assert session.wait(PATIENCE)
    assert peer.gone.wait(PATIENCE)
    (ended,) = heard.of(TurnEnded)
    assert (ended.turn.finish_reason, heard.whys) == ("cancelled", ["delete"])
    session.send("After")
    assert session.wait(PATIENCE)
    assert session.conversation.undo() == "delete"
    back = session.conversation.turn(turn.id)
    assert (back.finish_reason, back.running) == ("cancelled", False)
    assert back.answer.startswith("drip ")
    assert [each.answer for each in session.conversation.branches(turn.id)] == [back.answer, "after"]


def test_clearing_and_loading_end_what_runs(session: ChatSession, heard: Heard, peer: Peer) -> None:
    """Also where what is loaded has a turn of the same id."""
    peer.scripts = [[head(), "drip"]]
    loaded: list[Turn] = []

    def load() -> None:
        other = Conversation.from_json(session.conversation.to_json())
        loaded.extend(other.turns)
        session.conversation.replace_with(other)

    for number, remove in enumerate((session.conversation.clear, load), 1):
        session.send("Go on")
        heard.until(TextAdded, 3 * number)
        remove()
        assert not session.busy
        assert session.wait(PATIENCE)
    assert heard.whys == ["clear", "load"]
    assert session.conversation.turns == tuple(loaded)


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_listener_that_raises_stops_nothing(
    kind: type[BaseException], session: ChatSession, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.scripts = [says("a", "b")]

    def broken(event: object) -> None:
        raise kind("mine")

    session.listen(broken)
    heard = Heard()
    end = session.listen(heard)
    (turn,) = session.send("Hello")
    assert session.wait(PATIENCE)
    assert heard.text(turn.id) == "ab"
    assert session.conversation.turn(turn.id).finish_reason == "stop"
    assert {record.exc_info and record.exc_info[0] for record in caplog.records} == {kind}
    end()
    count = len(heard.events)
    session.conversation.clear()
    assert session.wait(PATIENCE)
    assert len(heard.events) == count


def test_a_listener_that_is_slow_holds_nobody_up(session: ChatSession, peer: Peer) -> None:
    peer.scripts = [says("a", "b"), says("c")]
    gate = threading.Event()

    def slow(event: object) -> None:
        gate.wait(PATIENCE)

    session.listen(slow)
    try:
        assert session.ask("One").text == "ab"
        session.send("Two")
        session.stop()
        assert not session.wait(0.01)
        session.conversation.clear()
    finally:
        gate.set()
    assert session.wait(PATIENCE)


def test_a_listener_may_use_the_session(session: ChatSession, heard: Heard, peer: Peer) -> None:
    """It deletes, sends the next question, and waits, though no event can come meanwhile."""
    peer.scripts = [says("one"), says("two")]
    waited: list[bool] = []

    def next_question(event: object) -> None:
        if isinstance(event, TurnEnded) and event.turn.prompt == "first":
            assert not session.busy
            session.conversation.delete(event.turn.id)
            session.send("second")
            waited.append(session.wait(PATIENCE))

    session.listen(next_question)
    session.send("first")
    heard.until(TurnEnded, 2)
    assert session.wait(PATIENCE)
    assert waited == [True]
    assert [(each.prompt, each.answer) for each in session.conversation] == [("second", "two")]


def test_ask_gives_the_result_or_raises_what_failed(session: ChatSession, peer: Peer) -> None:
    peer.scripts = [says("yes"), fails(10000, "no", "401 No"), [head(), frame({"response": "half"})]]
    result = session.ask("Well?", attachments=[Attachment("cell", "In [1]", "1")])
    assert (result.text, result.finish_reason, result.footer) == ("yes", "stop", session.conversation.path[0].footer)
    with pytest.raises(AuthenticationError):
        session.ask("And?")
    with pytest.raises(StreamTruncated) as caught:
        session.ask("So?")
    assert caught.value.result
    assert (caught.value.result.text, caught.value.result.finish_reason) == ("half", "truncated")
    assert [each.finish_reason for each in session.conversation] == ["stop", "error", "truncated"]
    with pytest.raises(InvalidRequest):
        session.ask("")


def test_ask_returns_what_another_thread_stopped(session: ChatSession, heard: Heard, peer: Peer) -> None:
    peer.scripts = [[head(), "drip"]]

    def stop() -> None:
        heard.until(TextAdded, 2)
        session.stop()

    thread = threading.Thread(target=stop)
    thread.start()
    result = session.ask("Go on")
    thread.join(PATIENCE)
    assert result.finish_reason == "cancelled"
    assert result.text == session.conversation.path[0].answer


def test_settings_that_are_wrong_are_told_in_the_turn(make: Callable[..., ChatSession], peer: Peer) -> None:
    session = make(cloudflare_account_id="")
    with pytest.raises(MistralError, match="CLOUDFLARE_ACCOUNT_ID"):
        session.ask("Hello")
    (turn,) = session.conversation
    assert (turn.finish_reason, turn.footer, turn.served) == ("error", "", None)
    session = make(unheard_of=1)
    session.send("Hello")
    assert session.wait(PATIENCE)
    assert "unheard_of" in (session.conversation.path[0].error or "")


def test_an_unexpected_failure_ends_the_turn(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    session = ChatSession(settings=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    session.send("Hello")
    assert session.wait(PATIENCE)
    assert session.conversation.path[0].error == "ZeroDivisionError: division by zero. Ask again"
    assert caplog.records


def test_without_a_thread_to_be_had_the_turn_fails_and_is_heard_of_later(
    session: ChatSession, heard: Heard, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        (turn,) = session.send("Hello")
        assert not session.busy
        assert not session.wait(PATIENCE)
    assert "can't start new thread" in (session.conversation.turn(turn.id).error or "")
    assert session.wait(PATIENCE)
    assert heard.about(turn.id) == ["TurnStarted", "TurnEnded"]


def test_statuses_are_said(make: Callable[..., ChatSession], peer: Peer) -> None:
    session, heard = make(retry_deadline=600.0), Heard()
    session.listen(heard)
    peer.scripts = [fails(3040, "No capacity", "429 No"), says("ok")]
    (turn,) = session.send("Hello")
    assert session.wait(PATIENCE)
    assert session.conversation.turn(turn.id).answer == "ok"
    assert "No capacity" in heard.of(StatusSaid)[0].status


def test_a_slow_stream_arrives_piece_by_piece(session: ChatSession, heard: Heard, peer: Peer) -> None:
    gates = [threading.Event() for _ in range(3)]
    steps = [step for number, gate in enumerate(gates) for step in (gate, frame({"response": f"{number} "}))]
    peer.scripts = [[head(), *steps, frame("[DONE]")]]
    (turn,) = session.send("Count")
    for number, gate in enumerate(gates, 1):
        gate.set()
        heard.until(TextAdded, number)
        assert session.conversation.turn(turn.id).answer == heard.text(turn.id)
    assert session.wait(PATIENCE)
    assert session.conversation.turn(turn.id).answer == "0 1 2 "


def test_two_sessions_do_not_mind_each_other(make: Callable[..., ChatSession], peer: Peer) -> None:
    peer.scripts = [[head(), "drip"], says("second")]
    one, other, heard = make(), make(), Heard()
    one.listen(heard)
    one.send("Go on")
    heard.until(TextAdded)
    assert other.ask("Hello").text == "second"
    assert one.busy
    assert ACCOUNT in peer.seen[0].path
