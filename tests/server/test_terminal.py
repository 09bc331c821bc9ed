"""The bar of a foreground engine on a pseudo terminal, the log lines above and below it, and the log's own file."""

from __future__ import annotations

import logging
import os
import pty
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_nb.progress import Progress
from mistral_nb.server.logs import LogFile
from mistral_nb.server.terminal import Terminal

FULL = "\u2588" * 20


class Shown:
    """A terminal, how far the work is, and all that was written so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reader, writer = pty.openpty()
        self.out = os.fdopen(writer, "w", encoding="utf-8")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", self.out)
            self.terminal = Terminal()
        self.done = 0
        self.terminal.progress = lambda: Progress("Loading", self.done, 100)

    def log(self, level: int, text: str) -> None:
        self.terminal.handle(logging.LogRecord("mistral_nb", level, __file__, 1, text, None, None))

    def text(self) -> str:
        self.out.write("\0")
        self.out.flush()
        found = b""
        while not found.endswith(b"\0"):
            found += os.read(self._reader, 1 << 16)
        return found[:-1].decode()

    def close(self) -> None:
        self.out.close()
        os.close(self._reader)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shown]:
    found = Shown(monkeypatch)
    yield found
    found.close()


def test_a_line_leaves_the_bar_as_far_as_the_work_is_by_then(shown: Shown) -> None:
    shown.done = 60
    shown.terminal.show()
    shown.done = 100
    shown.log(logging.INFO, "read it all")
    shown.terminal.show()
    shown.log(logging.INFO, "ready")
    lines = shown.text().split("\r\n")
    assert lines[0].endswith(f"\rLoading  100%  {FULL}  100 of 100 B")
    assert lines[1:] == ["read it all", "ready", ""]


def test_an_error_takes_the_bars_place(shown: Shown) -> None:
    shown.done = 60
    shown.terminal.show()
    shown.log(logging.ERROR, "the model could not be loaded")
    before, _, line = shown.text().rpartition("\r \r".replace(" ", " " * len(f"Loading  60%  {FULL}  60 of 100 B")))
    assert before.startswith("\rLoading  60%")
    assert "\n" not in before
    assert line == "the model could not be loaded\r\n"


def test_the_log_and_what_is_kept_of_it_are_the_users_own(tmp_path: Path) -> None:
    file = tmp_path / "engine.log"
    file.touch(0o600)
    log = LogFile(file, 10)
    for text in ("longer than ten characters", "shorter"):
        log.emit(logging.LogRecord("mistral_nb", logging.INFO, __file__, 1, text, None, None))
    log.close()
    kept = tmp_path / "engine.log.old"
    assert kept.read_text().endswith("longer than ten characters\n")
    assert [path.stat().st_mode & 0o777 for path in (file, kept)] == [0o600, 0o600]
