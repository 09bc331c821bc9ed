"""Interrupts in `ask`, and an interpreter that ends while an answer runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from mistral_nb.chat import ChatSession, TextAdded, TurnEnded
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


PROGRAM = """
    import sys, threading
    from mistral_nb.chat import ChatSession, Choice, TextAdded

    begun = threading.Event()
    session = ChatSession(choice=Choice(backend="cloudflare"))
    session.listen(lambda event: begun.set() if isinstance(event, TextAdded) else None)
    session.send("Go on")
    assert begun.wait(10)
    print("leaving")
"""


def test_the_interpreter_ends_quietly_while_an_answer_runs(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    peer.scripts = [[head(), "drip"]]
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", ACCOUNT)
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", TOKEN)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_BASE_URL", peer.url)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_TRUST_BASE_URL", "true")
    program = [sys.executable, "-W", "error", "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
    assert peer.gone.wait(PATIENCE)
