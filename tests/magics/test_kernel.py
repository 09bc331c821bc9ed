"""%%mistral in a real kernel: it streams, it stops, it fails as a cell should, and the next cell works."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core import completer
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.backends.scripted import PATIENCE, TOKEN, Peer, body, frame, head
from tests.magics.kernels import Kernel, Output

DONE = frame("[DONE]")
USAGE = frame({"response": "", "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}})


def answer(*texts: str) -> list[Any]:
    return [head(), *(frame({"response": text}) for text in texts), USAGE, DONE]


def test_updates_arrive_while_the_answer_is_still_being_written(cloud: Peer, kernel: Kernel) -> None:
    gates = [threading.Event() for _ in range(3)]
    words = ["one ", "two ", "three ", "four"]
    cloud.scripts = [
        [
            head(),
            frame({"response": words[0]}),
            *(step for gate, word in zip(gates, words[1:], strict=True) for step in (gate, frame({"response": word}))),
            USAGE,
            DONE,
        ]
    ]

    def watch(output: Output) -> None:
        for gate, word in zip(gates, words, strict=False):
            if word.strip() in output.markdown:
                gate.set()

    result = kernel.run("%%mistral\nCount.", watch)
    assert result.status == "ok"
    kinds = [each.kind for each in result.displays]
    assert kinds == ["display_data", *["update_display_data"] * (len(kinds) - 1)]
    assert len(kinds) >= 4
    assert len({each.content["transient"]["display_id"] for each in result.displays}) == 1
    lengths = [len(each.plain) for each in result.displays if "Asking" not in each.plain]
    assert all(before < after for before, after in pairwise(lengths)), lengths
    assert len(result.saved) == 1
    (saved,) = result.saved
    assert "one two three four" in saved.markdown
    assert "cloudflare" in saved.markdown
    metadata = saved.content["metadata"]["mistral_nb"]
    assert metadata["backend"] == "cloudflare"
    assert metadata["usage"]["completion_tokens"] == 2
    assert metadata["why"].startswith("auto")
    assert TOKEN not in str(result.outputs)


def test_the_value_of_the_cell_is_the_result_and_is_shown_once(cloud: Peer, kernel: Kernel) -> None:
    cloud.scripts = [answer("Hello.")]
    result = kernel.run("%%mistral -o reply\nHi")
    assert not [each for each in result.outputs if each.kind == "execute_result"]
    assert kernel.run("print(_ is reply, _.text, type(Out[2]).__name__)").printed == "True Hello. Result\n"
    again = kernel.run("reply")
    assert [each.kind for each in again.outputs] == ["execute_result"]
    assert "Hello." in again.outputs[0].markdown
    last = kernel.run("%mistral last")
    assert len(last.saved) == 1
    assert "Hello." in last.saved[0].markdown
    assigned = kernel.run("r = %mistral Hi\ndisplay(r)")
    assert ["Hello." in each.markdown for each in assigned.saved] == [True, True]


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupt_keeps_the_text_and_fails_the_cell(cloud: Peer, kernel: Kernel, times: int) -> None:
    cloud.scripts = [[head(), frame({"response": "Once upon a time"}), "hold"], answer("And then.")]
    sent = []

    def watch(output: Output) -> None:
        if "Once" in output.markdown and not sent:
            for _ in range(times):
                sent.append(kernel.interrupt())

    result = kernel.run("%%mistral -o partial\nTell a story.", watch)
    assert len(sent) == times
    assert result.status == "error"
    assert result.reply["ename"] == "KeyboardInterrupt"
    assert "".join(result.reply["traceback"]).count("\n") == 0
    assert cloud.gone.wait(PATIENCE)
    (saved,) = result.saved
    assert "Once upon a time" in saved.markdown
    assert "stopped here" in saved.markdown
    assert "stopped here" in saved.plain
    assert saved.content["metadata"]["mistral_nb"]["finish_reason"] == "cancelled"
    assert kernel.run("print(partial.text, partial.finish_reason)").printed == "Once upon a time cancelled\n"
    assert "Once upon a time" in kernel.run("%mistral last").saved[0].markdown
    assert "And then." in kernel.run("%mistral Go on.").saved[0].markdown


def test_an_interrupt_before_the_first_text(cloud: Peer, kernel: Kernel) -> None:
    cloud.scripts = [["hold"], answer("Now.")]

    def watch(output: Output) -> None:
        if "Asking" in output.markdown:
            kernel.interrupt()

    result = kernel.run("%%mistral\nHi", watch)
    assert result.reply["ename"] == "KeyboardInterrupt"
    (saved,) = result.saved
    assert "Asking" not in saved.markdown
    assert "stopped here" in saved.markdown
    assert "Now." in kernel.run("%mistral Hi").saved[0].markdown


def test_a_peer_that_breaks_off_keeps_the_text(cloud: Peer, kernel: Kernel) -> None:
    cloud.scripts = [[head(), frame({"response": "The first half"})]]
    result = kernel.run("%%mistral -o half\nHi")
    assert result.reply["ename"] == "StreamTruncated"
    assert len(result.reply["traceback"]) == 1
    (saved,) = result.saved
    assert "The first half" in saved.markdown
    assert "broken off here: StreamTruncated" in saved.markdown
    assert kernel.run("print(half.text, half.finish_reason)").printed == "The first half truncated\n"


def test_code_goes_into_the_next_cell(cloud: Peer, kernel: Kernel) -> None:
    cloud.scripts = [answer("Sure:\n```python\nprint(1)\n```\nDone.")]
    result = kernel.run("%%mistral --format code\nWrite code.")
    assert [each for each in result.reply["payload"] if each["source"] == "set_next_input"] == [
        {"source": "set_next_input", "text": "print(1)\n", "replace": False}
    ]
    assert "Sure" not in result.saved[0].markdown
    assert "```python\nprint(1)" in result.saved[0].markdown


@pytest.mark.skipif(not hasattr(completer, "context_matcher"), reason="this IPython has no matchers")
def test_completion_through_the_kernel(kernel: Kernel) -> None:
    kernel.run("topic = 'tides'")
    cases = {"%%mistral --max-t": "--max-tokens", "%mistral sta": "status", "%%mistral\nExplain {{top": "topic"}
    for code, wanted in cases.items():
        reply = kernel.client.complete(code, len(code), reply=True, timeout=PATIENCE)["content"]
        assert wanted in reply["matches"], code
        assert (code[: reply["cursor_start"]] + wanted).startswith(code)


def notebook(*cells: str) -> nbformat.NotebookNode:
    sources = ["%load_ext mistral_nb", *cells]
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_nbclient_keeps_the_whole_answer(cloud: Peer, tmp_path: Path) -> None:
    cloud.scripts = [answer(*("word " for _ in range(50)), "end.")]
    book = notebook("%%mistral\nHi", "after = 1")
    NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    (output,) = book.cells[1].outputs
    assert output.output_type == "display_data"
    assert output.data["text/plain"].count("word") == 50
    assert "end." in output.data["text/markdown"]
    assert output.metadata["mistral_nb"]["finish_reason"] == "stop"
    nbformat.validate(book)


def test_a_failure_stops_run_all_with_a_short_message(cloud: Peer, tmp_path: Path) -> None:
    refused = {"errors": [{"message": "Authentication error", "code": 10000}], "success": False, "result": {}}
    cloud.scripts = [body(refused, "401 Unauthorized")]
    book = notebook("%%mistral\nHi", "after = 1")
    with pytest.raises(CellExecutionError) as failure:
        NotebookClient(book, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert failure.value.ename == "AuthenticationError"
    (error,) = [each for each in book.cells[1].outputs if each.output_type == "error"]
    assert len("\n".join(error.traceback).splitlines()) <= 3
    assert TOKEN not in str(book)
    assert book.cells[2].execution_count is None
