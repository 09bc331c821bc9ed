"""What the terminal of a foreground engine shows: log lines, a bar while the model loads, and how to call it."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable
from urllib.parse import quote

from mistral_nb.progress import Bar, Progress
from mistral_nb.runtime import EngineRecord, record_path

__all__ = ["Terminal", "how_to_call"]


class Terminal(logging.StreamHandler):  # type: ignore[type-arg]
    """Log lines on stderr, and where that is a terminal a bar below them. Any thread may write to it.

    `progress` tells how far the work is. A line leaves the bar above it as that is then; an error takes its place.
    """

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(message)s"))
        self.progress: Callable[[], Progress | None] = lambda: None
        self._bar = Bar(sys.stderr) if sys.stderr.isatty() else None

    def show(self) -> None:
        """Draw the bar; nothing where stderr is no terminal, and where all is done: the line that says so is next."""
        now = self.progress()
        if self._bar is not None and now is not None and now.done != now.total:
            self.acquire()
            try:
                self._bar.show(now)
            finally:
                self.release()

    def emit(self, record: logging.LogRecord) -> None:
        if self._bar is not None and record.levelno >= logging.ERROR:
            self._bar.erase()
        elif self._bar is not None:
            self._bar.close(self.progress())
        super().emit(record)


def how_to_call(record: EngineRecord, idle_timeout: float, link: str, public_port: int | None) -> str:
    """The engine's address, a call to try, the playground, and how it ends. The token stays in the record's file.

    `link` opens the playground once; `public_port` is where others reach the engine with TLS.
    """
    read = f"import json; print(json.load(open({str(record_path(record.model))!r}))['token'])"
    url = f"{record.base_url}/client/v4/accounts/local/ai/run/{quote(record.model, safe='/@')}"
    lines = [
        f"Ready at {record.base_url}. Try it:",
        f"  TOKEN=$({shlex.quote(sys.executable)} -c {shlex.quote(read)})",
        f"  curl -N {shlex.quote(url)} \\",
        """    -H "Authorization: Bearer $TOKEN" -d '{"prompt": "Why is the sky blue?", "stream": true}'""",
        f"Playground: {link} (this link works once, for 10 minutes; the page asks others for the token)",
    ]
    if public_port is not None:
        lines.append(
            f"Others reach it at https://THIS-MACHINE:{public_port} with the token of the setting server_token"
        )
    idle = f"It ends after {idle_timeout:g} s without a request; " if idle_timeout else ""
    lines.append(f"{idle}Ctrl+C lets running answers end first, a second one ends it now. Log: {record.log}")
    return "\n".join(lines)
