"""How far a long piece of work is, and how that is shown: one line with a bar, in a terminal and in a notebook."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TextIO

__all__ = [
    "Bar",
    "Meter",
    "Progress",
    "Report",
    "amount",
    "duration",
    "for_terminal",
    "has_bar",
    "status_line",
    "step_of",
]

Report = Callable[[str, int, int | None], None]
"""Called with the step in words, the bytes done and the bytes in all; an exception from it ends the work."""

BAR = 20
"""Characters."""

INTERVAL = 0.1
"""Seconds between two drawings of a terminal's bar, and between two measurements."""

WINDOW = 10.0
"""Seconds that a speed is measured over."""

TRUST = 2.0
"""Seconds of measuring before a speed and the time left are told."""

_UNITS = ((1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB"), (1, "B"))
_GAP = "  "
_COLUMNS = 80


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a piece of work is: the step in words, and bytes done of `total` (None where nobody knows)."""

    step: str
    done: int
    total: int | None


class Meter:
    """Turns the progress of one piece of work into lines, with the speed of late and the time left by it.

    Bytes that were there at the first report, such as those of a pull that goes on, count as done but not as speed.
    What counts anew, another total or fewer bytes than before, is measured anew. So is a step of another first word:
    checking what an earlier pull left is quicker than downloading the rest.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kind: tuple[str, int | None] = "", None
        self._done = 0
        self._samples: deque[tuple[float, int]] = deque()

    def line(self, now: Progress) -> str:
        """One line, such as `Downloading  40%  ████████░░░░░░░░░░░░  37 of 93 MB  12.3 MB/s  5 s left`.

        Two spaces stand between the parts.
        """
        speed = self._speed(now)
        if not now.total:
            parts = [now.step, amount(now.done), _rate(speed)] if now.done > 0 else [now.step]
            return _GAP.join(part for part in parts if part)
        done = max(0, min(now.done, now.total))
        left = f"{duration(max(1, (now.total - done) / speed))} left" if speed and done < now.total else ""
        filled = BAR * done // now.total
        parts = [
            now.step,
            f"{100 * done // now.total:>2}%",
            "█" * filled + "░" * (BAR - filled),
            _of(done, now.total),
            _rate(speed),
            left,
        ]
        return _GAP.join(part for part in parts if part)

    def _speed(self, now: Progress) -> float | None:
        """Bytes a second over the last `WINDOW` seconds; None while there is too little to tell."""
        at, samples = self._clock(), self._samples
        kind = now.step.partition(" ")[0], now.total
        if kind != self._kind or now.done < self._done:
            samples.clear()
        self._kind, self._done = kind, now.done
        if not samples or at - samples[-1][0] >= INTERVAL:
            samples.append((at, now.done))
        while len(samples) > 1 and at - samples[1][0] >= WINDOW:
            samples.popleft()
        seconds = at - samples[0][0]
        return (now.done - samples[0][1]) / seconds if seconds >= TRUST else None


class Bar:
    """A piece of work on a terminal: one line that is redrawn; elsewhere one line for each step.

    `begun` tells whether there was anything to show. Leaving its `with` block closes it.
    """

    def __init__(self, out: TextIO) -> None:
        self.begun = False
        self._out = out
        self._live = out.isatty()
        self._meter = Meter()
        self._step = ""
        self._shown = self._latest = ""
        self._next = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def show(self, now: Progress) -> None:
        self.begun = True
        if not self._live:
            self._name(now.step)
            return
        self._latest = self._meter.line(now)
        if now.step != self._step or now.done == now.total or time.monotonic() >= self._next:
            self._step = now.step
            self._draw()

    def close(self, last: Progress | None = None) -> None:
        """Leave the last line as it is, or as `last` is, and go on below it."""
        if self._live and self._shown:
            self._latest = self._meter.line(last) if last else self._latest
            self._draw()
            self._out.write("\n")
            self._out.flush()
            self._shown = ""

    def erase(self) -> None:
        """Go on in place of the line."""
        if self._live and self._shown:
            self._out.write(f"\r{' ' * len(self._shown)}\r")
            self._out.flush()
            self._shown = ""

    def _name(self, step: str) -> None:
        """Write a step once. Steps that differ in numbers only, such as seconds to wait, are the same."""
        words = re.sub(r"\d+", "", step)
        if words != self._step:
            self._step = words
            self._out.write(f"{step}\n")
            self._out.flush()

    def _draw(self) -> None:
        self._next = time.monotonic() + INTERVAL
        line = for_terminal(self._latest, self._out)
        if line != self._shown:
            self._out.write(f"\r{line:<{len(self._shown)}}")
            self._out.flush()
            self._shown = line


def for_terminal(line: str, out: TextIO) -> str:
    """`line` for the terminal `out`: no wider, in characters that it takes. What matters least goes first."""
    room = max(1, _columns(out) - 1)  # the cursor stands behind the line
    if has_bar(line):
        forms = [_GAP.join(parts) for parts in _shorter(line.split(_GAP))]
        line = next((form for form in forms if len(form) <= room), forms[-1])
    try:
        "█░…".encode(out.encoding or "ascii")
    except UnicodeEncodeError:
        line = line.translate({ord("█"): "#", ord("░"): "-", ord("…"): "..."})
    return line[:room]


def _shorter(parts: list[str]) -> Iterator[list[str]]:
    """Ever shorter forms of a line with a bar: half the bar, fewer words of the step, and fewer parts behind it."""
    yield parts
    step, *rest = (part[1::2] if has_bar(part) else part for part in parts)
    words = step.split()
    for count in range(len(words), 0, -1):
        yield [" ".join(words[:count]).removesuffix(":"), *rest]
    for count in range(len(rest) - 1, -1, -1):
        yield [words[0], *rest[:count]]


def has_bar(line: str) -> bool:
    """Whether a line is one of `Meter`'s with a bar, whatever stands before it."""
    return "█" in line or "░" in line


def step_of(line: str) -> str:
    """A line of `Meter`'s without how far the step is."""
    return line.partition(_GAP)[0]


def status_line(status: str) -> str:
    """A status as one that something goes on behind; a bar says so itself."""
    return status if has_bar(status) else f"{status} …"


def amount(size: int) -> str:
    """A number of bytes in words, such as `269 MB` or `14.5 GB`."""
    unit, name = _unit(size)
    return f"{size / unit:.{_decimals(size, unit)}f} {name}"


def duration(seconds: float) -> str:
    """Seconds in words, such as `5 s`, `3 min 20 s` or `2 h 5 min`; in whole minutes and hours where it is long."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours} h" if hours < 100 else "over 100 h"


def _of(done: int, total: int) -> str:
    unit, name = _unit(total)
    decimals = _decimals(total, unit)
    return f"{done / unit:.{decimals}f} of {total / unit:.{decimals}f} {name}"


def _rate(speed: float | None) -> str:
    return "" if speed is None else f"{amount(round(speed))}/s"


def _unit(size: int) -> tuple[int, str]:
    return next((unit for unit in _UNITS if size >= unit[0]), _UNITS[-1])


def _decimals(size: int, unit: int) -> int:
    """One for a GB, which is a long time, and for less than ten of what is more than a byte."""
    return 1 if unit == _UNITS[0][0] or (size < 10 * unit and unit > 1) else 0


def _columns(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS
