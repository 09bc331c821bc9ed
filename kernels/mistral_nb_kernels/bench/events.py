"""What a run of the bench tells, event by event: to a program, as a line of JSON each."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, Protocol

__all__ = ["KINDS", "Lines", "Printed", "Sink", "printing"]

KINDS = {
    "begin": ("total", "device"),
    "doing": ("text", "done", "total"),
    "printed": ("text",),
    "table": ("markdown", "text"),
    "rows": ("rows",),
    "figure": ("name", "alt", "png", "saved"),
    "note": ("text",),
    "failure": ("text", "markdown"),
    "verdict": ("text", "markdown", "regressed"),
    "code": ("kernel", "arch", "kind", "text"),
    "report": ("markdown", "text"),
    "error": ("text",),
    "end": ("complete", "saved"),
}
"""The kinds of events, about in their order, and the fields of each.

printed: by a candidate; table: the whole one so far; rows: `Record.tidy`; png: in base64; failure: a candidate that is
wrong; code: PTX or SASS, by `kind`; report: of --compile; error: the last one but `end`, which every run ends with.
"""


class Sink(Protocol):
    """Who is told. fills: whether tables that are not whole yet are wanted, and pictures that are not to be kept."""

    fills: bool

    def send(self, event: str, **fields: Any) -> None:
        """One event of `KINDS`, with all its fields."""

    def holds(self) -> bool:
        """Asked by an interrupt: whether it will raise `KeyboardInterrupt` itself, when what it writes is whole."""


class Lines:
    """Lines of JSON on the standard output as it was; whatever libraries print goes to the standard error from now on.

    A process that nobody reads any more has no purpose: it ends, with all that it started where it leads a session.
    """

    fills = True

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._turn = threading.RLock()
        self._writing = self._interrupted = False
        if hasattr(select, "poll"):
            threading.Thread(target=self._watch, name="bench reader", daemon=True).start()

    def send(self, event: str, **fields: Any) -> None:
        assert tuple(fields) == KINDS[event], (event, tuple(fields))
        line = json.dumps({"event": event, **fields}, allow_nan=False) + "\n"
        with self._turn:
            self._writing = True
            self._out.write(line)
            self._out.flush()
            self._writing = False
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def holds(self) -> bool:
        self._interrupted = self._writing
        return self._writing

    def _watch(self) -> None:
        """Wait until the reader has closed its end."""
        poll = select.poll()
        poll.register(self._out.fileno(), 0)
        poll.poll()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)


@contextmanager
def printing(sink: Sink) -> Iterator[None]:
    """What is printed in it is told, where a program listens: no standard output is seen there."""
    if not sink.fills:
        yield
        return
    printed = Printed(sink)
    with redirect_stdout(printed):
        yield
    printed.flush()


class Printed(io.TextIOBase):
    """What a candidate prints, as events of whole lines, up to so many characters in all."""

    def __init__(self, sink: Sink, most: int = 16_000) -> None:
        self._sink, self._left, self._line = sink, most, ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._left > 0:
            *lines, self._line = (self._line + text[: self._left]).split("\n")
            self._left -= len(text)
            if self._left <= 0:
                lines += [self._line, "... (what it prints from here on is not shown)"]
            if lines:
                self._sink.send("printed", text="\n".join([*lines, ""]))
        return len(text)

    def flush(self) -> None:
        if self._line and self._left > 0:
            line, self._line = self._line, ""
            self._sink.send("printed", text=line)
