"""The kernel bench in a process of its own: its events, its interrupt and its end, and engines that are in its way.

`python -m mistral_nb_kernels.bench` measures, draws and words everything; who starts it only shows. It is the one that
knows its options: they are handed on as they were given, but for `--beside-engine`, which is about engines.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory, TemporaryFile
from types import FrameType, TracebackType
from typing import Any

from mistral_nb.config import environment_with_packages, load_settings
from mistral_nb.engine_control import EngineStatus, exit_words, status
from mistral_nb.errors import ConfigurationError, MissingDependency, MistralError
from mistral_nb.hardware import nvidia_gpus

__all__ = ["BenchProcess", "BenchUsage", "check_engines", "run", "start"]

GRACE, LONGEST = 5.0, 60.0
"""Seconds of silence after an interrupt until the process is killed, and those that it gets for pictures and the rest
once it has told its rows.
"""
_LATER = 10
_AGAIN = 1.0
"""Seconds until another interrupt is one of its own: some send the same to a process and to its group."""
_DYING = 2.0
"""Seconds that what a process wrote before it ended is waited for."""
_SHOWN = 300
_WAKE = b" "
_USAGE = 2
_CANDIDATE = "candidate"
_STOP = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)
_MEASURES_NOTHING = {"-h", "--help", "--list", "--open", "--check-only"}


class BenchUsage(ConfigurationError):
    """The bench does not take these arguments: in its own words."""


class BenchProcess(Iterator[dict[str, Any]]):
    """A run of the bench, which iterates over its events: tables whose kind is under `event`; `end` is the last.

    The process has a session of its own, so that a notebook's interrupt does not reach it: `interrupt` does, and the
    events go on to their end, also after an exception out of `next`, as `KeyboardInterrupt`. Ends with
    `BenchUsage` for wrong arguments, and with `MistralError` in the bench's own words, or where the process
    died, or told nothing for more than `patience` seconds after it said what it was doing: it is killed then.
    """

    program: tuple[str, ...] = ("-m", "mistral_nb_kernels.bench")

    def __init__(self, arguments: Sequence[str], source: str | None = None, patience: float | None = None) -> None:
        """`source` is what the process reads from its standard input, a candidate's text.

        Raises `MissingDependency` where torch is not installed.
        """
        _require()
        self._arguments, self._patience = arguments, patience
        self._doing = self._error = ""
        self._told_rows = self._told_end = self._killed = False
        self._heard = time.monotonic()
        self._interrupted: float | None = None
        self._reaping = threading.Lock()
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._log = TemporaryFile()  # noqa: SIM115
        self._tether = ExitStack()
        self._process = self._started([*_command(self.program, arguments), "--events"], source)
        self._reader = threading.Thread(target=self._read, name="mistral-nb bench", daemon=True)
        self._reader.start()
        self._waiter = threading.Thread(target=self._wait, name="mistral-nb bench end", daemon=True)
        self._waiter.start()

    def __iter__(self) -> BenchProcess:
        return self

    def __next__(self) -> dict[str, Any]:
        while True:
            line = self._next_line()
            if not line:
                return self._ended()
            if not line.endswith(b"\n"):
                continue  # it was killed while it wrote
            event: dict[str, Any] = json.loads(line)
            self._heard = time.monotonic()
            if event["event"] == "error":
                self._error = event["text"]
                continue
            if event["event"] == "doing":
                self._doing = event["text"]
            self._told_rows |= event["event"] == "rows"
            self._told_end |= event["event"] == "end"
            return event

    def interrupt(self) -> None:
        """Ask it, once, to end with what it has. It is killed where nothing comes of that for 5 s."""
        if self._interrupted is None:
            self._interrupted = self._heard = time.monotonic()
            with self._reaping:
                if self._process.returncode is None:
                    os.kill(self._process.pid, _STOP)
            self._lines.put(_WAKE)

    def close(self) -> None:
        """Kill the process and all that it started, and wait until it is gone."""
        self._kill()
        self._reap()
        self._log.close()

    def __enter__(self) -> BenchProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self, command: Sequence[str], source: str | None) -> subprocess.Popen[bytes]:
        if sys.platform == "win32":
            apart = subprocess.CREATE_NEW_PROCESS_GROUP
        else:
            apart = 0
        with TemporaryFile() as text:
            text.write((source or "").encode("utf-8", "replace"))
            text.seek(0)
            return subprocess.Popen(
                command,
                stdin=text,
                stdout=subprocess.PIPE,
                stderr=self._log,
                creationflags=apart,
                start_new_session=True,
                **self._tether.enter_context(_tethered()),
            )

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)

    def _wait(self) -> None:
        """Tell its end, which is not that of its output, for what it started may hold that open.

        Its number stays its own where that can be, since its group is killed by that number.
        """
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        else:
            self._process.wait()
        self._reader.join(_DYING)
        self._lines.put(None)

    def _next_line(self) -> bytes | None:
        """None at the end."""
        while True:
            deadline = self._deadline()
            try:
                line = self._lines.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except Empty:
                self._give_up()
                continue
            if line is None:
                self._lines.put(None)
            if line != _WAKE:
                return line

    def _deadline(self) -> float | None:
        if self._killed:
            return None
        if self._interrupted is not None:
            return self._interrupted + LONGEST if self._told_rows else self._heard + GRACE
        return self._heard + self._limit() if self._patience and self._doing else None

    def _limit(self) -> float:
        """Seconds of silence: more once the rows are told, when pictures are drawn and kernels are compiled."""
        return (self._patience or 0.0) * (_LATER if self._told_rows else 1)

    def _give_up(self) -> None:
        self._kill()
        if self._interrupted is None and not self._error:
            self._error = (
                f"ran for more than {self._limit():g} s in {self._doing}: an endless loop? --timeout raises the limit"
            )

    def _ended(self) -> dict[str, Any]:
        """The event `end` where the process could not tell it; then the error, or the end of the iteration."""
        code = self._reap()
        if not self._told_end:
            self._told_end = True
            if self._interrupted is None and not self._error:
                self._error = self._last_words(code)
            return {"event": "end", "complete": False, "saved": None}
        if self._error:
            raise (BenchUsage if code == _USAGE else MistralError)(self._error)
        raise StopIteration

    def _last_words(self, code: int) -> str:
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        said = f", and said last: {lines[-1].strip()[-_SHOWN:]}" if lines else ""
        return f"{_ended(self._arguments, code, self._doing)}{said}. Correct that, and run it again"

    def _reap(self) -> int:
        """Its exit status, once it has ended; what it started ends too."""
        self._waiter.join()
        self._kill()
        with self._reaping:
            self._tether.close()
            return self._process.wait()

    def _kill(self) -> None:
        with self._reaping:
            self._killed = True
            if self._process.returncode is None:
                _kill_group(self._process)


def start(arguments: Sequence[str], source: str | None = None, patience: float | None = None) -> BenchProcess:
    """The bench with a user's `arguments`, once engines have been looked at; what they do is noted in its results.

    `--beside-engine` is taken out of them. Raises as `check_engines` and `BenchProcess` do.
    """
    return BenchProcess(_prepared(arguments), source, patience)


def run(arguments: Sequence[str]) -> int:
    """`mistral-nb bench kernels`: the bench with this terminal's streams; its exit status.

    The first interrupt is the bench's, which may not hear it; the second kills it. Raises as `start` does.
    """
    _require()
    given = _prepared(arguments)
    with TemporaryDirectory(prefix="mistral-nb-bench-") as folder:
        trail = Path(folder, "trail")
        with (
            _tethered(MISTRAL_NB_TRAIL=str(trail)) as how,
            subprocess.Popen(_command(BenchProcess.program, given), **how) as process,
        ):
            interrupts = _Interrupts(process)
            former = signal.signal(signal.SIGINT, interrupts.take)
            try:
                code = process.wait()
            finally:
                signal.signal(signal.SIGINT, former)
        left = _left(trail)
    if interrupts.first is not None:
        return 130
    untold = given[:1] == [_CANDIDATE] and "status" not in left
    if code < 0 or untold:
        raise MistralError(f"{_ended(given, code, left.get('doing', ''))}. Correct that, and run it again")
    return left.get("status", 0) or code


def _left(trail: Path) -> dict[str, Any]:
    """What a process was doing at last, and the status that it was to end with, if it came so far."""
    lines = trail.read_text(encoding="utf-8").splitlines() if trail.exists() else ()
    return dict(itertools.chain.from_iterable(json.loads(line).items() for line in lines))


def _ended(arguments: Sequence[str], code: int, doing: str) -> str:
    """A process that ended without telling how, in words."""
    judged = doing and arguments[:1] == [_CANDIDATE]
    who = "the candidate ended the process before it was judged" if judged else "the benchmark's process ended"
    return f"{who} ({exit_words(code)}){f' in {doing}' if doing else ''}"


class _Interrupts:
    """Hands the first interrupt on, of which a terminal may have told the process too; a later one kills it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.first: float | None = None
        self._process = process

    def take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = now
            self._process.send_signal(_STOP)
        elif now - self.first >= _AGAIN:
            self._process.kill()


def check_engines(device: str, beside: bool) -> list[str]:
    """What the engines that run here do to a measurement on `device` (auto, cpu, cuda), to be noted with it.

    Raises `MistralError`, with the next step, where one holds a GPU that is to be measured, unless `beside`.
    """
    on_gpu = device != "cpu" and nvidia_gpus() > 0
    notes, holders = [], []
    for engine in status(load_settings()):
        if on_gpu and (engine.health is None or not engine.health.device.startswith("CPU")):
            holders.append(_holds(engine))
        elif engine.health and engine.health.active:
            notes.append(
                f"the engine of {engine.record.model} was answering {engine.health.active} request(s) beside this"
            )
    if holders and not beside:
        raise MistralError(
            f"{' and '.join(holders)}, so what is measured now would be slower than it is. End it with %mistral stop "
            "(in a terminal: mistral-nb stop), or measure all the same with --beside-engine"
        )
    return [*(f"measured beside an engine: {words}" for words in holders), *notes]


def _prepared(arguments: Sequence[str]) -> list[str]:
    given = [argument for argument in arguments if argument != "--beside-engine"]
    if _MEASURES_NOTHING & {argument.partition("=")[0] for argument in given}:
        return given
    notes = check_engines(_device(given), beside=len(given) < len(arguments))
    return [*given, *(f"--note={note}" for note in notes)]


def _holds(engine: EngineStatus) -> str:
    health = engine.health
    if health is None:
        return f"the engine of {engine.record.model} does not respond and may hold the GPU"
    memory = f"{health.memory / 1e9:.1f} GB of " if health.memory else ""
    return f"the engine of {engine.record.model} holds {memory}{health.device or 'the GPU, on which it loads'}"


def _device(arguments: Sequence[str]) -> str:
    """What `--device` says; the last counts. Whether it is right is for the process to say."""
    device = "auto"
    for argument, after in itertools.pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name == "--device":
            device = value if equals else after
    return device


def _require() -> None:
    missing = [name for name in ("mistral_nb_kernels", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f'the kernel bench needs {", ".join(missing)}: pip install "mistral-nb[local]"')


def _command(program: Sequence[str], arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", *program, *arguments]


@contextmanager
def _tethered(**variables: str) -> Iterator[dict[str, Any]]:
    """What `subprocess.Popen` takes for a bench that ends when this process does, or when the context is left.

    It is told of one end of a pipe, of which nobody but this process holds the other.
    """
    env = environment_with_packages() | variables
    if os.name != "posix":
        yield {"env": env}
        return
    reading, writing = os.pipe()
    try:
        yield {"env": {**env, "MISTRAL_NB_TETHER": str(reading)}, "pass_fds": (reading,)}
    finally:
        os.close(reading)
        os.close(writing)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):  # it is over, and nobody is left
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
