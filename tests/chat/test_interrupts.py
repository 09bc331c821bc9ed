"""Interrupts in `ask`, and an interpreter that ends while an answer runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mistral_nb.chat import ChatSession, Conversation, TextAdded, Turn, TurnEnded
from tests.backends.scripted import PATIENCE, TOKEN, Peer, frame, head
from tests.chat.conftest import ACCOUNT, Heard


@pytest.fixture
def interruptible() -> Iterator[None]:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def interrupt() -> None:
    main = threading.main_thread().ident
    assert main
    signal.pthread_kill(main, signal.SIGINT)


@pytest.mark.parametrize("begun", [True, False])
def test_an_interrupt_stops_the_answer_and_keeps_the_text(
    begun: bool, session: ChatSession, heard: Heard, peer: Peer, interruptible: None
) -> None:
    peer.scripts = [[head(), frame({"response": "so far"}), "hold"] if begun else ["hold"]]

    def press() -> None:
        if begun:
            heard.until(TextAdded)
        else:
            assert peer.asked.wait(PATIENCE)
        interrupt()

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt) as caught:
        session.ask("Go on")
    thread.join(PATIENCE)
    text = "so far" if begun else ""
    assert (caught.value.result.text, caught.value.result.finish_reason) == (text, "cancelled")  # type: ignore[attr-defined]
    (turn,) = session.conversation
    assert (turn.answer, turn.finish_reason) == (text, "cancelled")
    assert not session.busy
    assert peer.gone.wait(PATIENCE)
    assert session.wait(PATIENCE)
    assert len(heard.of(TurnEnded)) == 1


class Interrupted(Conversation):
    """An interrupt comes just after a question was put into it."""

    def add(self, *turns: Turn) -> None:
        super().add(*turns)
        raise KeyboardInterrupt

    def change(self, turn_id: str, **changes: Any) -> Turn:
        super().change(turn_id, **changes)
        if changes.get("finish_reason", "") is None:
            raise KeyboardInterrupt
        return self.turn(turn_id)


def test_an_interrupt_before_anybody_is_asked_leaves_no_turn_running(make: Callable[..., ChatSession]) -> None:
    session = make(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        session.ask("Go on")
    (turn,) = session.conversation
    assert (turn.finish_reason, session.busy) == ("cancelled", False)
    with pytest.raises(KeyboardInterrupt):
        session.retry(turn.id)
    assert session.conversation.turn(turn.id).finish_reason == "cancelled"


def test_an_interrupt_before_its_thread_begins_leaves_no_turn_running(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    session.listen(lambda event: None)
    assert session.wait(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(
            "mistral_nb.chat.session.threading.Thread", type("Never", (threading.Thread,), {"start": interrupted})
        )
        with pytest.raises(KeyboardInterrupt):
            session.send("Go on")
    (turn,) = session.conversation
    assert (turn.finish_reason, session.busy) == ("cancelled", False)


PROGRAM = """
    import sys, threading
    from mistral_nb.chat import ChatSession, Choice, TextAdded

    begun = threading.Event()
    session = ChatSession(choice=Choice(backend="cloudflare"))
    session.listen(lambda event: begun.set() if isinstance(event, TextAdded) else None)
    session.send("Go on")
    assert begun.wait(180)
    print("leaving")
"""


def test_the_interpreter_ends_quietly_while_an_answer_runs(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    peer.scripts = [[head(), "drip"]]
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", ACCOUNT)
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", TOKEN)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_BASE_URL", peer.url)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_TRUST_BASE_URL", "true")
    program = [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
    assert peer.gone.wait(PATIENCE)
