"""Showing a benchmark while it runs: a bar and a table that fill, then figures, listings, notes and the verdict."""

from __future__ import annotations

import html
import importlib
import re
import sys
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.error import UsageError

from mistral_nb.progress import BAR, duration, for_terminal
from mistral_nb.safe_markdown import literal, plain_text, safe_markdown
from mistral_nb_magics.display import is_notebook, mark_of
from mistral_nb_magics.stream import Surface

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["BenchSurface", "Event", "NotebookSurface", "Rows", "TerminalSurface", "make_surface", "value_of"]

Event = Mapping[str, Any]
"""What the child says: a kind under "event", and what belongs to it."""

INTERVAL = 0.25
"""Seconds between two updates of the bar or the table."""

PATIENCE = 0.4
"""Seconds of silence before the output says that it waits."""

TRUST = 2.0
"""Seconds of measuring before the time left is told."""

LISTINGS = 1_000_000
"""Characters of all listings that a notebook keeps; the value of the cell has them whole."""

_FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")

Bundle = dict[str, Any]


class Rows(list[dict[str, Any]]):
    """The rows of a benchmark where pandas is not installed. `code` has listings by (kernel, architecture, kind)."""

    def __init__(self, rows: list[dict[str, Any]], code: Mapping[tuple[str, str, str], str]) -> None:
        super().__init__(rows)
        self.code = dict(code)


def value_of(rows: list[dict[str, Any]], code: Mapping[tuple[str, str, str], str]) -> Any:
    """The value of a cell: a pandas.DataFrame with the attribute `code`, or `Rows` where there is no pandas."""
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        return Rows(rows, code)
    frame = pandas.DataFrame(rows)
    object.__setattr__(frame, "code", dict(code))  # an attribute, which pandas would take for a column
    return frame


class BenchSurface(Surface[Event], Protocol):
    """A surface with an end, that remembers what is to become of the cell."""

    @property
    def heard(self) -> Heard: ...

    def finish(self, error: BaseException | None) -> None:
        """Show what waits, and what ended it early."""


def make_surface(shell: InteractiveShell, title: str) -> BenchSurface:
    return NotebookSurface(shell, title) if is_notebook(shell) else TerminalSurface(title)


class Heard:
    """What the events of one run said so far. `rows` is None until they came."""

    def __init__(self, title: str) -> None:
        self.rows: list[dict[str, Any]] | None = None
        self.code: dict[tuple[str, str, str], str] = {}
        self.table: Event | None = None
        self.failure: Event | None = None
        self.notes: list[str] = []
        self.verdict: Event | None = None
        self.saved = ""
        self._title = title
        self._started = time.monotonic()
        self._began: float | None = None
        self._done = self._total = 0
        self._text = ""

    def take(self, event: Event) -> None:
        match event["event"]:
            case "begin":
                self._began, self._total = time.monotonic(), event["total"]
            case "doing":
                self._text = event["text"]
                if event["total"]:
                    self._done, self._total = event["done"], event["total"]
            case "table":
                self.table = event
            case "rows":
                self.rows = event["rows"]
            case "note":
                self.notes.append(event["text"])
            case "figure":
                self.notes += [f"Picture: {event['saved']}"] if event["saved"] else []
            case "verdict":
                self.verdict = event
            case "failure":
                self.failure = event
            case "end":
                self.saved = event["saved"] or ""
            case "code":
                self.code[event["kernel"], event["arch"], event["kind"]] = event["text"]

    def line(self) -> str:
        """How far it is, in one line: two spaces between the parts, what matters least last."""
        if not self._total:
            return f"{self._title}: {plain_text(self._text) or 'starting'} …"
        done, total = min(self._done, self._total), self._total
        filled = BAR * done // total
        seconds = time.monotonic() - (self._began or self._started)
        left = f"{duration(max(1, seconds / done * (total - done)))} left" if done and seconds > TRUST else ""
        bar = "█" * filled + "░" * (BAR - filled)
        parts = (self._title, f"{100 * done // total:>2}%", bar, f"{done} of {total}", left, plain_text(self._text))
        return "  ".join(part for part in parts if part)

    def last_line(self, error: BaseException | None) -> str:
        """What the bar becomes; empty where nothing was begun, for it was asked for in wrong words."""
        if isinstance(error, UsageError):
            return ""
        saved = f"; saved in {self.saved}" if self.saved else ""
        took = f"in {duration(max(1, time.monotonic() - self._started))}"
        if error is None and self.failure is None:
            return f"{self._title}: done {took}{saved}"
        count = f"{self._done} of {self._total} steps {took}{saved}" if self._total else ""
        return ": ".join(part for part in (mark_of(error) or f"{self._title} is wrong", count) if part)


class NotebookSurface:
    """A bar and a table, each one output that is updated, and below them an output for each thing that comes."""

    def __init__(self, shell: InteractiveShell, title: str) -> None:
        self.heard = Heard(title)
        self._publisher = shell.display_pub
        self._updates = not isinstance(shell.display_pub, CapturingDisplayPublisher)
        self._ids = {name: uuid.uuid4().hex for name in ("bar", "table")}
        self._shown: set[str] = set()
        self._dirty = {"bar"}
        self._next = time.monotonic() + PATIENCE

    def add(self, event: Event, /) -> None:
        self.heard.take(event)
        match event["event"]:
            case "begin" | "doing":
                self._dirty.add("bar")
                if "bar" not in self._shown:
                    self._next = time.monotonic()
            case "table":
                self._dirty.add("table")
            case "printed":
                if "bar" not in self._shown:
                    self._settle()
                print(plain_text(event["text"]), end="", flush=True)
            case "failure" | "report":
                self._settle()
                self._publish(_told(event))
            case "figure":
                self._settle()
                png, alt = event["png"], plain_text(event["alt"])
                self._publish({"image/png": png, "text/plain": alt}, {"image/png": {"alt": alt}})

    def due(self) -> float | None:
        return self._next - time.monotonic() if self._dirty and self._updates else None

    def flush(self) -> None:
        if "bar" in self._dirty:
            self._update("bar", {"text/plain": self.heard.line()})
        if "table" in self._dirty and self.heard.table:
            self._update("table", _told(self.heard.table))
        self._dirty.clear()
        self._next = time.monotonic() + INTERVAL

    def finish(self, error: BaseException | None) -> None:
        if "bar" in self._shown:
            self._update("bar", {"text/plain": self.heard.last_line(error) or " "})
        self._dirty.discard("bar")
        self._settle()
        if self.heard.code:
            self._publish(listings(self.heard.code))
        if self.heard.notes:
            lines = [f"- {literal(' '.join(note.split()))}" for note in self.heard.notes]
            self._publish({"text/markdown": "\n".join(lines), "text/plain": plain_text("\n".join(self.heard.notes))})
        if self.heard.verdict:
            self._publish(_told(self.heard.verdict))

    def _settle(self) -> None:
        """Bring the bar and the table up to date: what comes next stands below them."""
        if not self._updates:
            self._dirty.discard("bar")
        self.flush()

    def _update(self, name: str, data: Bundle) -> None:
        self._publisher.publish(
            data=data,
            metadata={},
            transient={"display_id": self._ids[name]},
            update=name in self._shown and self._updates,
        )
        self._shown.add(name)

    def _publish(self, data: Bundle, metadata: Bundle | None = None) -> None:
        self._publisher.publish(data=data, metadata=metadata or {})


def _told(event: Event) -> Bundle:
    """What the child says in Markdown. Escaped brackets become entities, since `\\[` would open a formula."""
    parts = _FENCE.split(event["markdown"])
    parts[::2] = [
        _ESCAPE.sub(lambda sign: f"&#{ord(sign[1])};" if sign[1] in "[]()" else sign[0], part) for part in parts[::2]
    ]
    return {"text/markdown": safe_markdown("".join(parts)), "text/plain": plain_text(event["text"])}


def listings(code: Mapping[tuple[str, str, str], str]) -> Bundle:
    """One output that opens by a click for each listing, and in plain text where to find them."""
    parts, lines = [], []
    room = LISTINGS // max(1, len(code))
    for (kernel, arch, kind), text in code.items():
        name = f"{kernel}, {arch}: {kind.upper()}, {text.count(chr(10)) + 1} lines"
        rest = f"\n... the whole is .code[{kernel!r}, {arch!r}, {kind!r}]" if len(text) > room else ""
        shown = html.escape(plain_text(text[:room]) + rest)
        listing = f'<pre style="max-height: 32em; overflow: auto">{shown}</pre>'
        parts.append(f"<details><summary>{html.escape(name)}</summary>{listing}</details>")
        lines.append(f"{name}: .code[{kernel!r}, {arch!r}, {kind!r}]")
    return {"text/html": "\n".join(parts), "text/plain": plain_text("\n".join(lines))}


class TerminalSurface:
    """The bar on stderr, on one line that is wiped, where that is a terminal; everything else at the end, as text."""

    def __init__(self, title: str) -> None:
        self.heard = Heard(title)
        self._texts: list[str] = []
        self._dirty = sys.stderr.isatty()
        self._next = time.monotonic() + PATIENCE
        self._wipes = False

    def add(self, event: Event, /) -> None:
        self.heard.take(event)
        self._dirty = sys.stderr.isatty()
        if event["event"] in ("failure", "report"):
            self._texts.append(event["text"])
        elif event["event"] == "printed":
            self._wipe()
            print(plain_text(event["text"]), end="", flush=True)

    def due(self) -> float | None:
        return self._next - time.monotonic() if self._dirty else None

    def flush(self) -> None:
        sys.stderr.write(f"\r\x1b[K{for_terminal(self.heard.line(), sys.stderr)}")
        sys.stderr.flush()
        self._wipes, self._dirty = True, False
        self._next = time.monotonic() + INTERVAL

    def finish(self, error: BaseException | None) -> None:
        self._wipe()
        heard = self.heard
        listed = listings(heard.code)["text/plain"]
        texts = [heard.table["text"] if heard.table else "", *self._texts, listed, *heard.notes]
        texts += [heard.verdict["text"] if heard.verdict else "", heard.last_line(error)]
        shown = "\n\n".join(plain_text(text).strip("\n") for text in texts if text.strip())
        if shown:
            print(shown, flush=True)

    def _wipe(self) -> None:
        if self._wipes:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
        self._wipes = False
