"""What a notebook output and a terminal are sent while an answer comes, and what stays."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

from mistral_nb.answer import Answer
from mistral_nb.errors import ConnectionFailed
from mistral_nb.types import Chunk, GenerationRequest
from mistral_nb_magics.display import INTERVAL, NotebookDisplay, Style, TerminalDisplay
from mistral_nb_magics.stream import Interrupts, follow
from tests.magics.scripted_backend import LIMIT, Scripted, Step

REQUEST = GenerationRequest(prompt="Hi")
ESCAPE = "\x1b"


class Recorder(DisplayPublisher):
    """A publisher that keeps each message with its time, and may call back."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[dict[str, Any]] = []
        self.watch: Callable[[dict[str, Any]], None] = lambda message: None

    def publish(self, data: Any, metadata: Any = None, **rest: Any) -> None:  # type: ignore[override]
        self.sent.append({"data": data, "metadata": metadata, "at": time.monotonic(), **rest})
        self.watch(self.sent[-1])

    def texts(self, kind: str = "text/markdown") -> list[str]:
        return [message["data"].get(kind, "") for message in self.sent]


@pytest.fixture
def recorder(bare_shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(bare_shell, "display_pub", recorder)
    return recorder


def play(shell: InteractiveShell, style: Style, *steps: Step | str) -> BaseException | None:
    """Follow a script on a notebook's display, finish it, and return what ended it."""
    display = NotebookDisplay(shell, style)
    with Interrupts() as interrupts, Answer(Scripted(*steps), REQUEST) as answer:
        error = follow(answer, display, interrupts)
        display.finish(answer.result, error)
    return error


def test_one_display_with_a_paced_preview_and_a_whole_end(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    words = [f"w{number} " for number in range(400)]
    gates = {number: threading.Event() for number in range(0, 400, 100)}

    def watch(message: dict[str, Any]) -> None:
        for number, gate in gates.items():
            if f"w{max(number - 1, 0)} " in message["data"]["text/plain"] + " ":
                gate.set()

    recorder.watch = watch
    gates[0].set()
    steps: list[Step | str] = []
    for number, word in enumerate(words):
        steps += [gates[number], word] if number in gates else [word]
    assert play(bare_shell, Style(why="because"), *steps) is None
    seconds = recorder.sent[-1]["at"] - recorder.sent[0]["at"]
    assert 4 <= len(recorder.sent) <= 4 + seconds / INTERVAL
    assert [message["update"] for message in recorder.sent] == [False] + [True] * (len(recorder.sent) - 1)
    assert len({message["transient"]["display_id"] for message in recorder.sent}) == 1
    for before, after in zip(recorder.sent[:-2], recorder.sent[1:-1], strict=True):
        assert after["at"] - before["at"] >= INTERVAL * 0.9
    final = recorder.sent[-1]
    assert "".join(words).strip() in final["data"]["text/markdown"]
    assert "because" in final["data"]["text/markdown"]
    assert final["data"]["text/plain"].startswith("w0 w1")
    assert final["metadata"]["mistral_nb"]["finish_reason"] == "stop"
    assert all(not message["metadata"] for message in recorder.sent[:-1])


def test_statuses_come_first_in_the_same_display(
    bare_shell: InteractiveShell, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_nb_magics.display.PATIENCE", LIMIT)
    seen = threading.Event()
    later = threading.Event()

    def watch(message: dict[str, Any]) -> None:
        plain = message["data"]["text/plain"]
        (seen if "Starting" in plain else later if "Pulling <x> 40%" in plain else threading.Event()).set()

    recorder.watch = watch
    steps = (Chunk(status="Starting the engine"), seen, Chunk(status="Pulling <x> 40%"), later, "Hello.")
    play(bare_shell, Style(waiting="Asking"), *steps)
    texts = recorder.texts()
    assert texts[0] == "*Starting the engine …*"
    assert texts[1] == "*Pulling &lt;x> 40% …*"
    assert "Hello." in texts[-1]
    assert "Starting" not in texts[-1]


def test_it_says_that_it_waits_only_when_it_has_to(
    bare_shell: InteractiveShell, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    recorder.watch = lambda message: gate.set()
    play(bare_shell, Style(waiting="Asking a script"), gate, "Hello.")
    assert recorder.texts()[0] == "*Asking a script …*"
    recorder.sent.clear()
    monkeypatch.setattr("mistral_nb_magics.display.PATIENCE", LIMIT)
    play(bare_shell, Style(waiting="Asking a script"), "Hello.")
    assert not any("Asking" in text for text in recorder.texts())


def test_a_failure_before_the_first_text_leaves_no_output(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    error = play(bare_shell, Style(), ConnectionFailed("nobody there"))
    assert isinstance(error, ConnectionFailed)
    assert not recorder.sent


def test_a_failure_later_keeps_the_text(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    error = play(bare_shell, Style(), "The first half", ConnectionFailed("gone"))
    assert isinstance(error, ConnectionFailed)
    final = recorder.sent[-1]["data"]
    for text in (final["text/markdown"], final["text/plain"]):
        assert "The first half" in text
        assert "broken off here: ConnectionFailed" in text


def test_a_programming_error_of_a_backend_is_not_hidden(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    assert isinstance(play(bare_shell, Style(), "Text", ZeroDivisionError()), ZeroDivisionError)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupts_keep_the_text(
    bare_shell: InteractiveShell, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr("mistral_nb_magics.stream.GRACE", LIMIT)
    never = threading.Event()

    def watch(message: dict[str, Any]) -> None:
        if "Half" in message["data"]["text/plain"] and "stopped" not in message["data"]["text/plain"]:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)

    recorder.watch = watch
    former = signal.getsignal(signal.SIGINT)
    try:
        assert isinstance(play(bare_shell, Style(), "Half an answer", never), KeyboardInterrupt)
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        pytest.fail("an interrupt right after the end got through")
    finally:
        never.set()
        signal.signal(signal.SIGINT, former)
    assert "Half an answer" in recorder.texts()[-1]
    assert "stopped here" in recorder.texts()[-1]
    assert recorder.sent[-1]["metadata"]["mistral_nb"]["finish_reason"] == "cancelled"


def test_a_third_interrupt_gets_through(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    def watch(message: dict[str, Any]) -> None:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)

    recorder.watch = watch
    never = threading.Event()
    former = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            play(bare_shell, Style(), "Half", never)
    finally:
        never.set()
        signal.signal(signal.SIGINT, former)


def test_interrupts_are_restored(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    former = signal.getsignal(signal.SIGINT)
    play(bare_shell, Style(), "Hello.")
    assert signal.getsignal(signal.SIGINT) is former


def test_it_works_in_a_thread_where_no_signal_arrives(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    ended: list[BaseException | None] = [ValueError()]
    thread = threading.Thread(target=lambda: ended.append(play(bare_shell, Style(), "Hello.")))
    thread.start()
    thread.join(LIMIT)
    assert ended[-1] is None
    assert "Hello." in recorder.texts()[-1]


def test_an_open_fence_is_closed_in_what_is_shown_only(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    with Answer(Scripted("```python\nx = 1"), REQUEST) as answer, Interrupts() as interrupts:
        display = NotebookDisplay(bare_shell, Style())
        follow(answer, display, interrupts)
        display.finish(answer.result, None)
    assert "```python\nx = 1\n```\n\n<small>" in recorder.texts()[-1]
    assert answer.result.text == "```python\nx = 1"


def test_an_empty_answer_is_never_empty_markdown(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    play(bare_shell, Style(footer=False), " ", "\n")
    assert recorder.texts()[-1].strip()


def test_a_long_answer_is_sent_less_often(bare_shell: InteractiveShell, recorder: Recorder) -> None:
    gates = [threading.Event() for _ in range(2)]
    text = "word " * 10_000

    def watch(message: dict[str, Any]) -> None:
        gates[min(len(recorder.sent), 2) - 1].set()

    recorder.watch = watch
    play(bare_shell, Style(), text, gates[0], "more", gates[1])
    assert recorder.sent[1]["at"] - recorder.sent[0]["at"] > 0.4


@pytest.mark.parametrize(
    ("form", "text", "kind", "wanted"),
    [
        ("text", "**x** <b>", "text/plain", "**x** <b>"),
        ("json", 'So:\n```json\n{"a": 1}\n```', "text/markdown", '```json\n{\n  "a": 1\n}\n```'),
        ("json", "No JSON", "text/markdown", "No JSON"),
        ("html", "<b>x</b>\n```", "text/markdown", "````html\n<b>x</b>\n```\n````"),
        ("code", "Do\n```py\nx = 1\n```\nthen\n```\ny\n```", "text/markdown", "```python\nx = 1\n\ny\n\n```"),
        ("math", "\\[ a < b \\]", "text/markdown", "$$a \\lt b$$"),
        ("math", "So \\(x^2\\) is\n\nlarge", "text/markdown", "$$x^2$$"),
        ("math", "E = mc^2", "text/markdown", "$$E = mc^2$$"),
        ("math", "\\frac{a}{b} + \\alpha \\beta", "text/markdown", "$$\\frac{a}{b} + \\alpha \\beta$$"),
        ("math", "The area of a circle", "text/markdown", "The area of a circle"),
    ],
)
def test_forms(bare_shell: InteractiveShell, recorder: Recorder, form: str, text: str, kind: str, wanted: Any) -> None:
    play(bare_shell, Style(form), text)
    data = recorder.sent[-1]["data"]
    shown = data[kind]
    assert shown == wanted or (isinstance(shown, str) and shown.startswith(wanted)), shown
    assert ("text/markdown" in data) == (kind == "text/markdown")
    assert all(recorder.sent[-1]["metadata"]["mistral_nb"]["model"] in shown for shown in data.values())


def test_a_terminal_gets_the_text_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    display = TerminalDisplay(Style(why="because"))
    with Answer(Scripted(Chunk(status="Starting"), f"Red {ESCAPE}[31m", "text\x07\n"), REQUEST) as answer:
        with Interrupts() as interrupts:
            error = follow(answer, display, interrupts)
        display.finish(answer.result, error)
    shown = capsys.readouterr()
    assert shown.out == f"Red [31mtext\n{answer.result.footer}\nbecause\n"
    assert shown.err == ""
