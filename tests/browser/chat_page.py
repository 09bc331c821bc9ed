"""A chat in a notebook that is open in a browser, as its user handles it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
from playwright.sync_api import Locator, Page, expect

from tests.backends.scripted import Peer, environment_of, frame, head

if TYPE_CHECKING:
    from tests.browser.conftest import Lab

USAGE = frame({"response": "", "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}})
DONE = frame("[DONE]")
IDLE = ".jp-Notebook-ExecutionIndicator[data-status=idle]"


class Teller(Peer):
    """The scripted account: `say` sets what the next questions are answered with."""

    def say(self, *texts: Any) -> None:
        """Each text is a chunk; other steps are those of `Peer`. The end of an answer is added."""
        self.play(*texts, USAGE, DONE)

    def play(self, *steps: Any) -> None:
        """As `say`, but nothing is added."""
        self.scripts = [[head(), *map(framed, steps)]]

    def say_each(self, *answers: Any) -> None:
        """One answer for each of the next questions: a text, or a list of steps."""
        scripts = [[answer] if isinstance(answer, str) else answer for answer in answers]
        self.scripts = [[]] * self.connections + [[head(), *map(framed, steps), USAGE, DONE] for steps in scripts]

    @property
    def environment(self) -> dict[str, str]:
        """What a kernel needs to have the account as its own."""
        return environment_of(self.url)


def framed(step: Any) -> Any:
    """A text as a chunk of an answer, in ASCII so that half a surrogate pair can be sent; other steps as they are."""
    if not isinstance(step, str) or step in ("hold", "drip", "reset"):
        return step
    return f"data: {json.dumps({'response': step})}\n\n".encode()


class Notebook:
    """A notebook that is open in JupyterLab or in Notebook 7; its kernel has imported `mistral_nb`."""

    def __init__(self, lab: Lab, page: Page, front_end: str, name: str, teller: Teller | None = None) -> None:
        self.lab, self.page, self.front_end = lab, page, front_end
        self.path: Path = lab.folder / name
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        if not self.path.exists():
            write_notebook(self.path, "", "")
        self.go()
        if teller is not None:
            self.run(f"import os, mistral_nb\nos.environ.update({teller.environment!r})")

    def go(self) -> None:
        """Open it, or load its page again."""
        self.page.goto(self.lab.address(self.path.name, self.front_end))
        self.page.locator(".jp-Toolbar-kernelName", has_text="Python 3 (ipykernel)").wait_for()
        self.page.locator(IDLE).wait_for(state="attached")
        self.errors.clear()  # Notebook 7 has one of its own while it starts

    def cell(self, index: int = 0) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell").nth(index)

    def run(self, code: str, cell: int = 0, within: float = 180) -> Locator:
        """Type code over what a cell has, run it, and return the cell when it is done."""
        where = self.cell(cell)
        where.locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(code)
        before = where.locator(".jp-InputPrompt").inner_text()
        self.page.keyboard.press("Control+Enter")
        expect(where.locator(".jp-InputPrompt")).not_to_have_text(before)
        expect(where.locator(".jp-InputPrompt")).to_have_text(re.compile(r"\[\d+\]:"), timeout=within * 1000)
        return where

    def shown(self, cell: int = 0) -> ChatPage:
        """The chat that a cell shows, once it has found its kernel."""
        chat = ChatPage(self.page, self.cell(cell).locator(".mnb-chat"))
        chat.ready()
        return chat

    def chat(self, code: str = "", cell: int = 0) -> ChatPage:
        """A new chat, in the place of what the cell showed; `code` are its options."""
        self.run(f"chat = mistral_nb.Chat({code})\nchat", cell)
        return self.shown(cell)

    def value(self, expression: str, cell: int = 1) -> str:
        """What the kernel says that something is worth, by a cell of its own."""
        return self.run(f"print({expression})", cell).locator(".jp-OutputArea-output").inner_text().strip()

    def restart_kernel(self) -> None:
        """With the button in the toolbar, and the question that it asks answered."""
        self.page.locator("[data-command='notebook:restart-kernel'], [data-command='kernelmenu:restart']").first.click()
        self.page.locator(".jp-Dialog").get_by_role("button", name=re.compile("^(Confirm Kernel )?Restart")).click()
        self.page.locator(IDLE).wait_for(state="attached")

    def end_kernel(self) -> None:
        """As a server does that is started anew: the notebook's kernel and its session are gone."""
        headers = {"Authorization": f"token {self.lab.token}"}
        sessions = self.page.request.get(f"{self.lab.url}api/sessions", headers=headers).json()
        for session in sessions:
            if session["path"] == self.path.name:
                self.page.request.delete(f"{self.lab.url}api/sessions/{session['id']}", headers=headers)

    def wait_for_transcript(self, text: str) -> None:
        """Until the notebook's document has it: in the output that the live chat hides."""
        expect(self.cell().locator(".jp-OutputArea-child").nth(1)).to_contain_text(text)

    def save(self) -> nbformat.NotebookNode:
        """Save with Ctrl+S and read the file once it is new."""
        before = self.path.stat().st_mtime_ns
        with self.page.expect_response(
            lambda response: response.request.method == "PUT" and "/api/contents" in response.url
        ):
            self.page.keyboard.press("Control+s")
        assert self.path.stat().st_mtime_ns != before
        return nbformat.read(self.path, as_version=4)


def write_notebook(path: Path, *sources: str) -> None:
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in sources],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(book, path)


class ChatPage:
    """One chat of a page. `turn` is counted from 0."""

    def __init__(self, page: Page, root: Locator) -> None:
        self.page, self.root = page, root
        self.area = root.get_by_label("Your question")
        self.turns = root.locator(".mnb-turn")
        self.line = root.locator(".mnb-line")
        self.trouble = root.locator(".mnb-trouble")
        self.log = root.get_by_role("log")

    def ready(self) -> None:
        """The page has what the kernel has: the line says who would answer."""
        expect(self.root.locator(".mnb-who")).not_to_be_empty()
        expect(self.line).to_be_hidden()

    def button(self, name: str | re.Pattern[str], turn: int | None = None) -> Locator:
        where = self.root if turn is None else self.turns.nth(turn)
        return where.get_by_role("button", name=name, exact=isinstance(name, str))

    def ask(self, text: str) -> None:
        """Type and press Enter."""
        self.area.fill(text)
        self.area.press("Enter")

    def ask_done(self, text: str) -> None:
        """Ask, and wait until the answer is there."""
        turn = self.turns.count()
        self.ask(text)
        expect(self.turns).to_have_count(turn + 1)
        self.done(turn)

    def done(self, turn: int) -> None:
        """Until a turn's answers are written."""
        expect(self.turns.nth(turn).locator(".mnb-side").first).to_be_visible()
        expect(self.turns.nth(turn).locator(".mnb-side[aria-busy]")).to_have_count(0)

    def press(self, name: str, turn: int) -> None:
        """A button of a turn's toolbar, which may be shown only while the pointer is there."""
        self.turns.nth(turn).hover()
        self.button(name, turn).first.click()

    def prompt(self, turn: int) -> Locator:
        return self.turns.nth(turn).locator(".mnb-prompt")

    def answer(self, turn: int, side: int = 0) -> Locator:
        return self.turns.nth(turn).locator(".mnb-answer").nth(side)

    def footer(self, turn: int, side: int = 0) -> Locator:
        return self.turns.nth(turn).locator(".mnb-footer").nth(side)
