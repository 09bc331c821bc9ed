"""What the terminal of a foreground engine shows: log lines, a bar while the model loads, and how to call it."""

from __future__ import annotations

import logging
import shlex
import sys
from urllib.parse import quote

from mistral_nb.progress import Bar, Progress
from mistral_nb.runtime import EngineRecord, record_path

__all__ = ["Terminal", "how_to_call"]


class Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Log lines on stderr, and where that is a terminal a bar below them. Any thread may write to it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._bar = Bar(sys.stderr) if sys.stderr.isatty() else None

    def show(self, now: Progress) -> None:
        """Draw the bar; nothing where stderr is no terminal."""
        if self._bar is not None:
            self.acquire()
            try:
                self._bar.show(now)
            finally:
                self.release()

    def emit(self, record: logging.LogRecord) -> None:
        if self._bar is not None:
            self._bar.close()
        super().emit(record)


def how_to_call(record: EngineRecord, idle_timeout: float) -> str:
    """The engine's address, a call to try, and how it ends. The token stays in the record's file."""
    read = f"import json; print(json.load(open({str(record_path(record.model))!r}))['token'])"
    url = f"{record.base_url}/client/v4/accounts/local/ai/run/{quote(record.model, safe='/@')}"
    lines = [
        f"Ready at {record.base_url}. Try it:",
        f"  TOKEN=$({shlex.quote(sys.executable)} -c {shlex.quote(read)})",
        f"  curl -N {shlex.quote(url)} \\",
        """    -H "Authorization: Bearer $TOKEN" -d '{"prompt": "Why is the sky blue?", "stream": true}'""",
    ]
    idle = f"It ends after {idle_timeout:g} s without a request; " if idle_timeout else ""
    lines.append(f"{idle}Ctrl+C ends it now. Log: {record.log}")
    return "\n".join(lines)
