"""`mistral-nb demo`: run a notebook through a real Jupyter kernel and print its answers as they stream.

Exits with 0 only when every cell ran and every `%%mistral` cell left a real answer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TextIO

from ipykernel.kernelspec import RESOURCES, get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode, read

from mistral_nb.errors import ConfigurationError
from mistral_nb.progress import for_terminal, has_bar, step_of

__all__ = ["run"]

QUICKSTART = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"
CELL_SECONDS = 600


class OwnInterpreter(AsyncKernelManager):
    """Starts the kernel of the interpreter that runs this, whatever kernels the user has installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(resource_dir=RESOURCES, **get_kernel_dict())


class Screen:
    """Prints displays that grow: what is new when the text goes on, all of it anew when it became another."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown: dict[str | None, str] = {}
        self._live: str | None = None

    def show(self, display: str | None, text: str) -> None:
        """The display's whole text so far. Space at its ends waits for what comes after it."""
        text = self._fitted(text.strip())
        before = self._shown.get(display, "") if self._live == display else ""
        if before and not text.startswith(before):
            self._restart(before)
            before = ""
        elif self._live != display:
            self.end()
        self._out.write(text[len(before) :])
        self._out.flush()
        self._shown[display] = text
        self._live = display

    def _fitted(self, text: str) -> str:
        """A bar in one line of a terminal; anywhere else its step alone, which is written once."""
        if not has_bar(text):
            return text
        return for_terminal(text, self._out) if self._out.isatty() else step_of(text)

    def _restart(self, before: str) -> None:
        """Take back one line on a terminal; anywhere else go on in a new one."""
        self._out.write("\r\x1b[K" if self._out.isatty() and "\n" not in before else "\n")

    def write(self, text: str) -> None:
        self.end()
        self._out.write(text)
        self._out.flush()

    def end(self) -> None:
        if self._live is not None:
            self._out.write("\n")
        self._live = None


class Streaming(NotebookClient):
    """Executes a notebook and shows every message of its kernel as it comes."""

    screen: Screen

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        kind, content = msg["msg_type"], msg["content"]
        if kind == "execute_input":
            self.screen.write("\n" + "\n".join(f"> {line}" for line in content["code"].splitlines()) + "\n\n")
        elif kind == "stream":
            self.screen.write(content["text"])
        elif kind in ("display_data", "update_display_data", "execute_result"):
            display = (content.get("transient") or {}).get("display_id")
            self.screen.show(display, content["data"].get("text/plain", ""))
        return super().process_message(msg, cell, cell_index)


def run(notebook: Path | None = None, out: TextIO = sys.stdout) -> int:
    """Execute `notebook`, the quickstart of a checkout by default; the exit status. The file stays as it is."""
    path = notebook or QUICKSTART
    if not path.is_file():
        raise ConfigurationError(f"there is no notebook {path}; name one: mistral-nb demo NOTEBOOK")
    return show(read(path, as_version=4), path.parent, out)  # type: ignore[no-untyped-call]


def show(book: NotebookNode, folder: Path, out: TextIO) -> int:
    """Execute `book` in `folder`, leaving its outputs in it, and print them as they come; the exit status."""
    client = Streaming(
        book,
        kernel_manager_class=OwnInterpreter,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": os.fspath(folder)}},
        extra_arguments=["--log-level=ERROR"],
    )
    client.screen = Screen(out)
    try:
        client.execute()
    except CellExecutionError as error:
        client.screen.write(f"\nA cell failed: {error.ename}: {error.evalue}\n")
        return 1
    answers = [answer for cell in book.cells if cell.cell_type == "code" for answer in answers_of(cell)]
    problems = [problem for problem in (problem_of(text, about) for text, about in answers) if problem]
    if problems or not answers:
        client.screen.write(f"\nNot every answer is real: {', '.join(problems) or 'there is no answer'}\n")
        return 1
    client.screen.write("\n" + "".join(f"{summary(about)}\n" for _, about in answers))
    return 0


def answers_of(cell: NotebookNode) -> list[tuple[str, dict[str, Any]]]:
    """Text and `mistral_nb` metadata of each answer that the cell left."""
    return [
        (output.data.get("text/plain", ""), output.metadata["mistral_nb"])
        for output in cell.outputs
        if "mistral_nb" in output.get("metadata", {})
    ]


def problem_of(text: str, about: dict[str, Any]) -> str:
    """What is wrong with an answer; empty when it is real."""
    tokens = (about.get("usage") or {}).get("completion_tokens", 0)
    if about.get("finish_reason") not in ("stop", "length"):
        return f"it ended with {about.get('finish_reason')!r}"
    if not text.strip() or not tokens:
        return "it is empty"
    return ""


def summary(about: dict[str, Any]) -> str:
    rate = about.get("tokens_per_second")
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    return f"{about['usage']['completion_tokens']} tokens from {about['model']} on {about['device']}{speed}"
