"""The bench's command in processes of its own: events, terminal, files, interrupts and exit statuses."""

from __future__ import annotations

import array
import base64
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mistral_nb_kernels.bench import run
from mistral_nb_kernels.bench.arguments import DTYPES, Help, Usage, parse
from mistral_nb_kernels.bench.events import KINDS, Printed
from mistral_nb_kernels.bench.measure import Begin, Event
from mistral_nb_kernels.bench.record import read
from mistral_nb_kernels.bench.registry import SUBJECTS
from mistral_nb_kernels.bench.show import Terminal
from tests.backends.scripted import eventually
from tests.kernels import scripted_bench
from tests.kernels.candidates import TRITON

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTED = (str(Path(__file__).with_name("scripted_bench.py")),)
REAL = ("-m", "mistral_nb_kernels.bench")
LIMIT = 120


def command(program: Sequence[str], *arguments: str) -> dict[str, Any]:
    """For `subprocess`: the command with the source roots, and a group of its own."""
    roots = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": roots}
    return {"args": [sys.executable, *program, *arguments], "env": env, "text": True, "start_new_session": True}


def done(program: Sequence[str], *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(program, *arguments), input=given, capture_output=True, timeout=LIMIT)


def events(text: str) -> list[dict[str, Any]]:
    """All of them are whole, and are what they are said to be."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(tuple(event) == ("event", *KINDS[event["event"]]) for event in found)
    return found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(event["event"] for event in found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A whole run by the script, saved; and its events."""
    path = tmp_path_factory.mktemp("measured") / "folder" / "old.json"
    ran = done(SCRIPTED, "100", "norm", "--save", str(path), "--note=beside an engine", "--events")
    assert ran.returncode == 0, ran.stderr
    assert "a library prints\n" in ran.stderr
    assert "and writes\n" in ran.stderr
    return path, events(ran.stdout)


def test_a_run_tells_what_it_does_and_then_what_it_came_to(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    path, told = measured
    assert kinds(told) == ["begin", "doing", "table", "rows", "figure", "note", "end"]
    assert told[0]["total"] == 3
    assert [event["text"] for event in told if event["event"] == "doing"][-1] == "add_rms_norm 2 tokens, fp32: eager"
    [rows] = [event["rows"] for event in told if event["event"] == "rows"]
    assert [(row["provider"], row["us"]) for row in rows] == [("eager", 100.0), ("eager", 200.0)]
    tables = [event for event in told if event["event"] == "table"]
    assert "no NVIDIA GPU with Triton" in tables[-1]["text"]
    assert "| add" in tables[-1]["markdown"] or "**add" in tables[-1]["markdown"]
    assert all(base64.b64decode(each["png"]).startswith(b"\x89PNG") for each in told if each["event"] == "figure")
    assert [event["text"] for event in told if event["event"] == "note"] == ["beside an engine"]
    assert told[-1] == {"event": "end", "complete": True, "saved": str(path)}


def test_the_file_says_all_that_a_number_needs(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    record = read(measured[0])
    assert record.command == ("python", "-m", "mistral_nb_kernels.bench", "norm", "--save", str(measured[0]))
    assert record.notes == ("beside an engine",)
    assert record.complete
    assert (record.machine["device"], record.when[-6:]) == ("A machine that plays a script", "+00:00")
    assert (len(record.rows), len(record.skipped)) == (2, 1)
    if (ROOT / ".git").exists():
        assert record.revision


def test_a_regression_is_told_and_is_the_exit_status(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    ran = done(SCRIPTED, "110", "norm", "--compare", str(measured[0]))
    assert (ran.returncode, ran.stderr) == (1, "")
    assert ran.stdout.startswith("a library prints")
    assert "\nRegression" in ran.stdout


def test_a_file_opens_as_it_was_measured(measured: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    path, told = measured
    ran = done(REAL, "--open", str(path), "--compare", str(path), "--plot", str(tmp_path / "new" / "plots"), "--events")
    assert ran.returncode == 0, ran.stderr
    again = events(ran.stdout)
    assert kinds(again) == ["table", "rows", "figure", "note", "verdict", "end"]
    tables = [[event for event in found if event["event"] == "table"][-1] for found in (told, again)]
    assert tables[0] == tables[1]
    figures = [[event for event in found if event["event"] == "figure"] for found in (told, again)]
    assert [each["png"] for each in figures[0]] == [each["png"] for each in figures[1]]
    for figure in figures[1]:
        assert Path(figure["saved"]).read_bytes() == base64.b64decode(figure["png"])
    [verdict] = [event for event in again if event["event"] == "verdict"]
    assert not verdict["regressed"]


def started(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(**command(SCRIPTED, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until(process: subprocess.Popen[str], words: str) -> str:
    """What it told up to a line with these words, and not a byte more: `communicate` reads on behind it."""
    assert process.stdout
    lines = [b""]
    while byte := os.read(process.stdout.fileno(), 1):
        lines[-1] += byte
        if byte == b"\n":
            if words.encode() in lines[-1]:
                return b"".join(lines).decode()
            lines.append(b"")
    raise AssertionError(f"{words!r} did not come: {b''.join(lines).decode()}")


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    with started("hang", "norm", "--save", str(path), "--events") as process:
        first = until(process, "2 tokens, fp32: eager")
        process.send_signal(signal.SIGINT)
        first += until(process, '"rows"')
        process.send_signal(signal.SIGINT)  # as where a terminal and a parent both tell
        rest, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    told = events(first + rest)
    assert told[-1] == {"event": "end", "complete": False, "saved": str(path)}
    assert {"rows", "figure"} <= set(kinds(told))
    record = read(path)
    assert not record.complete
    assert [row.us for row in record.rows] == [100.0]


def in_the_pipe(process: subprocess.Popen[str]) -> int:
    """Bytes that nobody has read yet."""
    assert process.stdout
    held = array.array("i", [0])
    fcntl.ioctl(process.stdout.fileno(), termios.FIONREAD, held)
    return held[0]


def test_an_interrupt_leaves_no_line_half_written() -> None:
    """The command waits for its reader in the middle of a line."""
    with started("large", "norm", "--events") as process:
        first = until(process, '"table"')
        assert eventually(lambda: in_the_pipe(process) > 60_000)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    told = events(first + rest)
    assert [len(event["text"]) > 1_000_000 for event in told if event["event"] == "doing"][-1]
    assert (told[-2]["event"], told[-1]["complete"]) in (("figure", False), ("note", False))


def test_an_interrupt_in_a_terminal_prints_what_was_measured(tmp_path: Path) -> None:
    """By Ctrl+C, which the whole group gets, and whose exception is lost where the case is measured."""
    with started("deaf", "norm", "--save", str(tmp_path / "kept.json")) as process:
        until(process, "nothing more comes")
        os.killpg(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (130, "")
    assert "2 tokens" in rest
    assert f"Results: {tmp_path / 'kept.json'}" in rest
    assert [row.us for row in read(tmp_path / "kept.json").rows] == [100.0, 200.0]


def test_a_process_that_nobody_reads_ends() -> None:
    """Also one that no longer listens, such as a kernel without an end."""
    with started("stuck", "norm", "--events") as process:
        until(process, "2 tokens, fp32: eager")
        assert process.stdout
        process.stdout.close()
        assert process.wait(LIMIT) == -signal.SIGKILL


def test_a_pipe_that_is_closed_is_no_error() -> None:
    with started("100", "norm") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command in this process, as in a terminal: its status, and what it wrote."""

    def played(plan: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(signal, "signal", lambda number, handler: None)
        for name in ("measure", "ceilings", "machine"):
            monkeypatch.setattr(scripted_bench.run, name, None)
        status = scripted_bench.played(plan, list(arguments))
        return status, *capfd.readouterr()

    return played


def test_an_error_of_the_bench_keeps_what_was_measured(
    tmp_path: Path, play: Callable[..., tuple[int, str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="the driver is gone"):
        play("die", "norm", "--save", str(tmp_path / "kept.json"))
    assert "1 tokens" in capfd.readouterr().out
    record = read(tmp_path / "kept.json")
    assert [row.us for row in record.rows] == [100.0]
    assert not record.complete


def test_usage_is_told_in_both_ways(play: Callable[..., tuple[int, str, str]]) -> None:
    words = "argument --seq: '0' is not a count: a whole number, 1 or more"
    ran = done(REAL, "norm", "--seq", "0", "--events")
    assert ran.returncode == 2
    assert events(ran.stdout) == [
        {"event": "error", "text": words},
        {"event": "end", "complete": False, "saved": None},
    ]
    status, out, errors = play("100", "norm", "--seq", "0")
    assert (status, out) == (2, "")
    assert errors.startswith("usage: ")
    assert errors.endswith(f"\nerror: {words}\n")
    status, out, errors = play("100", "--help")
    assert (status, errors) == (0, "")
    assert "--beside-engine" in out


def test_the_list_names_subjects_and_providers(play: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = play("100", "--list")
    assert status == 0
    for name, subject in SUBJECTS.items():
        assert f"{name} " in out
        assert all(provider.name in out for provider in subject.providers)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nrm", "argument SUBJECT: 'nrm' is no subject; did you mean norm?"),
        ("rope_write", "argument SUBJECT: rope_write is an op of the subject rope: measure that"),
        ("norm --dtype bf17", "argument --dtype: 'bf17' is no type; did you mean bf16?"),
        ("norm --dtype int8", "'int8' is no type; there are: bf16, fp16, fp32"),
        ("norm --batch -1", "--batch"),
        ("norm --providers eagr", "argument --providers: 'eagr' is no provider; did you mean eager?"),
        ("norm swiglu --providers cublas", "none of these runs norm, swiglu; there are: ours, eager, compile, liger"),
        ("--open x.json --seq 8", "leave out the subjects, --save, and what chooses what to measure"),
        ("norm --device gpu", "invalid choice: 'gpu'"),
        ("norm --tolerance none", "'none' is not a percentage: a number from 0 to 100"),
        ("sample --seq 8", "--seq is of attention, decode_attention, rope, linear, lora, norm, swiglu: leave it out"),
        ("norm --open x.json", "--open shows what was measured: leave out the subjects, --save"),
        ("norm --sav x.json", "unrecognized arguments: --sav x.json"),
        ("candidate", "the following arguments are required: OP, FILE"),
        ("candidate lora -", "argument OP: lora is two ops: lora_shrink and lora_expand"),
        ("candidate norm - --compile sm_42", "argument --compile: 'sm_42' is no architecture; "),
        ("candidate norm - --check-only --save x.json", "--check-only times nothing: leave out --save"),
    ],
)
def test_wrong_arguments_are_refused_with_what_there_is(arguments: str, words: str) -> None:
    with pytest.raises(Usage) as caught:
        parse(arguments.split())
    assert words in str(caught.value)
    assert caught.value.usage.startswith("usage: ")


def test_arguments_mean_what_they_say() -> None:
    words = ["norm", "--seq", "8,16", "32"]
    found = parse(
        [*words, "--dtype", "bf16,fp32", "--batch", "1", "--providers", "eager", "--tolerance", "5", "--json", "f"]
    )
    assert found.subjects == ("norm",)
    assert (found.asked.seq, found.asked.batch, found.asked.providers) == ((8, 16, 32), (1,), ("eager",))
    assert found.asked.dtypes == (torch.bfloat16, torch.float32)
    assert (found.asked.ops, found.tolerance, found.save) == ((), 0.05, Path("f"))
    assert parse(["norm", "--device", "cpu", "linear", "norm"]).subjects == ("norm", "linear")
    assert parse([]).subjects == tuple(SUBJECTS)
    candidate = parse(["candidate", "norm", "-", "--compile", "sm_80,90", "sm_90a", "--check-only", "--note", "a"])
    assert (candidate.op, candidate.asked.ops, candidate.file) == ("add_rms_norm", ("add_rms_norm",), "-")
    assert (candidate.archs, candidate.check_only, candidate.notes) == ((80, 90), True, ("a",))
    assert set(DTYPES) == {"bf16", "fp16", "fp32"}
    with pytest.raises(Help, match="candidate OP FILE"):
        parse(["-h"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--open", "nowhere.json"], "nowhere.json cannot be read (No such file or directory)"),
        (["norm", "--compare", "nowhere.json"], "nowhere.json cannot be read"),
        (["norm", "--save", "."], "--save: . is a folder; give the name of a file"),
        (["norm", "--save", "/dev/null/x.json"], "--save: /dev/null cannot be made"),
        (["norm", "--plot", "/dev/null/plots"], "--plot: /dev/null/plots cannot be made (Not a directory)"),
    ],
)
def test_what_would_be_in_vain_is_refused_first(
    arguments: list[str], words: str, play: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, errors = play("100", *arguments)
    assert (status, out) == (1, "")
    assert errors.startswith(f"error: {words}")


def test_results_of_another_device_are_refused_first(
    measured: tuple[Path, list[dict[str, Any]]], tmp_path: Path, play: Callable[..., tuple[int, str, str]]
) -> None:
    other = tmp_path / "other.json"
    other.write_text(measured[0].read_text().replace("plays a script", "plays another"))
    status, out, errors = play("100", "norm", "--compare", str(other))
    assert (status, out) == (1, "")
    assert "is of A machine that plays another, and this is A machine that plays a script" in errors


def test_a_candidate_is_checked_and_shown_as_machine_code_without_a_gpu() -> None:
    asked = ("swiglu", "-", "--dtype", "fp16", "--check-only", "--device", "cpu", "--compile", "sm_90", "--events")
    ran = done(REAL, "candidate", *asked, given=TRITON["swiglu"])
    assert ran.returncode == 0, ran.stderr
    told = events(ran.stdout)
    assert kinds(told) == ["doing", "begin", "rows", "note", "code", "report", "end"]
    assert {"event": "doing", "text": "compiling for sm_90", "done": 0, "total": 1} in told
    codes = {(event["kernel"], event["arch"], event["kind"]): event["text"] for event in told if "arch" in event}
    assert list(codes) == [("_swiglu", "sm_90", "ptx"), ("_swiglu", "sm_90", "sass")]
    assert ".target sm_90" in codes["_swiglu", "sm_90", "ptx"]
    assert "EXIT" in codes["_swiglu", "sm_90", "sass"]
    [report] = [event for event in told if event["event"] == "report"]
    assert "registers" in report["text"]
    assert r"\_swiglu" in report["markdown"]


def test_a_candidate_that_cannot_be_loaded_or_read_is_an_error_in_words(
    tmp_path: Path, play: Callable[..., tuple[int, str, str]]
) -> None:
    text = tmp_path / "candidate.py"
    text.write_text("def swiglu(gate_up):\n    return gate_up\n\nweights = loaded\n")
    status, _, errors = play("100", "candidate", "swiglu", str(text), "--device", "cpu")
    assert status == 1
    assert "NameError: name 'loaded' is not defined" in errors
    assert "line 4" in errors
    status, _, errors = play("100", "candidate", "swiglu", str(tmp_path), "--device", "cpu")
    assert status == 1
    assert errors.startswith(f"error: {tmp_path} cannot be read")


class Kept:
    """A sink that keeps what it is sent."""

    fills = True

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.text: dict[str, str] = {}

    def send(self, event: str, **fields: Any) -> None:
        self.kinds.append(event)
        self.text[event] = self.text.get(event, "") + str(fields.get("text", ""))

    def holds(self) -> bool:
        return False


def test_a_table_that_fills_is_sent_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most once in a quarter of a second, and at the end."""
    now = [100.0]

    def measure(*_: Any) -> Iterator[Event]:
        yield Begin(9)
        for tokens in range(1, 10):
            now[0] += 0.1
            yield scripted_bench.row(tokens, "eager", 1.0)

    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "ceilings", lambda device, dtypes: scripted_bench.CEILINGS)
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: now[0]))
    sink = Kept()
    assert run.carry_out(parse(["norm", "--device", "cpu"]), sink).complete
    assert sink.kinds.count("table") == 4
    assert sink.kinds[:3] == ["begin", "doing", "table"]


CHATTY = """
print("defined", flush=True)

def swiglu(gate_up):
    print("called with", *gate_up.shape)
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)
"""


def test_what_a_candidate_prints_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, sink = tmp_path / "chatty.py", Kept()
    text.write_text(CHATTY)
    asked = ["candidate", "swiglu", str(text), "--dtype", "fp32", "--device", "cpu", "--check-only"]
    assert run.carry_out(parse(asked), sink).status == 0
    assert sink.text["printed"].startswith("defined\ncalled with ")
    assert sink.text["printed"].count("called with") > 1
    assert capfd.readouterr().out == ""


def test_no_more_of_it_than_a_notebook_can_show() -> None:
    sink = Kept()
    printed = Printed(sink, most=10)
    print("12345\n678", file=printed)
    print("end\nand more", file=printed, flush=True)
    print("and more", file=printed)
    assert sink.text["printed"] == "12345\n678\n\n... (what it prints from here on is not shown)\n"
    assert sink.kinds == ["printed", "printed"]


def test_the_older_results_may_be_written_over(tmp_path: Path, play: Callable[..., tuple[int, str, str]]) -> None:
    path = str(tmp_path / "same.json")
    assert play("100", "norm", "--save", path)[0] == 0
    status, out, _ = play("200", "norm", "--save", path, "--compare", path)
    assert status == 1
    assert "\nRegression" in out
    assert [row.us for row in read(Path(path)).rows] == [200.0, 400.0]


def test_a_subject_that_nobody_asked_for_runs_is_named(play: Callable[..., tuple[int, str, str]]) -> None:
    status, out, _ = play("100", "norm", "attention", "--providers", "sdpa flash", "--device", "cpu")
    assert status == 0
    assert "Note: norm: run by none of the providers that were asked for" in out


def test_a_terminal_has_a_line_of_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal = Terminal()
    terminal.send("doing", text="norm 8 rows", done=3, total=9)
    assert capsys.readouterr().err == "\r\x1b[K4/9 norm 8 rows"
    terminal.send("table", markdown="", text="a\nb")
    assert capsys.readouterr() == ("a\nb\n", "\r\x1b[K")
