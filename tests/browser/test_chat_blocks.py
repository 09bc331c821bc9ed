"""Blocks of an answer on a page by themselves: what is wide scrolls, and code in a list is code like any other."""

from __future__ import annotations

import json
from dataclasses import asdict

from playwright.sync_api import Page

from mistral_nb.rendering import blocks
from mistral_nb_magics.chat.view import STATIC, join_styles

WIDTH = 300  # CSS pixels


def show(page: Page, text: str) -> None:
    """The answer in a chat as narrow as WIDTH."""
    shown = json.dumps([asdict(block) for block in blocks(text)])
    parts = "\n".join((STATIC / name).read_text("utf-8") for name in ("dom.js", "blocks.js"))
    page.set_content(
        f"<style>{join_styles()}</style><div class='mnb-chat' style='width:{WIDTH}px'><div id='here'></div></div>"
    )
    page.evaluate(
        f"""() => {{ {parts}
        const answer = new Answer();
        window.answer = answer;
        document.getElementById("here").append(answer.node);
        answer.update({shown}); }}"""
    )


def test_a_wide_formula_in_a_line_scrolls_by_itself(page: Page) -> None:
    show(page, "So $" + " + ".join(f"a_{{{n}}} x^{{{n}}}" for n in range(40)) + "$ it is; $x$.")
    wide, small = page.locator("math").all()
    assert wide.evaluate("node => node.getBoundingClientRect().width") <= WIDTH
    assert wide.evaluate("node => node.scrollWidth > node.clientWidth")
    assert wide.evaluate("node => (node.focus(), node.scrollLeft = 90, document.activeElement === node)")
    assert wide.evaluate("node => node.scrollLeft") == 90
    assert small.get_attribute("tabindex") is None


def test_code_in_a_list_is_code_like_any_other(page: Page) -> None:
    text = "- Run\n  ```python\n  def f():\n      return 1\n  ```\n"
    show(page, text)
    code = page.locator("li .mnb-code")
    assert code.locator(".mnb-language").inner_text() == "python"
    assert code.locator(".mnb-nf").inner_text() == "f"
    assert code.locator("pre").get_attribute("tabindex") == "0"
    assert code.get_by_role("button", name="Copy code").count() == 1
    grown = json.dumps([asdict(block) for block in blocks(text.replace("return 1", "return 22"))])
    page.evaluate(f"answer.update({grown})")
    assert code.evaluate("node => node.source()") == "def f():\n    return 22"
