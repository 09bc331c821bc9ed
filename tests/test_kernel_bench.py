"""The kernel bench's process as those who start it see it: real processes that play a script, and real signals."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import cli, kernel_bench
from mistral_nb.errors import MistralError
from mistral_nb.kernel_bench import BenchProcess, BenchUsage, start
from tests.backends.scripted import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "magics")))}
ENVIRONMENT.pop("TRITON_INTERPRET", None)
TELL = """
import json, os, signal, subprocess, sys, threading
def tell(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)
def doing(text):
    tell("doing", text=text, done=0, total=1)
"""
END = {"event": "end", "complete": False, "saved": None}
Script = Callable[..., BenchProcess]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A bench that runs this code instead, with what helps to tell events."""

    def made(code: str, *arguments: str, **options: Any) -> BenchProcess:
        monkeypatch.setattr(BenchProcess, "program", ("-c", TELL + textwrap.dedent(code)))
        return BenchProcess(arguments, **options)

    return made


def until(process: BenchProcess, kind: str) -> dict[str, Any]:
    return next(event for event in process if event["event"] == kind)


def test_events_come_in_their_order_and_prints_of_libraries_are_not_among_them(script: Script) -> None:
    code = """
    print("a library's words", file=sys.stderr)
    doing("norm")
    tell("rows", rows=[{"us": 1.5, "case": "ä"}])
    tell("end", complete=True, saved="x.json")
    """
    with script(code) as process:
        events = list(process)
    assert [event["event"] for event in events] == ["doing", "rows", "end"]
    assert events[1]["rows"] == [{"us": 1.5, "case": "ä"}]
    assert events[2] == {"event": "end", "complete": True, "saved": "x.json"}
    assert list(process) == []


def test_it_gets_arguments_source_sources_and_no_secrets(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", "secret-token")
    source = "def f(x):\n    return x\n" * 20_000  # more than a pipe holds
    code = """
    import importlib.util
    assert importlib.util.find_spec("mistral_nb_kernels")
    text = sys.stdin.read()
    tell("got", arguments=sys.argv[1:], length=len(text), token="CLOUDFLARE_API_TOKEN" in os.environ,
         apart=os.getsid(0) == os.getpid())
    tell("end", complete=True, saved=None)
    """
    with script(code, "norm", "--seq", "8", source=source) as process:
        got = until(process, "got")
    assert got["arguments"] == ["norm", "--seq", "8", "--events"]
    assert (got["length"], got["token"], got["apart"]) == (len(source), False, True)


def test_without_a_source_its_input_is_empty(script: Script) -> None:
    with script("tell('got', text=sys.stdin.read())") as process:
        assert until(process, "got")["text"] == ""


def test_an_error_is_raised_in_its_own_words_after_all_events(script: Script) -> None:
    code = """
    tell("error", text="x.json cannot be read")
    tell("end", complete=False, saved=None)
    sys.exit(1)
    """
    with script(code) as process:
        assert next(process) == END
        with pytest.raises(MistralError, match=r"^x\.json cannot be read$") as caught:
            next(process)
    assert not isinstance(caught.value, BenchUsage)


def test_wrong_usage_is_an_error_of_its_own(script: Script) -> None:
    with script("tell('error', text='argument --seq: 0'); sys.exit(2)") as process:
        assert next(process) == END
        with pytest.raises(BenchUsage, match=r"^argument --seq: 0$"):
            next(process)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"killed by SIGSEGV\) in the case x, and said last: on its way"),
        ("sys.exit(3)", r"exit status 3\) in the case x, and said last: on its way"),
        ("raise ValueError('no such thing')", r"exit status 1\) in the case x, and said last: ValueError: no such th"),
    ],
)
def test_a_process_that_dies_is_told(script: Script, end: str, words: str) -> None:
    with script(f"doing('the case x'); print('on its way', file=sys.stderr, flush=True); {end}") as process:
        assert until(process, "end") == END
        with pytest.raises(MistralError, match=words):
            next(process)


def test_a_line_that_was_cut_is_no_event(script: Script) -> None:
    code = """
    doing("x")
    os.write(1, b'{"event": "tab')
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with script(code) as process:
        assert [next(process)["event"], next(process)["event"]] == ["doing", "end"]
        with pytest.raises(MistralError, match="SIGKILL"):
            next(process)


LISTENING = """
stopped = []
def stop(number, frame):
    stopped.append(number)
    if len(stopped) == 1:
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, stop)
try:
    doing("a long case")
    threading.Event().wait()
except KeyboardInterrupt:
    tell("rows", rows=stopped)
    tell("end", complete=False, saved="kept.json")
    sys.exit(130)
"""


def test_an_interrupt_is_sent_once_and_events_go_on_to_their_end(script: Script) -> None:
    with script(LISTENING) as process:
        until(process, "doing")
        process.interrupt()
        process.interrupt()
        rest = list(process)
        process.interrupt()
    assert rest == [{"event": "rows", "rows": [signal.SIGINT]}, {**END, "saved": "kept.json"}]


def test_an_interrupt_from_another_thread_ends_a_reader(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process that does not heed it."""
    monkeypatch.setattr(kernel_bench, "GRACE", 0.2)
    code = """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    doing("a kernel without an end")
    while True:
        pass
    """
    with script(code) as process:
        until(process, "doing")
        events: list[dict[str, Any]] = []
        reader = threading.Thread(target=lambda: events.extend(process))
        reader.start()
        process.interrupt()
        reader.join(PATIENCE)
    assert events == [END]


PATIENT = """
try:
    doing("a case")
    threading.Event().wait()
except KeyboardInterrupt:
    tell("rows", rows=[1])
    open(sys.argv[1]).read()
    tell("end", complete=False, saved="kept.json")
"""


def test_who_heeds_an_interrupt_has_time_for_pictures(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than others have to heed it."""
    go = tmp_path / "go"
    os.mkfifo(go)
    with script(PATIENT, str(go)) as process:
        until(process, "doing")
        process.interrupt()
        until(process, "rows")
        monkeypatch.setattr(kernel_bench, "GRACE", 0.0)
        events: list[dict[str, Any]] = []
        reader = threading.Thread(target=lambda: events.extend(process))
        reader.start()
        reader.join(0.1)
        go.write_text("on")
        reader.join(PATIENCE)
    assert events == [{**END, "saved": "kept.json"}]


def test_but_not_all_the_time(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    monkeypatch.setattr(kernel_bench, "LONGEST", 0.2)
    with script(PATIENT, str(go)) as process:
        until(process, "doing")
        process.interrupt()
        assert list(process)[-1] == END


def test_silence_after_a_doing_is_an_endless_loop(script: Script) -> None:
    with script("doing('8 tokens, fp16')\nwhile True: pass", patience=0.2) as process:
        assert [event["event"] for event in (next(process), next(process))] == ["doing", "end"]
        with pytest.raises(MistralError) as caught:
            next(process)
    assert str(caught.value) == (
        "ran for more than 0.2 s in 8 tokens, fp16: an endless loop? --timeout raises the limit"
    )


def test_silence_after_the_rows_may_be_ten_times_as_long(script: Script) -> None:
    """What was measured is drawn then, and compiled."""
    code = "tell('rows', rows=[]); doing('compiling for sm_90')\nwhile True: pass"
    with script(code, patience=0.05) as process:
        assert [event["event"] for event in itertools.islice(process, 3)] == ["rows", "doing", "end"]
        with pytest.raises(MistralError, match=r"^ran for more than 0\.5 s in compiling for sm_90: "):
            next(process)


def test_silence_before_anything_is_done_is_none(script: Script, tmp_path: Path) -> None:
    """A process may be long in loading: this one waits to be told that a reader has been without an event."""
    go = tmp_path / "go"
    os.mkfifo(go)
    code = f"""
    open({str(go)!r}).read()
    tell("end", complete=True, saved=None)
    """
    with script(code, patience=0.001) as process:
        events: list[dict[str, Any]] = []
        reader = threading.Thread(target=lambda: events.extend(process))
        reader.start()
        reader.join(0.1)
        go.write_text("on")
        reader.join(PATIENCE)
    assert [event["complete"] for event in events] == [True]


@pytest.mark.parametrize("end", ["close", "its own"])
def test_what_it_started_ends_with_it(script: Script, tmp_path: Path, end: str) -> None:
    """A process of its group holds a pipe open for as long as it lives, and the standard output too."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    code = f"""
    program = "import sys, threading; kept = open({str(fifo)!r}, 'w'); print(file=sys.stderr); threading.Event().wait()"
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    child.stderr.readline()
    doing("x")
    {"threading.Event().wait()" if end == "close" else "tell('end', complete=True, saved=None)"}
    """
    process = script(code)
    with fifo.open() as alive:
        if end == "close":
            until(process, "doing")
        else:
            assert [event["event"] for event in process] == ["doing", "end"]
        process.close()
        assert alive.read() == ""


ITERATING = """
with BenchProcess([]) as process:
    try:
        for event in process:
            print(event["event"], flush=True)
    except KeyboardInterrupt:
        process.interrupt()
        for event in process:
            print(event, flush=True)
"""
COMMAND = """
from mistral_nb.cli import main
sys.exit(main(["bench", "kernels", "norm"]))
"""


def beginning(code: str) -> subprocess.Popen[str]:
    """A process with a group of its own, in which the bench is a script that listens."""
    code = f"import sys\nfrom mistral_nb.kernel_bench import BenchProcess\nBenchProcess.program = {PROGRAM!r}\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


PROGRAM = ("-c", TELL + LISTENING)


def test_an_interrupt_of_who_iterates_loses_nothing() -> None:
    """The group of a notebook's kernel is told, which its bench is none of."""
    with beginning(ITERATING) as process:
        assert process.stdout
        assert process.stdout.readline() == "doing\n"
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=PATIENCE)
    told = [{"event": "rows", "rows": [signal.SIGINT.value]}, {**END, "saved": "kept.json"}]
    assert (rest, errors) == ("".join(f"{event}\n" for event in told), "")
    assert process.returncode == 0


@pytest.mark.parametrize("whole_group", [True, False])
def test_an_interrupt_of_the_command_is_one_of_the_bench(whole_group: bool) -> None:
    with beginning(COMMAND) as process:
        assert process.stdout
        assert json.loads(process.stdout.readline())["event"] == "doing"
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (130, "")
    assert json.loads(rest.splitlines()[-1]) == {**END, "saved": "kept.json"}


HEARING = """
def stop(number, frame):
    doing("hears it, and goes on")
signal.signal(signal.SIGINT, stop)
doing("a kernel without an end")
while True:
    threading.Event().wait()
"""


def test_the_second_interrupt_of_the_command_kills_a_bench_that_goes_on() -> None:
    at_once = "from mistral_nb import kernel_bench\nkernel_bench._AGAIN = 0.0"
    program = f"BenchProcess.program = {('-c', TELL + HEARING)!r}"
    with beginning(f"{at_once}\n{program}\n{COMMAND}") as process:
        assert process.stdout
        for _ in range(2):
            assert json.loads(process.stdout.readline())["event"] == "doing"
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=PATIENCE)[1] == ""
    assert process.returncode == 130


DEAF = """
import re
kept = open({!r}, "w")
print("here", file=kept, flush=True)
re.match("(a+)+$", "a" * 60 + "b")  # gives no other thread a turn, for years
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another system's processes go on")
@pytest.mark.parametrize(("how", "number"), [("command", signal.SIGKILL), ("events", signal.SIGTERM)])
def test_a_candidate_that_never_ends_ends_with_who_started_it(tmp_path: Path, how: str, number: signal.Signals) -> None:
    fifo, text = tmp_path / "alive", tmp_path / "candidate.py"
    os.mkfifo(fifo)
    text.write_text(DEAF.format(str(fifo)))
    arguments = ["candidate", "swiglu", str(text), "--device", "cpu"]
    codes = {
        "command": f"from mistral_nb import cli; cli.main(['bench', 'kernels', *{arguments!r}])",
        "events": f"from mistral_nb.kernel_bench import start\nwith start({arguments!r}) as process: list(process)",
    }
    command = [sys.executable, "-c", codes[how]]
    with subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True) as process, fifo.open() as alive:
        assert alive.readline() == "here\n"
        process.send_signal(number)
        assert select.select([alive], [], [], PATIENCE)[0]
        assert alive.read() == ""


def test_the_command_passes_arguments_streams_and_status_on(
    script: Script, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print(sys.argv[1:], flush=True); sys.exit(int(sys.argv[-1]))"
    monkeypatch.setattr(BenchProcess, "program", ("-c", TELL + code))
    assert cli.main(["bench", "kernels", "norm", "--beside-engine", "--json", "x", "1"]) == 1
    assert capfd.readouterr().out == "['norm', '--json', 'x', '1']\n"
    assert cli.main(["bench", "kernels", "2"]) == 2
    assert cli.main(["bench", "--runs", "2", "kernels"]) == 1
    assert "the options of bench kernels come after it: mistral-nb bench kernels --help" in capfd.readouterr().err
    monkeypatch.setattr(BenchProcess, "program", ("-c", TELL + "os.kill(os.getpid(), signal.SIGKILL)"))
    assert cli.main(["bench", "kernels"]) == 1
    assert "killed by SIGKILL" in capfd.readouterr().err


WRONG = """
def swiglu(gate_up):
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).roll(1, -1).to(gate_up.dtype)
"""
ENDLESS = """
def swiglu(gate_up):
    while True:
        pass
"""


def test_an_interrupt_while_it_starts_ends_it() -> None:
    with start(["norm", "--device", "cpu"]) as process:
        process.interrupt()
        assert list(process) == [END]


def test_a_candidate_that_is_wrong_is_told_by_the_real_bench() -> None:
    with start(["candidate", "swiglu", "-", "--dtype", "fp32", "--device", "cpu"], WRONG) as process:
        failure = until(process, "failure")
        assert list(process)[-1] == {**END, "complete": True}
    assert "expected" in failure["text"]


def test_a_candidate_without_an_end_is_killed() -> None:
    asked = ["candidate", "swiglu", "-", "--dtype", "fp32", "--device", "cpu"]
    with start(asked, ENDLESS, patience=0.5) as process, pytest.raises(MistralError, match=r"more than 0\.5 s in .*"):
        list(process)


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MistralError, match=r'needs mistral_nb_kernels, torch: pip install "mistral-nb\[local\]"'):
        BenchProcess([])
