"""A %%mistral cell in a real JupyterLab: its text grows while it runs, and the Stop button keeps what is there."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser

STORY = "%%mistral --temperature 0 --max-tokens {tokens}\nWrite a long story about a lighthouse keeper."
WATCH = """cell => {
    window.lengths = [];
    new MutationObserver(() => {
        const length = cell.querySelector('.jp-OutputArea')?.textContent.length ?? 0;
        if (length !== window.lengths.at(-1)) window.lengths.push(length);
    }).observe(cell, {subtree: true, childList: true, characterData: true});
}"""


def execute(page: Page, cell: Locator) -> None:
    """Start a cell as a user does: click into it and press Shift+Enter."""
    cell.locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")


def wait_done(cell: Locator, count: int) -> None:
    """Until the cell's prompt shows its execution count."""
    cell.locator(".jp-InputPrompt", has_text=f"[{count}]:").wait_for()


def output(cell: Locator) -> Locator:
    return cell.locator(".jp-OutputArea-output")


def test_the_text_grows_while_the_cell_runs(lab: Lab, page: Page) -> None:
    load, ask = lab.open(page, "grow.ipynb", ["%load_ext mistral_nb", STORY.format(tokens=120)])
    execute(page, load)
    wait_done(load, 1)
    ask.evaluate(WATCH)
    execute(page, ask)
    wait_done(ask, 2)
    lengths = page.evaluate("window.lengths")
    growing = [length for before, length in pairwise(lengths) if length > before]
    assert len(growing) >= 8, lengths
    text = " ".join(output(ask).all_inner_texts())
    assert len(text) > 300
    assert "lighthouse" in text.lower()
    assert "tokens/s" in text


def test_the_stop_button_keeps_the_partial_text(lab: Lab, page: Page) -> None:
    cells = ["%load_ext mistral_nb", STORY.format(tokens=4000), "%mistral --max-tokens 8 Say hello."]
    load, ask, after = lab.open(page, "stop.ipynb", cells)
    execute(page, load)
    wait_done(load, 1)
    execute(page, ask)
    page.wait_for_function("cell => cell.textContent.length > 400", arg=ask.element_handle())
    page.locator(".jp-NotebookPanel-toolbar [data-command='notebook:interrupt-kernel']").first.click()
    wait_done(ask, 2)
    text = " ".join(output(ask).all_inner_texts())
    assert "lighthouse" in text.lower()
    assert "KeyboardInterrupt" in text
    execute(page, after)
    wait_done(after, 3)
    assert "tokens/s" in " ".join(output(after).all_inner_texts())
