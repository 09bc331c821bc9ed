"""A chat in a saved notebook: what nbconvert makes of it, and what streaming it cost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter, MarkdownExporter

from tests.backends.scripted import Peer, frame, head
from tests.chat.conftest import says
from tests.magics.kernels import Kernel
from tests.magics.pages import open_chat
from tests.rendering.answers import answer

SIZE = 32_000
"""Characters of an answer of 8,000 tokens."""

BAR = 5
"""Bytes that may reach the browser for one byte of an answer, the envelopes and the saved transcript included."""


@pytest.fixture
def notebook(cloud: Peer) -> nbformat.NotebookNode:
    """A notebook with a chat, executed and saved, with all that came to be after its cell had ended."""
    cloud.scripts = [says("A list:\n\n", "- *one*\n- `two`\n\n", "<b>not bold</b> $x^2$\n")]
    cells = [
        "import mistral_nb\nchat = mistral_nb.Chat()\nchat",
        "print(chat.ask('List <i>two</i>, please.'))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    nbformat.validate(notebook)
    return notebook


def test_the_notebook_holds_the_transcript_below_the_widget(notebook: nbformat.NotebookNode) -> None:
    widget, transcript = notebook.cells[0].outputs
    assert "application/vnd.jupyter.widget-view+json" in widget.data
    assert "> List &#60;i&#62;two&#60;/i&#62;, please." in transcript.data["text/markdown"]
    assert "- *one*" in transcript.data["text/markdown"]
    assert transcript.metadata.mistral_nb.transcript is True


def test_nbconvert_shows_the_transcript_as_markdown(notebook: nbformat.NotebookNode) -> None:
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert "<li><em>one</em></li>" in page
    assert "List &#60;i&#62;two" in page or "List &lt;i&gt;two" in page
    assert "<b>not bold</b>" not in page
    text, _ = MarkdownExporter().from_notebook_node(notebook)
    assert "> List &#60;i&#62;two&#60;/i&#62;, please." in text
    assert "- *one*" in text


def stream(text: str, rate: float) -> list[Any]:
    """An answer in tokens of 4 characters, so many a second."""
    began: list[float] = []

    def at(number: int) -> Callable[[], None]:
        def wait() -> None:
            began[:] = began or [time.monotonic()]
            threading.Event().wait(max(0.0, began[0] + number / rate - time.monotonic()))

        return wait

    steps: list[Any] = [head()]
    for number, start in enumerate(range(0, len(text), 4)):
        steps += [*([at(number)] if number % 4 == 0 else []), frame({"response": text[start : start + 4]})]
    usage = {"prompt_tokens": 4, "completion_tokens": len(text) // 4}
    return [*steps, frame({"response": "", "usage": usage, "finish_reason": "stop"}), frame("[DONE]")]


def test_a_long_answer_costs_the_browser_at_most_five_times_its_text(cloud: Peer, kernel: Kernel) -> None:
    """Every message on iopub, in the JSON in which a browser gets it, at 400 tokens/s: half prose, half code."""
    text = f"{answer('prose', SIZE // 2)}\n\n{answer('code', SIZE // 2 - 2)}"
    cloud.scripts = [stream(text, 400)]
    page = open_chat(kernel, "import mistral_nb\nchat = mistral_nb.Chat(max_tokens=8000)\nchat")
    assert page.ask(type="hello", writes=False)["type"] == "done"
    page.wire.clear()
    page.send(type="send", text="Go on.")
    page.read_until(lambda: len(page.updates()) == 1)
    (turn,) = page.turns.values()
    assert turn["finish"] == "stop"
    payload = sum(size(content(message)) for message in page.wire)
    whole = sum(size(message[part]) for message in page.wire for part in PARTS)
    patches = [message for message in page.heard if message["type"] == "patch"]
    length = len(text.encode())
    print(
        f"{length} bytes of text: {whole / length:.2f} times as many to the browser, {payload / length:.2f} payload "
        f"and {(whole - payload) / length:.2f} envelopes, in {len(patches)} patches (the bar is {BAR})"
    )
    assert whole <= BAR * length
    assert len(patches) >= 10


PARTS = ("header", "parent_header", "metadata", "content")


def content(message: dict[str, Any]) -> Any:
    """What a message is for, without the envelope."""
    data = message["content"].get("data", {})
    return data.get("content", data) if message["msg_type"] == "comm_msg" else data


def size(part: Any) -> int:
    return len(json.dumps(part, ensure_ascii=False, default=str).encode())
