"""The log of an engine process: a file that does not grow without end, and in the foreground the terminal too."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import shutil
from pathlib import Path

from mistral_nb.server.journal import REQUEST_LOG
from mistral_nb.server.terminal import Terminal

__all__ = ["LogFile", "configure"]

_MAX_LOG = 4 << 20


def configure(file: Path, managed: bool) -> Terminal | None:
    """Our own log and everybody's warnings go to `file`; prompts and tokens are never logged.

    A managed process has nothing else: its standard streams, and the traces of a crash in native code, go there too.
    In the foreground the terminal, which is returned, shows the same lines but those of single requests.
    """
    handler = LogFile(file, _MAX_LOG)
    handlers: list[logging.Handler] = [handler]
    terminal = None if managed else Terminal()
    if terminal is not None:
        terminal.addFilter(lambda record: record.name != REQUEST_LOG)
        handlers.append(terminal)
    else:
        for standard in (1, 2):
            os.dup2(handler.descriptor, standard)
    logging.basicConfig(level=logging.WARNING, handlers=handlers)
    logging.getLogger("mistral_nb").setLevel(logging.INFO)
    faulthandler.enable()
    return terminal


class LogFile(logging.FileHandler):
    """Appends to `file`; beyond `limit` bytes its content goes to `.log.old`, in place of what was there, and it begins
    anew. It stays the same file for the standard streams that lead to it.
    """

    def __init__(self, file: Path, limit: int) -> None:
        super().__init__(file, encoding="utf-8", errors="backslashreplace")
        self.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._limit = limit

    @property
    def descriptor(self) -> int:
        assert self.stream is not None
        return self.stream.fileno()

    def emit(self, record: logging.LogRecord) -> None:
        if os.fstat(self.descriptor).st_size > self._limit:
            file = Path(self.baseFilename)
            old = file.with_suffix(".log.old")
            with contextlib.suppress(OSError):  # on a full disk what was there is lost, and the server goes on
                old.touch(0o600)
                shutil.copy(file, old)
            os.ftruncate(self.descriptor, 0)
        super().emit(record)


class _Lines(logging.Formatter):
    """Leaves the lines of JSON as they are."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == REQUEST_LOG else super().format(record)
