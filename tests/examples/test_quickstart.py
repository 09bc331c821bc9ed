"""The quickstart, executed by a real Jupyter kernel with the embedded model, and the demo that prints it."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from mistral_nb import demo

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"


class Timed(io.StringIO):
    """Remembers how much had been written at each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)


def code_cells(book: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def answers(book: NotebookNode) -> list[tuple[NotebookNode, dict[str, Any]]]:
    return [
        (output, output.metadata["mistral_nb"])
        for cell in code_cells(book)
        for output in cell.outputs
        if "mistral_nb" in output.get("metadata", {})
    ]


def check_answers(book: NotebookNode) -> None:
    """Every %%mistral cell holds a real answer of the embedded model that says what it stands in for, with a footer."""
    asked = [cell for cell in code_cells(book) if cell.source.startswith("%%mistral")]
    found = answers(book)
    assert len(asked) >= 3
    assert len(found) == len(asked)
    for output, about in found:
        text, _, footer = output.data["text/plain"].rpartition(f"\n\n{about['model']}")
        assert len(re.findall(r"[A-Za-z]{3,}", text)) >= 8, text
        assert about["backend"] == "local"
        assert about["stand_in_for"] == "Mistral-7B-Instruct"
        assert about["finish_reason"] in ("stop", "length")
        assert about["usage"]["completion_tokens"] > 5
        assert "(stand-in for Mistral-7B-Instruct)" in footer
        assert "tokens/s" in footer
        assert output.data["text/markdown"]


@pytest.fixture(scope="module")
def executed(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[NotebookNode, Timed, int]:
    """A copy of the quickstart after `mistral-nb demo`: the notebook, what was printed, and the exit status."""
    path = tmp_path_factory.mktemp("quickstart") / QUICKSTART.name
    shutil.copy(QUICKSTART, path)
    out = Timed()
    book = nbformat.read(path, as_version=4)
    status = demo.show(book, path.parent, out)
    return book, out, status


def test_the_demo_succeeds_and_streams(executed: tuple[NotebookNode, Timed, int]) -> None:
    book, out, status = executed
    assert status == 0, out.getvalue()
    assert re.search(r"\d+ tokens from .+, [\d.]+ tokens/s", out.getvalue())
    # The one at temperature 0: one drawn by chance may be too short to come in pieces.
    text = answers(book)[1][0].data["text/plain"]
    assert text in out.getvalue()
    pieces = [piece for piece in out.writes if piece.strip() and piece in text]
    assert len(pieces) >= 5, pieces


def test_each_cell_leaves_a_real_answer_and_no_error(executed: tuple[NotebookNode, Timed, int]) -> None:
    book = executed[0]
    assert not [output for cell in code_cells(book) for output in cell.outputs if output.output_type == "error"]
    check_answers(book)


def test_the_committed_outputs_are_real_and_name_no_machine() -> None:
    book = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(book)
    assert [cell.execution_count for cell in code_cells(book)] == list(range(1, len(code_cells(book)) + 1))
    check_answers(book)
    assert not re.search(r"/(tmp|work|home|root|Users)/|[A-Z]:\\\\", QUICKSTART.read_text(encoding="utf-8"))


def test_the_demo_fails_when_a_cell_does(tmp_path: Path) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    out = io.StringIO()
    assert demo.show(book, tmp_path, out) == 1
    assert "ZeroDivisionError" in out.getvalue()


def test_the_demo_fails_without_an_answer(tmp_path: Path) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print('no answer')")])
    out = io.StringIO()
    assert demo.show(book, tmp_path, out) == 1
    assert "there is no answer" in out.getvalue()
