"""A process that a benchmark asks in lines of JSON; when it dies, the end of its log is the error."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from mistral_nb.errors import MistralError

__all__ = ["Child"]

START, ANSWER, END = 600.0, 600.0, 60.0
"""Seconds that a process has to load and compile, to answer, and to end."""
_DYING, _SHOWN = 2, 300
"""Seconds that it gets for its last words, and of those so many characters."""


class Child:
    """A started process. `facts` is the first line that it told, once it had loaded.

    With `hold` it is stopped where it is not asked, so that no thread of it spins while others are measured.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, *, hold: bool = False) -> None:
        """Raises `MistralError` with the process's own last words, when it does not load."""
        self._hold = hold and hasattr(signal, "SIGSTOP")
        self._log = tempfile.NamedTemporaryFile(prefix="mistral-nb-bench-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=env
        )
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.facts = self._next(START)
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin
        self._go_on()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise MistralError(self._last_words()) from error
        return self._next(ANSWER)

    def close(self) -> None:
        """End the process: what it holds is given back when this returns."""
        assert self._process.stdin
        self._go_on()
        try:
            self._process.stdin.close()
            self._process.wait(END)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._reader.join(_DYING)
        self._log.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _go_on(self) -> None:
        if self._hold:
            self._process.send_signal(signal.SIGCONT)

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def _next(self, seconds: float) -> dict[str, Any]:
        began = time.monotonic()
        try:
            line = self._lines.get(timeout=seconds)
        except Empty:
            waited = time.monotonic() - began
            raise MistralError(f"it told nothing for {waited:.0f} s ({self._last_words()})") from None
        if not line:
            raise MistralError(self._last_words())
        if self._hold:
            self._process.send_signal(signal.SIGSTOP)
        found: dict[str, Any] = json.loads(line)
        return found

    def _last_words(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING)
        lines = Path(self._log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][-_SHOWN:] if lines else "it ended without a word"
