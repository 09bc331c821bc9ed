"""The notebook about adapters, executed by a real Jupyter kernel: trained with peft, served, weighed and swapped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from mistral_nb import demo
from tests.examples.test_quickstart import Timed, answers, code_cells

LORA = Path(__file__).resolve().parents[2] / "examples" / "lora.ipynb"
PIRATE, BUTLER = "Arr, matey!", "Certainly, sir."


def printed(book: NotebookNode, begins: str) -> str:
    """What the cell with that source printed."""
    (cell,) = [cell for cell in code_cells(book) if begins in cell.source]
    return "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")


def seconds(book: NotebookNode, style: str) -> int:
    """That a training took, by what it printed."""
    (took,) = re.findall(rf"adapters/{style} after (\d+) s", printed(book, f'train("{style}"'))
    return int(took)


def check_trained(book: NotebookNode) -> None:
    """The losses fall, and each adapter speaks in its own style only where it is asked for."""
    for style in ("pirate", "butler"):
        losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed(book, f'train("{style}"'))]
        assert losses[-1] < losses[0] / 4
        assert seconds(book, style) > 0
    assert "it fits" in printed(book, "lora check")
    (base, base_about), (adapted, about) = ((output.data["text/plain"], about) for output, about in answers(book))
    assert (base_about["adapter"], about["adapter"]) == (None, "adapters/pirate")
    assert PIRATE not in base
    assert adapted.startswith(PIRATE)


def check_scales(book: NotebookNode) -> None:
    (cell,) = [cell for cell in code_cells(book) if "lora_scale=scale" in cell.source]
    names, _, texts = (line.strip("| ").split(" | ") for line in cell.outputs[0].data["text/markdown"].splitlines())
    said = dict(zip(names, texts, strict=True))
    assert list(said) == ["the model", "pirate at 0", "pirate at 0.5", "pirate at 1"]
    assert said["pirate at 0"] == said["the model"]
    assert said["pirate at 1"].startswith(PIRATE)


def check_conversation(book: NotebookNode) -> None:
    told = printed(book, "turns = []")
    assert re.findall(r"^adapters/(\w+): (\w+)", told, re.M) == [
        ("pirate", "Arr"),
        ("butler", "Certainly"),
        ("pirate", "Arr"),
    ]


# Less than half of the training shows the styles too; the outputs that are committed are of the whole.
SHORTER = {
    "LENGTH, BATCH = 64, 8": "LENGTH, BATCH = 64, 4",
    'train("pirate", steps=24)': 'train("pirate", steps=18)',
    'train("butler", steps=10)': 'train("butler", steps=12)',
}


def shorten(book: NotebookNode) -> None:
    for whole, part in SHORTER.items():
        (cell,) = [cell for cell in code_cells(book) if whole in cell.source]
        cell.source = cell.source.replace(whole, part)


@pytest.fixture(scope="module")
def executed(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    path = tmp_path_factory.mktemp("lora") / LORA.name
    shutil.copy(LORA, path)
    book, out = nbformat.read(path, as_version=4), Timed()
    shorten(book)
    assert demo.show(book, path.parent, out) == 0, out.getvalue()
    return book


def test_it_is_trained_and_served(executed: NotebookNode) -> None:
    assert not [output for cell in code_cells(executed) for output in cell.outputs if output.output_type == "error"]
    check_trained(executed)
    check_scales(executed)
    check_conversation(executed)


def test_the_committed_outputs_are_real_and_name_no_machine() -> None:
    book = nbformat.read(LORA, as_version=4)
    nbformat.validate(book)
    assert [cell.execution_count for cell in code_cells(book)] == list(range(1, len(code_cells(book)) + 1))
    check_trained(book)
    check_scales(book)
    check_conversation(book)
    assert seconds(book, "pirate") < 120, "its text says that it is trained in under two minutes"
    assert not re.search(r"/(tmp|work|home|root|Users)/|[A-Z]:\\\\", LORA.read_text(encoding="utf-8"))
