"""Where a process that runs a candidate is, and how it ended, for one that outlives it: `os._exit(0)` tells nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from mistral_nb_kernels.bench.events import Lines, Sink
from mistral_nb_kernels.bench.show import Terminal
from mistral_nb_kernels.bench.tether import tethered

__all__ = ["UNREAD", "VARIABLE", "Trail", "watched"]

VARIABLE = "MISTRAL_NB_TRAIL"
"""Of the environment: the file that a process has been given to leave its trail in."""


UNREAD = 141
"""The exit status where nobody reads what is printed any more."""


class Trail:
    """A sink that also leaves in a file, as lines of JSON, what is being done, and with its context the `status`."""

    def __init__(self, sink: Sink, path: str) -> None:
        self._sink, self._path = sink, Path(path)
        self.fills, self.status = sink.fills, 1

    def __enter__(self) -> Trail:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._leave(status=UNREAD if isinstance(error, BrokenPipeError) else self.status)

    def send(self, event: str, **fields: Any) -> None:
        if event == "doing":
            self._leave(doing=fields["text"])
        self._sink.send(event, **fields)

    def holds(self) -> bool:
        return self._sink.holds()

    def _leave(self, **what: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


def watched(command: Sequence[str], *, events: bool) -> int:
    """The exit status of a command in a process of its own, with this one's streams.

    Where it ends without a status in its trail, that is an error, shown as a terminal's or in `events`.
    """
    with TemporaryDirectory(prefix="mistral-nb-bench-") as folder:
        path = Path(folder, "trail")
        with _child(command, {**os.environ, VARIABLE: str(path)}) as (process, interrupts):
            code = process.wait()
        left: dict[str, Any] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            left |= json.loads(line)
    if "status" in left:
        return int(left["status"]) or (code if code >= 0 else 128 - code)
    if interrupts:
        return 130
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    words = f"the benchmark's process ended ({how})"
    if "doing" in left:
        words = f"the candidate ended the process before it was judged ({how}) in {left['doing']}"
    sink: Sink = Lines() if events else Terminal()
    sink.send("error", text=f"{words}. Correct that, and run it again")
    sink.send("end", complete=False, saved=None)
    return 1


@contextmanager
def _child(command: Sequence[str], env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A process that is told of the first interrupt, and ends with this one; and the interrupts so far.

    A terminal tells the whole group of each, so that the later ones reach the process, too.
    """
    interrupts: list[int] = []
    waiting: list[subprocess.Popen[bytes]] = []

    def hand_on() -> None:
        if interrupts and waiting and os.name == "posix":
            waiting.pop().send_signal(interrupts[0])

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        hand_on()

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers = {"SIGINT": interrupt, "SIGBREAK": interrupt, "SIGTERM": end}
    numbers = {getattr(signal, name): handler for name, handler in handlers.items() if hasattr(signal, name)}
    former = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    try:
        with tethered(env) as how, subprocess.Popen(command, **how) as process:
            waiting.append(process)
            hand_on()
            try:
                yield process, interrupts
            finally:
                process.kill()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
