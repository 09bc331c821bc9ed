"""A candidate that ends the process which is to judge it is no candidate that is right: in every door an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_nb import cli
from mistral_nb.errors import MistralError
from mistral_nb.kernel_bench import BenchProcess, start
from tests.backends.scripted import PATIENCE
from tests.test_kernel_bench import ENVIRONMENT

DIRECT = [sys.executable, "-m", "mistral_nb_kernels.bench"]
ASKED = ("--dtype", "fp32", "--device", "cpu", "--check-only")
RIGHT = """
def swiglu(gate_up):
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)
"""
ENDS = "import os\n\ndef swiglu(gate_up):\n    os._exit(0)\n"
SAID = (
    "the candidate ended the process before it was judged (exit status 0) in swiglu 3 rows of 2 x 1, fp32: candidate."
)
LEFT = "import json, os, signal, sys\ndef leave(**what): print(json.dumps(what), file=open(os.environ[{!r}], 'a'))\n"


@pytest.fixture
def candidate(tmp_path: Path) -> Callable[[str], str]:
    def written(text: str) -> str:
        path = tmp_path / "candidate.py"
        path.write_text(text)
        return str(path)

    return written


def test_of_the_command_itself(candidate: Callable[[str], str]) -> None:
    command = [*DIRECT, "candidate", "swiglu", candidate(ENDS), *ASKED, "--events"]
    ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    *_, error, end = map(json.loads, ran.stdout.splitlines())
    assert error == {"event": "error", "text": f"{SAID} Correct that, and run it again"}
    assert end == {"event": "end", "complete": False, "saved": None}


def test_of_mistral_nb(candidate: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "kernels", "candidate", "swiglu", candidate(ENDS), *ASKED]) == 1
    assert capfd.readouterr() == ("", f"mistral-nb: {SAID} Correct that, and run it again\n")


def test_of_the_magics() -> None:
    with start(["candidate", "swiglu", "-", *ASKED], ENDS) as process, pytest.raises(MistralError) as caught:
        list(process)
    assert str(caught.value) == f"{SAID} Correct that, and run it again"


def test_a_verdict_is_the_exit_status_whatever_the_process_ends_with(
    candidate: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a wrong one that hides its status when all is told."""
    wrong = "import atexit, os\natexit.register(os._exit, 0)\n" + RIGHT.replace("* up", "* up.roll(1)")
    assert cli.main(["bench", "kernels", "candidate", "swiglu", candidate(wrong), *ASKED]) == 1
    assert "expected" in capfd.readouterr().out


def test_sys_exit_where_nobody_catches_it_is_an_error_in_words(
    candidate: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a function in the place of one that draws the op's numbers."""
    text = f"import sys, torch\n{RIGHT}\ndef at_once(seed):\n    sys.exit(0)\ntorch.manual_seed = at_once\n"
    assert cli.main(["bench", "kernels", "candidate", "swiglu", candidate(text), *ASKED]) == 1
    words = (
        "error: the candidate ended the process before it was judged (SystemExit: 0). Correct that, and run it again"
    )
    assert capfd.readouterr().err.strip() == words


@pytest.mark.parametrize("text", ["raise KeyboardInterrupt", "def swiglu(gate_up):\n    raise KeyboardInterrupt\n"])
def test_an_interrupt_that_nobody_sent_is_an_error(
    text: str, candidate: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "kernels", "candidate", "swiglu", candidate(text), *ASKED]) == 1
    assert "the candidate ended the process before it was judged (KeyboardInterrupt)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        ("leave(status=0)", 0, ""),
        ("leave(status=2); sys.exit(0)", 2, ""),
        ("leave(status=0); sys.exit(3)", 3, ""),
        ("leave(status=0); os.kill(os.getpid(), signal.SIGKILL)", 128 + signal.SIGKILL, ""),
        ("", 1, "(exit status 0). Correct"),
        ("leave(doing='a'); leave(doing='b'); os.kill(os.getpid(), signal.SIGKILL)", 1, "(killed by SIGKILL) in b. C"),
    ],
)
def test_what_a_trail_comes_to(code: str, status: int, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    from mistral_nb_kernels.bench.trail import VARIABLE, watched

    assert watched([sys.executable, "-c", LEFT.format(VARIABLE) + code], events=False) == status
    shown = capfd.readouterr().err
    assert words in shown
    assert bool(words) == bool(shown)


WAITING = """
import os, signal, threading
kept = os.open({!r}, os.O_WRONLY)
def stop(number, frame):
    os.write(kept, b"interrupted\\n")
    os._exit(0)
signal.signal(signal.SIGINT, stop)
os.write(kept, b"here\\n")
while True:
    threading.Event().wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_of_who_watches_reach_the_candidate(tmp_path: Path, number: signal.Signals) -> None:
    """A terminal's interrupt may end it in its own way; with who watches it ends at once."""
    from mistral_nb_kernels.bench.trail import watched

    fifo, told = tmp_path / "alive", []
    os.mkfifo(fifo)

    def signalled() -> None:
        with fifo.open() as alive:
            told.append(alive.readline())
            os.kill(os.getpid(), number)
            told.append(alive.read())

    former = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=signalled, daemon=True)
    thread.start()
    try:
        ended = watched([sys.executable, "-c", WAITING.format(str(fifo))], events=False)
    except SystemExit as error:
        ended = error.code
    thread.join(PATIENCE)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == former
    if number == signal.SIGINT:
        assert (ended, told) == (130, ["here\n", "interrupted\n"])
    else:
        assert (ended, told) == (128 + signal.SIGTERM, ["here\n", ""])


def test_a_script_without_a_trail_is_judged_by_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is ours: it has no verdict to tell."""
    monkeypatch.setattr(BenchProcess, "program", ("-c", "import sys; sys.exit(0)"))
    assert cli.main(["bench", "kernels", "norm"]) == 0
    assert cli.main(["bench", "kernels", "candidate"]) == 1
