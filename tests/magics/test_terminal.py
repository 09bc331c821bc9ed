"""Terminal IPython in a real pseudo terminal."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.backends.scripted import PATIENCE, Peer, frame, head
from tests.models.hub_server import Fault, HubServer

pexpect = pytest.importorskip("pexpect", reason="pexpect drives the terminal; it is not there on Windows")

SHARD = "model-00002-of-00003.safetensors"
PROMPT = r"In \[\d+\]: $"


@pytest.fixture
def terminal(cloud: Peer) -> Iterator[pexpect.spawn]:
    command = ["-m", "IPython", "--no-banner", "--no-confirm-exit", "--simple-prompt", "--no-term-title"]
    variables = {**os.environ, "TERM": "xterm"}
    child = pexpect.spawn(sys.executable, command, env=variables, encoding="utf-8", timeout=300, dimensions=(50, 200))
    try:
        child.expect(PROMPT)
        child.sendline("%load_ext mistral_nb")
        child.expect(PROMPT)
        yield child
    finally:
        child.close(force=True)


def test_text_runs_status_is_wiped_and_the_footer_is_dim(cloud: Peer, terminal: pexpect.spawn) -> None:
    first, second = threading.Event(), threading.Event()
    cloud.scripts = [
        [first, head(), frame({"response": "Once "}), second, frame({"response": "upon"}), frame("[DONE]")]
    ]
    terminal.sendline("%mistral Tell me.")
    terminal.expect(r"\r\x1b\[KAsking [^\r\n]* …")
    first.set()
    terminal.expect(r"\r\x1b\[KOnce ")
    second.set()
    terminal.expect(r"upon\r\n\x1b\[2m[^\x1b]*cloudflare[^\x1b]*\x1b\[0m\r\n")
    terminal.expect(r"<Result, shown above>")
    terminal.expect(PROMPT)
    terminal.sendline("print(_.text.upper())")
    terminal.expect("ONCE UPON")


def test_a_pull_has_a_bar_and_an_interrupt_keeps_what_was_fetched(hub: HubServer, terminal: pexpect.spawn) -> None:
    fault = hub.fail(SHARD, Fault("stalled", at=500_000))
    terminal.setwinsize(50, 60)
    terminal.sendline("%mistral pull org/tiny")
    terminal.expect(r"\r\x1b\[KDownloading +\d+%  █[█░]{9}  [\d.]+ of [\d.]+ MB")
    assert fault.happened.wait(PATIENCE)
    terminal.sendintr()
    terminal.expect(r"\r\x1b\[K■ stopped here: [^\r\n]*kept[^\r\n]*\([\d.]+ [kM]B\)[^\r\n]*goes on from there")
    terminal.expect("KeyboardInterrupt: stopped")
    terminal.expect(PROMPT)
    fault.over.set()
    terminal.sendline("%mistral pull org/tiny")
    terminal.expect(r"org--tiny is in [^\r\n]*/org--tiny\r\n")


def test_an_interrupt_keeps_the_text(cloud: Peer, terminal: pexpect.spawn) -> None:
    cloud.scripts = [[head(), frame({"response": "Once upon"}), "hold"], [head(), frame({"response": "Next."})]]
    terminal.sendline("%mistral Tell me. -o half")
    terminal.expect("Once upon")
    terminal.sendintr()
    terminal.expect("stopped here")
    terminal.expect("KeyboardInterrupt: stopped")
    terminal.expect(PROMPT)
    terminal.sendline("print(half.finish_reason, half.text)")
    terminal.expect("cancelled Once upon")
    terminal.expect(PROMPT)
    terminal.sendline("%mistral Go on.")
    terminal.expect("Next.")
