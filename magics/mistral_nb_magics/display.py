"""Showing an answer: one output that grows in a notebook, a running text in a terminal."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from IPython.core.displaypub import CapturingDisplayPublisher

from mistral_nb.answer import Result
from mistral_nb.progress import for_terminal, has_bar, status_line
from mistral_nb.safe_markdown import fenced, literal, plain_text, safe_markdown
from mistral_nb.types import Chunk
from mistral_nb_magics.stream import Surface

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["Display", "Style", "is_notebook", "make_display", "mark_of", "show_result"]

INTERVAL = 1 / 12
"""Seconds between two updates of a short answer."""

CHARACTERS_PER_SECOND = 100_000
"""An update sends the whole text again: a longer answer is sent as much less often."""

COST_SHARE = 5
"""Rendering an update takes at most one part in this many of the time."""

PATIENCE = 0.4
"""Seconds of silence before the output says that it waits."""

_FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<![\\$])\$(?!\s)((?:\\.|[^$\n])+?)(?<!\s)\$", re.DOTALL
)
_PROSE = re.compile(r"(?<![\\\w])[^\W\d_]{2,}\s+[^\W\d_]{2,}")

Bundle = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Style:
    """How an answer is shown: `form` is one of `FORMATS`; `waiting` stands first, `why` under the text.

    `rounds` is the limit of rounds of calls, 0 where none are run.
    """

    form: str = "markdown"
    waiting: str = ""
    why: str = ""
    footer: bool = True
    rounds: int = 0


class Display(Surface[Chunk], Protocol):
    """A surface with an end."""

    def finish(self, result: Result, error: BaseException | None) -> None:
        """Show the whole answer as it is to be kept, with what ended it early."""

    def conclude(self, text: str) -> None:
        """End with a line of text instead of an answer; an empty one leaves nothing."""


def is_notebook(shell: InteractiveShell) -> bool:
    """Whether the shell is a Jupyter kernel's, so that outputs can be updated."""
    return getattr(shell, "kernel", None) is not None


def make_display(shell: InteractiveShell, style: Style) -> Display:
    return NotebookDisplay(shell, style) if is_notebook(shell) else TerminalDisplay(style)


def show_result(shell: InteractiveShell, result: Result, style: Style) -> None:
    """Show a whole answer again."""
    display = make_display(shell, style)
    display.add(Chunk(text=result.text))
    display.finish(result, None)


def mark_of(error: BaseException | None) -> str:
    """What is shown where an answer ended early."""
    if error is None:
        return ""
    return "■ stopped here" if isinstance(error, KeyboardInterrupt) else f"■ broken off here: {type(error).__name__}"


def _limit(result: Result, style: Style) -> str:
    """What is shown under calls that came after the last round, in which no functions were offered."""
    if not style.rounds or not result.tool_calls or result.request.functions is not None:
        return ""
    return f"■ limit of {style.rounds} rounds reached: the calls above were not run"


class NotebookDisplay:
    """One display, updated at most every `INTERVAL`, with a trailing update; the last one is what is saved."""

    def __init__(self, shell: InteractiveShell, style: Style) -> None:
        self._publisher = shell.display_pub
        self._style = style
        self._id = uuid.uuid4().hex
        self._parts: list[str] = []
        self._status = style.waiting
        self._dirty = bool(style.waiting)
        self._next = time.monotonic() + PATIENCE
        self._shown = False
        self._updates = not isinstance(shell.display_pub, CapturingDisplayPublisher)

    def add(self, chunk: Chunk) -> None:
        if (chunk.text and not self._parts) or (chunk.status and not self._shown):
            self._next = min(self._next, time.monotonic())
        if chunk.text:
            self._parts.append(chunk.text)
        elif chunk.status and not self._parts:
            self._status = chunk.status
        self._dirty = self._dirty or bool(chunk.text or chunk.status)

    def due(self) -> float | None:
        return self._next - time.monotonic() if self._dirty and self._updates else None

    def flush(self) -> None:
        started = time.monotonic()
        text = "".join(self._parts)
        if text.strip():
            self._publish(_preview(text, self._style.form), {})
        elif self._status:
            self._publish(_status(self._status), {})
        cost = time.monotonic() - started
        self._next = time.monotonic() + max(INTERVAL, len(text) / CHARACTERS_PER_SECOND, cost * COST_SHARE)
        self._dirty = False

    def finish(self, result: Result, error: BaseException | None) -> None:
        if result.text.strip() or self._shown or isinstance(error, KeyboardInterrupt) or error is None:
            self._publish(*final_bundle(result, self._style, mark_of(error) or _limit(result, self._style)))

    def conclude(self, text: str) -> None:
        if text or self._shown:
            self._publish({"text/plain": plain_text(text) or " "}, {})

    def _publish(self, data: Bundle, metadata: Bundle) -> None:
        self._publisher.publish(
            data=data, metadata=metadata, transient={"display_id": self._id}, update=self._shown and self._updates
        )
        self._shown = True


def _status(text: str) -> Bundle:
    """A bar is plain text, which every front end shows in a font of one width; Markdown would slant it."""
    plain = {"text/plain": status_line(plain_text(text))}
    return plain if has_bar(text) else {"text/markdown": f"*{safe_markdown(text)} …*", **plain}


def _preview(text: str, form: str) -> Bundle:
    plain = {"text/plain": plain_text(text)}
    return {"text/markdown": safe_markdown(_source(text, form)), **plain} if form not in ("text", "json") else plain


def _source(text: str, form: str) -> str:
    """The Markdown that shows `text` in a form."""
    return fenced(text, "html") if form == "html" else text


def final_bundle(result: Result, style: Style, mark: str = "") -> tuple[Bundle, Bundle]:
    """What is saved of an answer, by MIME type, and its metadata: the text, the mark if any, and the footer.

    Every form but plain text is Markdown, so that the footer stands under each of them.
    """
    footer = _footer(result, style)
    code = "\n".join(result.code) if style.form == "code" else ""
    text = fenced(code, "python") if code else result.text.strip("\n")
    calls = result.calls_as_json
    plain = "\n\n".join(part for part in (plain_text(text), calls, mark, footer) if part)
    metadata = {"mistral_nb": {**result.metadata(), "why": style.why or None}}
    if style.form == "text":
        return {"text/plain": plain}, metadata
    source = text if mark or code else _final_source(result, style.form)
    small = f"<small>{'<br>'.join(map(literal, footer.splitlines()))}</small>" if footer else ""
    shown = safe_markdown(source) if text.strip() else ""
    parts = (shown, calls and fenced(calls, "json"), f"**{mark}**" if mark else "", small)
    return {"text/markdown": "\n\n".join(part for part in parts if part) or "*(empty)*", "text/plain": plain}, metadata


def _final_source(result: Result, form: str) -> str:
    """The Markdown that shows a whole answer in a form; the text itself where it holds no such thing."""
    text = result.text.strip("\n")
    if form == "json":
        with contextlib.suppress(ValueError):
            return fenced(json.dumps(result.json, indent=2, ensure_ascii=False), "json")
    if form == "math":
        formula = _formula(text)
        return f"$${formula}$$" if formula else text
    return _source(text, form)


def _footer(result: Result, style: Style) -> str:
    if not style.footer:
        return ""
    hint = " (--max-tokens raises the limit)" if result.finish_reason == "length" else ""
    return f"{result.footer}{hint}" + (f"\n{style.why}" if style.why else "")


def _formula(text: str) -> str:
    """The first formula with delimiters, or the text itself where it is no prose; else nothing."""
    delimited = _FORMULA.search(text)
    if delimited:
        return next(body for body in delimited.groups() if body is not None).strip()
    return "" if _PROSE.search(text) else text.strip()


class TerminalDisplay:
    """Text to stdout as it comes; status on stderr, on one line that is wiped, where that is a terminal."""

    def __init__(self, style: Style) -> None:
        self._style = style
        self._status = ""
        self._last = ""
        self._waiting = style.waiting
        self._next = time.monotonic() + PATIENCE
        self._said = 0.0

    def add(self, chunk: Chunk) -> None:
        self._waiting = ""
        if chunk.text:
            self._wipe()
            self._write(plain_text(chunk.text))
        elif chunk.status and not self._last:
            self._waiting = chunk.status
            self._next = self._said + INTERVAL

    def due(self) -> float | None:
        return self._next - time.monotonic() if self._waiting else None

    def flush(self) -> None:
        self._say(self._waiting)
        self._waiting = ""

    def finish(self, result: Result, error: BaseException | None) -> None:
        self._wipe()
        if self._last not in ("", "\n"):
            self._write("\n")
        if calls := result.calls_as_json:
            self._write(f"{calls}\n")
        mark = mark_of(error) or _limit(result, self._style)
        lines = [line for line in (mark, _footer(result, self._style)) if line]
        if lines and (self._last or isinstance(error, KeyboardInterrupt) or error is None):
            self._write(_dim("\n".join(lines)) + "\n")

    def conclude(self, text: str) -> None:
        self._wipe()
        if text:
            self._write(f"{plain_text(text)}\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._last = text[-1:] or self._last

    def _say(self, status: str) -> None:
        self._said = time.monotonic()
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{for_terminal(status_line(plain_text(status)), sys.stderr)}")
            sys.stderr.flush()
            self._status = status

    def _wipe(self) -> None:
        if self._status:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._status = ""


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if sys.stdout.isatty() else text
