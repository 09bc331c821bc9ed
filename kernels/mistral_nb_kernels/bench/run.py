"""A run of the bench: what it measures, tells and keeps, up to its end or an interrupt."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mistral_nb_kernels.bench.arguments import Options
from mistral_nb_kernels.bench.ceilings import ceilings, doubts
from mistral_nb_kernels.bench.events import Sink, printing
from mistral_nb_kernels.bench.machine import busy, machine
from mistral_nb_kernels.bench.measure import Begin, Doing, measure
from mistral_nb_kernels.bench.outcome import INTERRUPTED, Outcome, Refused, Results, read_record
from mistral_nb_kernels.bench.record import Ceilings, Record, Row, Skipped, write
from mistral_nb_kernels.bench.registry import SUBJECTS, op_points
from mistral_nb_kernels.bench.table import table
from mistral_nb_kernels.bench.tether import tethered

__all__ = ["carry_out"]

_EVERY = 0.25
"""Seconds between tables that are not whole yet."""
_COMMAND = ("python", "-m", "mistral_nb_kernels.bench")


def carry_out(options: Options, sink: Sink, interrupted: Callable[[], bool] = lambda: False) -> Outcome:
    """Do what was asked for. Raises `Refused`.

    `interrupted`: whether an interrupt has come, also where its exception was lost in code that cannot raise it.
    """
    if options.list:
        return _list(sink, _device(options.device))
    if options.open:
        old = read_record(options.compare) if options.compare else None
        return Results(options, sink, read_record(options.open), old).shown()
    run = _Run(options, sink, interrupted)
    if options.op:
        return _candidate(options, run)
    points = [point for name in options.subjects for point in SUBJECTS[name].points(options.asked, run.device)]
    if not points:
        raise Refused("there is nothing to measure: leave out --dtype, --seq or --batch")
    run.dtypes = tuple(dict.fromkeys(point.dtype for point in points))
    run.notes += _left_out(options)
    return run.through(measure(points, run.device, options.asked.providers))


def _left_out(options: Options) -> list[str]:
    names = set(options.asked.providers or ())
    without = [name for name in options.subjects if names and not names & set(SUBJECTS[name].names)]
    return [f"{', '.join(without)}: run by none of the providers that were asked for"] if without else []


def _list(sink: Sink, device: str) -> Outcome:
    """Every subject with its providers: those that are asked on this device, and those that only their name brings."""
    lines, items = [], []
    for name, subject in SUBJECTS.items():
        axes = " ".join(f"--{axis}" for axis in subject.axes)
        here = dict.fromkeys(provider.name for provider in subject.providers if device in provider.on)
        others = [other for other in subject.names if other not in here]
        who = f"by {', '.join(here)}" + (f"; by --providers also {', '.join(others)}" if others else "")
        lines += [f"{name:<18}{subject.summary}; {axes}", f"{'':<18}{who}"]
        items.append(f"- **{name}**: {subject.summary}; `{axes}`; {who}")
    sink.send("table", markdown="\n".join(items), text="\n".join(lines))
    return Outcome()


def _candidate(options: Options, run: _Run) -> Outcome:
    """Check it, time it, and show what it becomes where that is asked for."""
    from mistral_nb_kernels.bench.candidate import CandidateError, judge, load

    text = _text(options.file)
    run.dtypes = tuple(dict.fromkeys(point.dtype for point in op_points(options.op, options.asked, run.device)))
    run.sink.send("doing", text="the candidate's definition", done=0, total=0)
    try:
        with printing(run.sink):
            candidate = load(text, options.op, interpret=run.device == "cpu")
            judged = judge(candidate, options.op, options.asked, run.device, timed=not options.check_only)
            outcome = run.through(judged)
    except CandidateError as error:
        raise Refused(str(error)) from None
    if options.archs and outcome.status != INTERRUPTED:
        try:
            failed = _compile(options, text, run.sink)
        except KeyboardInterrupt:
            outcome.status, outcome.complete, failed = INTERRUPTED, False, ""
        outcome.error = outcome.error or failed
        outcome.status = outcome.status or int(bool(failed))
    return outcome


def _text(file: str) -> str:
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file} cannot be read ({error}); give a file of Python") from error


def _compile(options: Options, text: str, sink: Sink) -> str:
    """What went wrong, or nothing: its events are passed on. Where kernels are interpreted none can be compiled, and
    where one was compiled for another architecture none can be launched: so this is a process of its own.
    """
    asked = options.asked
    dtypes = [str(dtype).removeprefix("torch.") for dtype in asked.dtypes or ()]
    safe = ["-P"] if sys.flags.safe_path else []
    command = [sys.executable, *safe, "-m", "mistral_nb_kernels.bench.compiling", options.op]
    command += [json.dumps({"archs": options.archs, "dtypes": dtypes, "seq": asked.seq, "batch": asked.batch})]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    with tethered(env) as how, subprocess.Popen(command, **pipes, **how) as child:
        assert child.stdin
        assert child.stdout
        try:
            with suppress(BrokenPipeError):  # it ended at once: its status tells
                child.stdin.write(text)
                child.stdin.close()
            for line in child.stdout:
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "error":
                    return str(event["text"])
                sink.send(**event)
            if child.wait():
                return f"compiling ended with exit status {child.returncode}: its words are above"
        finally:
            child.kill()
    return ""


class _Run:
    """What has been measured so far. `dtypes` are those of the ceilings."""

    def __init__(self, options: Options, sink: Sink, interrupted: Callable[[], bool]) -> None:
        self.options, self.sink, self.interrupted = options, sink, interrupted
        self.device = _device(options.device)
        self.machine = machine(self.device)
        self.dtypes: tuple[torch.dtype, ...] = ()
        self.rows: list[Row] = []
        self.skipped: list[Skipped] = []
        self.notes = [*options.notes, *busy(self.machine)]
        self.revision = _revision()
        self.when = datetime.now(UTC).isoformat(timespec="seconds")
        self.wrong = False
        self._ceilings: Ceilings | None = None
        self._shown = 0.0
        self.old = _check(options, str(self.machine["device"]))

    def through(self, events: Iterable[Any]) -> Outcome:
        """Measure until the end, or an interrupt: what was measured until then is kept, also where an error ends it."""
        complete = interrupted = False
        try:
            for event in events:
                self._take(event)
                if self.interrupted():
                    raise KeyboardInterrupt
            complete = True
        except KeyboardInterrupt:
            if not self.interrupted():
                raise  # somebody else's code did
            interrupted = True
        finally:
            outcome = self._end(complete)
        outcome.complete = complete
        if interrupted:
            outcome.status = INTERRUPTED
        return outcome

    def _take(self, event: Any) -> None:
        from mistral_nb_kernels.bench.candidate import Failure, Note

        match event:
            case Begin():
                self.sink.send("begin", total=event.total, device=self.machine["device"])
                if not self.options.op:
                    self._measure_ceilings()
            case Doing():
                text = f"{event.op} {event.case}, {event.dtype}: {event.provider}"
                self.sink.send("doing", text=text, done=event.done, total=event.total)
            case Row():
                self._measure_ceilings()
                self.rows.append(event)
                self._fill()
            case Skipped():
                self.skipped.append(event)
                self._fill()
            case Note():
                self.notes.append(event.text)
            case Failure():
                self.wrong = True
                self.sink.send("failure", text=str(event), markdown=event.markdown())

    def _measure_ceilings(self) -> None:
        if self._ceilings is None:
            self.sink.send("doing", text="the ceilings of this machine", done=0, total=0)
            self._ceilings = ceilings(self.device, self.dtypes)

    def _fill(self) -> None:
        now = time.monotonic()
        if self.sink.fills and self._ceilings and now - self._shown >= _EVERY:
            self._shown = now
            record = self._record(self._ceilings, complete=True)
            self.sink.send("table", markdown=table(record, markdown=True), text=table(record))

    def _record(self, limits: Ceilings, *, complete: bool) -> Record:
        words = [word for word in self.options.words if word != "--events" and not word.startswith("--note=")]
        return Record(
            command=(*_COMMAND, *words),
            revision=self.revision,
            when=self.when,
            machine=self.machine,
            ceilings=limits,
            rows=tuple(self.rows),
            skipped=tuple(self.skipped),
            notes=tuple(self.notes),
            complete=complete,
        )

    def _end(self, complete: bool) -> Outcome:
        if self._ceilings is None or not (self.rows or self.skipped):
            self.sink.send("rows", rows=[])
            unwritten = [f"nothing was timed: {self.options.save} was not written"] if self.options.save else []
            for note in [*self.notes, *unwritten]:
                self.sink.send("note", text=note)
            return Outcome(int(self.wrong), complete)
        self.notes += doubts(self._ceilings, self.rows)
        record = self._record(self._ceilings, complete=complete)
        saved, error = None, ""
        if self.options.save:
            try:
                write(record, self.options.save)
                saved = self.options.save
            except ValueError as unwritable:
                error = str(unwritable)
        outcome = Results(self.options, self.sink, record, self.old).shown()
        outcome.saved = saved
        outcome.error = outcome.error or error
        outcome.status = int(bool(outcome.status or error or self.wrong))
        return outcome


def _device(asked: str) -> str:
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise Refused("there is no NVIDIA GPU that torch sees: leave out --device, or give --device cpu")
    return "cuda" if there and asked != "cpu" else "cpu"


def _check(options: Options, device: str) -> Record | None:
    """What would be in vain is refused before minutes go into it. The older results, which may be written over."""
    old = read_record(options.compare) if options.compare else None
    if old and old.machine["device"] != device:
        its = old.machine["device"]
        raise Refused(f"{options.compare} is of {its}, and this is {device}: measure both on one device")
    for option, path in (("--save", options.save and options.save.parent), ("--plot", options.plot)):
        try:
            if path:
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"{option}: {path} cannot be made ({error.strerror}); give another place") from error
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise Refused('--plot needs matplotlib: pip install "mistral-nb[plots]"')
    if options.save and options.save.is_dir():
        raise Refused(f"--save: {options.save} is a folder; give the name of a file")
    return old


def _revision() -> str:
    """The git revision of a checkout, with "+" where files differ from it; of an installed package its version."""
    root = Path(__file__).resolve().parents[3]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        if (root / ".git").exists():
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return metadata.version("mistral-nb")
    except (OSError, subprocess.CalledProcessError, metadata.PackageNotFoundError):
        return ""
