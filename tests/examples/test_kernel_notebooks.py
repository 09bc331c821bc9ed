"""The notebooks about kernels, executed by a real Jupyter kernel on the CPU, and what is committed of them."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from mistral_nb import demo
from tests.examples.test_quickstart import code_cells

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
BENCH, KERNEL = "kernel_benchmarks.ipynb", "write_a_kernel.ipynb"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")


def execute(name: str, folder: Path) -> NotebookNode:
    """A copy of an example with what its cells leave. A cell that fails without being meant to raises."""
    shutil.copy(EXAMPLES / name, folder)
    book = nbformat.read(folder / name, as_version=4)
    client = demo.Streaming(
        book,
        kernel_manager_class=demo.OwnInterpreter,
        timeout=demo.CELL_SECONDS,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=["--log-level=ERROR"],
    )
    client.screen = demo.Screen(io.StringIO())
    client.execute()
    return book


def texts(book: NotebookNode, begins: str, kind: str = "text/plain") -> list[str]:
    """What the outputs of the cell with that source hold of a type."""
    (cell,) = [cell for cell in code_cells(book) if begins in cell.source]
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def errors(book: NotebookNode) -> list[str]:
    return [
        f"{output.ename}: {output.evalue}"
        for cell in code_cells(book)
        for output in cell.outputs
        if output.output_type == "error"
    ]


def check_bench(book: NotebookNode) -> None:
    """The table and two pictures of a sweep, the same from its file, no change with itself, and one a tenth slower."""
    assert errors(book) == []
    sweep, again = "%mistral_bench norm swiglu", "%mistral_bench --open today.json"
    line, table, *_ = texts(book, sweep)
    assert re.fullmatch(r"Kernels: done in .+; saved in today\.json", line)
    assert all(told in table for told in ("swiglu", "add_rms_norm", "rope_decode_attention", "eager"))
    assert len(texts(book, sweep, "image/png")) == 2
    assert table in texts(book, again)
    assert texts(book, again)[-1].startswith("No regression.")
    assert texts(book, "%mistral_bench --open slower.json")[-1].startswith("Regression.")


def check_kernel(book: NotebookNode) -> None:
    """The right ones pass, the wrong ones fail for what they were written for, and the listings are there."""
    torch, triton = "return gate / (1 + torch.exp(-gate))", "%%mistral_kernel swiglu\nimport triton"
    assert any("candidate" in text and "eager" in text for text in texts(book, torch))
    assert len(texts(book, torch, "image/png")) == 2
    assert "not timed" in "\n".join(texts(book, triton))
    mask, cache, loop = errors(book)
    assert re.search(r"the candidate is wrong: .*\[\d+, \d+\]", mask)
    assert "expected" in "\n".join(texts(book, "at < hidden - 1"))
    assert re.search(r"the candidate is wrong: .*with other numbers", cache)
    assert "3 s" in loop
    assert "--timeout" in loop
    compiled = "--compile sm_90"
    assert any("registers" in text for text in texts(book, compiled))
    assert ".code['_swiglu', 'sm_90', 'ptx']" in "\n".join(texts(book, compiled))
    (page,) = texts(book, compiled, "text/html")
    assert page.count("<details>") == page.count("</details>") == 2
    assert "<summary>_swiglu, sm_90: SASS, " in page
    assert not [
        output for cell in code_cells(book) for output in cell.outputs if output.output_type == "execute_result"
    ]
    assert "ld.global" in code_cells(book)[-1].outputs[0].text


CHECKS = {BENCH: check_bench, KERNEL: check_kernel}


@pytest.mark.parametrize("name", CHECKS)
def test_it_shows_what_it_says(name: str, tmp_path: Path) -> None:
    CHECKS[name](execute(name, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name], "it leaves no files beside it"


@pytest.mark.parametrize("name", CHECKS)
def test_the_committed_outputs_are_real_and_name_no_machine(name: str) -> None:
    book = nbformat.read(EXAMPLES / name, as_version=4)
    nbformat.validate(book)
    assert [cell.execution_count for cell in code_cells(book)] == list(range(1, len(code_cells(book)) + 1))
    CHECKS[name](book)
    assert not re.search(r"/(tmp|work|home|root|Users)/|[A-Z]:\\\\", (EXAMPLES / name).read_text(encoding="utf-8"))
