"""The line of a long piece of work: what it tells and when, and how a terminal and a file get it."""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TextIO

import pytest

from mistral_nb.progress import INTERVAL, Bar, Meter, Progress, amount, duration, for_terminal

pty = pytest.importorskip("pty", reason="this system has no pseudo terminals")
fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")

MB = 1_000_000


class Clock:
    """Time that stands still between two steps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def play(*reports: tuple[float, int, int | None], step: str = "Downloading") -> list[str]:
    """The lines of reports, each of seconds since the one before, bytes done and bytes in all."""
    clock = Clock()
    meter, lines = Meter(clock), []
    for seconds, done, total in reports:
        clock.now += seconds
        lines.append(meter.line(Progress(step, done, total)))
    return lines


def steadily(seconds: int, speed: int, total: int, start: int = 0) -> list[tuple[float, int, int | None]]:
    return [(0.5 if n else 0.0, start + n * speed // 2, total) for n in range(2 * seconds + 1)]


def test_a_line_tells_all_once_there_is_something_to_tell() -> None:
    lines = play(*steadily(4, 10 * MB, 100 * MB))
    assert lines[0] == f"Downloading   0%  {'░' * 20}  0 of 100 MB"
    assert all("/s" not in line and "left" not in line for line in lines[:4]), "less than two seconds tell nothing"
    assert lines[4] == f"Downloading  20%  {'█' * 4}{'░' * 16}  20 of 100 MB  10 MB/s  8 s left"
    assert lines[-1] == f"Downloading  40%  {'█' * 8}{'░' * 12}  40 of 100 MB  10 MB/s  6 s left"


def test_what_was_there_before_is_no_speed() -> None:
    last = play(*steadily(4, 5 * MB, 14_500 * MB, start=10_000 * MB))[-1]
    assert "10.0 of 14.5 GB  5.0 MB/s  15 min left" in last


def test_checking_what_was_there_before_is_no_speed_of_a_download() -> None:
    clock = Clock()
    meter = Meter(clock)
    for step, speed, start in (("Checking", 2_000, 0), ("Downloading", 5, 10_000)):
        for second in range(5):
            clock.now += 1
            line = meter.line(Progress(f"{step} shard-{second}", (start + second * speed) * MB, 14_500 * MB))
            assert ("/s" in line) == (second >= 2), line
    assert line.endswith("  5.0 MB/s  15 min left")


def test_the_speed_is_that_of_late() -> None:
    quick, slow = steadily(20, 100 * MB, 10_000 * MB), steadily(20, 10 * MB, 10_000 * MB, start=2_000 * MB)
    assert "100 MB/s" in play(*quick)[-1]
    lines = play(*quick, *slow)
    rates = [float(rate) for line in lines for rate in re.findall(r"([\d.]+) MB/s", line)]
    assert rates[-1] == 10
    drops = [before - after for before, after in pairwise(rates)]
    assert max(drops) < 10, "it changes little by little"


def test_a_stall_has_no_end_in_sight() -> None:
    last = play(*steadily(5, MB, 100 * MB), *((1.0, 5 * MB, 100 * MB) for _ in range(15)))[-1]
    assert last.endswith("5 of 100 MB  0 B/s")


@pytest.mark.parametrize(("done", "total"), [(10 * MB, 100 * MB), (70 * MB, 200 * MB)])
def test_what_counts_anew_is_measured_anew(done: int, total: int) -> None:
    """Fewer bytes than before, and another total."""
    lines = play(*steadily(5, 10 * MB, 100 * MB), (0.5, done, total))
    assert "MB/s" in lines[-2]
    assert "MB/s" not in lines[-1]


def test_all_of_it_is_only_the_end() -> None:
    assert "99%" in play((0, 999_999_999, 1_000_000_000))[0]
    (end,) = play((0, 1_000_000_001, 1_000_000_000))
    assert end == f"Downloading  100%  {'█' * 20}  1.0 of 1.0 GB"


def test_without_a_total_there_is_no_bar() -> None:
    assert play((0, 0, None), step="Waiting for another pull") == ["Waiting for another pull"]
    assert play(*((0.5, n * MB, None) for n in range(6)))[-1] == "Downloading  5.0 MB  2.0 MB/s"
    assert play((0, 0, 0)) == ["Downloading"]


def test_words_for_numbers() -> None:
    assert [amount(size) for size in (0, 999, 1000, 540 * MB, 14_500 * MB)] == [
        *("0 B", "999 B", "1.0 kB", "540 MB", "14.5 GB")
    ]
    seconds = (0, 59.4, 59.6, 200, 599, 601, 3_570, 7_500, 90_000, 1e9)
    assert [duration(each) for each in seconds] == [
        *("0 s", "59 s", "1 min 0 s", "3 min 20 s", "9 min 59 s"),
        *("10 min", "1 h 0 min", "2 h 5 min", "25 h", "over 100 h"),
    ]


class Terminal:
    """A pseudo terminal of some columns, and all that was written to it."""

    def __init__(self, columns: int, encoding: str) -> None:
        self._reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.out = os.fdopen(writer, "w", encoding=encoding)
        self._data = b""
        self._encoding = encoding
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        """Until the other end is closed, which is an error here."""
        while True:
            try:
                self._data += os.read(self._reader, 65_536)
            except OSError:
                return

    def written(self) -> str:
        self.out.close()
        self._thread.join()
        os.close(self._reader)
        return self._data.decode(self._encoding)


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(columns: int = 80, encoding: str = "utf-8") -> Terminal:
        made.append(Terminal(columns, encoding))
        return made[-1]

    yield make
    for each in made:
        each.out.close()


def test_a_terminal_gets_one_line_that_is_redrawn(
    terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_nb.progress.INTERVAL", 60.0)  # however long this takes
    screen = terminal()
    with Bar(screen.out) as bar:
        assert not bar.begun
        for done in (0, 46_000_000, 92_000_000):
            bar.show(Progress("Downloading", done, 92_000_000))
        assert bar.begun
        bar.show(Progress("Checking", 0, None))
    lines = screen.written().removesuffix("\r\n").split("\r")[1:]
    assert [line.split("  ")[0] for line in lines] == ["Downloading", "Downloading", "Checking"]
    assert "92 of 92 MB" in lines[1], "the end of a step is shown however soon it comes"
    assert len(lines[2]) == len(lines[1]), "the longer line before is painted over"
    assert lines[2].rstrip() == "Checking"


def test_a_terminal_is_not_drawn_oftener_than_anybody_can_see(terminal: Callable[..., Terminal]) -> None:
    screen = terminal()
    start = time.monotonic()
    with Bar(screen.out) as bar:
        for done in range(20_000):
            bar.show(Progress("Downloading", done * 1000, 50_000_000))
    took = time.monotonic() - start
    lines = screen.written().split("\r")[1:]
    assert len(lines) < 4 + took / INTERVAL
    assert "19 of 50 MB" in lines[-2] or "20 of 50 MB" in lines[-2], "the last state stays"


LINE = f"Downloading  45%  {'█' * 9}{'░' * 11}  42 of 93 MB  12 MB/s  5 s left"
SHORT = f"Downloading  45%  {'█' * 4}{'░' * 6}  42 of 93 MB  12 MB/s  5 s left"
LONG = LINE.replace("Downloading", "Pulling the embedded model: Downloading")


@pytest.mark.parametrize(
    ("line", "columns", "wanted"),
    [
        (LINE, 200, LINE),
        (LINE, len(LINE) + 1, LINE),
        (LINE, len(LINE), SHORT),
        (LINE, len(SHORT), SHORT.removesuffix("  5 s left")),
        (LINE, 42, SHORT[:41]),
        (LINE, 41, SHORT[:28]),
        (LINE, 17, "Downloading  45%"),
        (LINE, 8, "Downloa"),
        (LINE, 0, LINE),
        (LONG, len(SHORT) + 30, LONG.replace(LINE[16:40], SHORT[16:30])),
        (LONG, 80, SHORT.replace("Downloading", "Pulling the embedded model")),
        (LINE.replace("Downloading", "Downloading model-00002-of-00003.safetensors"), 80, SHORT),
        ("Asking nobody at all …", 12, "Asking nobo"),
    ],
)
def test_a_line_fits_its_terminal(terminal: Callable[..., Terminal], line: str, columns: int, wanted: str) -> None:
    assert for_terminal(line, terminal(columns).out) == wanted


def test_a_terminal_without_blocks_gets_ascii(terminal: Callable[..., Terminal]) -> None:
    screen = terminal(200, "ascii")
    assert for_terminal(LINE, screen.out) == LINE.replace("█", "#").replace("░", "-")
    assert for_terminal("Asking …", screen.out) == "Asking ..."


@pytest.mark.parametrize("make", [io.StringIO, lambda: io.TextIOWrapper(io.BytesIO(), "utf-8")])
def test_a_file_gets_a_line_for_each_step(make: Callable[[], TextIO]) -> None:
    file = make()
    with Bar(file) as bar:
        for done in (0, 1000, 2000):
            bar.show(Progress("Downloading", done, 3000))
        for seconds in (30, 29, 28):
            bar.show(Progress(f"Waiting {seconds} s, as the server asks", 2000, 3000))
        bar.show(Progress("Checking", 0, None))
    file.seek(0)
    assert file.read() == "Downloading\nWaiting 30 s, as the server asks\nChecking\n"


def test_the_demo_writes_a_step_once_where_nothing_is_redrawn() -> None:
    demo = pytest.importorskip("mistral_nb.demo", reason="the demo needs ipykernel, nbclient and nbformat")
    file = io.StringIO()
    screen = demo.Screen(file)
    for percent in (1, 40, 99):
        screen.show("one", LONG.replace("45%", f"{percent}%"))
    screen.show("one", LONG.replace("Downloading", "Checking"))
    screen.show("one", "Hello")
    screen.end()
    assert file.getvalue().split("\n") == [
        *("Pulling the embedded model: Downloading", "Pulling the embedded model: Checking", "Hello", "")
    ]


def test_the_demo_redraws_a_bar_on_a_terminal(terminal: Callable[..., Terminal]) -> None:
    demo = pytest.importorskip("mistral_nb.demo", reason="the demo needs ipykernel, nbclient and nbformat")
    narrow = terminal(60)
    screen = demo.Screen(narrow.out)
    screen.show("one", LINE)
    screen.show("one", LINE.replace("45%", "46%"))
    screen.end()
    first, second = narrow.written().split("\r\x1b[K")
    assert first == SHORT.removesuffix("  5 s left")
    assert second.strip() == first.replace("45%", "46%")
