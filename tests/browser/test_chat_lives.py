"""What a chat outlives: a reload of the page, a restart and the end of its kernel, another cell that runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from mistral_nb.chat import Conversation
from tests.browser.conftest import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.chat_page import ChatPage, Notebook, Teller
    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser

NOT_CONNECTED = re.compile("^Not connected")


@pytest.fixture(params=["lab", "notebook"])
def own(request: pytest.FixtureRequest, lab: Lab, browser: Browser, teller: Teller) -> Iterator[Notebook]:
    """A notebook of the test's own, since its kernel does not outlive it."""
    with opened(lab, browser, request.param, f"{request.function.__name__}-{request.param}", teller) as notebook:
        yield notebook


def transcript(book: Any) -> str:
    """The chat as the file of its notebook has it: Markdown in the second output."""
    _, saved = book.cells[0].outputs
    assert saved.metadata["mistral_nb"] == {"transcript": True}
    return str(saved.data["text/markdown"])


def exported(chat: ChatPage, label: str) -> str:
    chat.button("Export").click()
    with chat.page.expect_download() as download:
        chat.root.get_by_role("menuitem", name=label).click()
    return Path(download.value.path()).read_text()


def test_a_chat_outlives_its_page_and_its_transcript_its_kernel(own: Notebook, teller: Teller) -> None:
    chat = own.chat()
    teller.say_each("The *first* answer.", "The second answer.", "Busy no more.")
    chat.ask_done("First question")
    expect(own.cell().locator(".jp-OutputArea-child:visible")).to_have_count(1)
    own.wait_for_transcript("The first answer.")
    assert "The *first* answer." in transcript(own.save())

    own.go()
    chat = own.shown()
    expect(chat.answer(0)).to_have_text("The first answer.")
    expect(own.cell().locator(".jp-OutputArea-child:visible")).to_have_count(1)
    chat.ask_done("Second question")
    expect(chat.answer(1)).to_have_text("The second answer.")
    sent = [message["content"] for message in teller.seen[-1].json["messages"]]
    assert sent == ["First question", "The *first* answer.", "Second question"]
    own.wait_for_transcript("The second answer.")
    saved = transcript(own.save())
    assert "Second question" in saved
    assert "The second answer." in saved

    own.restart_kernel()
    expect(chat.line).to_have_text(NOT_CONNECTED)
    expect(chat.area).to_be_disabled()
    expect(chat.answer(1)).to_have_text("The second answer.")
    expect(own.cell().locator(".jp-OutputArea-child:visible")).to_have_count(1)
    expect(chat.line).to_contain_text("Running this cell starts an empty chat: export this one first. Chat.load")
    assert "The *first* answer." in exported(chat, "Markdown file")
    kept = Conversation.from_json(exported(chat, "JSON file"))
    assert [(turn.prompt, turn.answer) for turn in kept] == [
        ("First question", "The first answer."),
        ("Second question", "The second answer."),
    ]

    own.end_kernel()
    own.go()
    text = own.cell().locator(".jp-OutputArea")
    for part in ("First question", "The first answer.", "Second question", "The second answer."):
        expect(text.get_by_text(part).filter(visible=True)).to_have_count(1)
    assert own.errors == []


def test_an_answer_goes_on_while_the_page_is_loaded_again(own: Notebook, teller: Teller) -> None:
    chat = own.chat()
    teller.play("Begun ", "drip")
    chat.ask("A long one")
    expect(chat.answer(0)).to_contain_text("drip drip")
    own.save()
    own.go()
    chat = own.shown()
    expect(chat.answer(0)).to_contain_text("Begun drip")
    length = len(chat.answer(0).inner_text())
    own.page.wait_for_function(
        "([node, length]) => node.textContent.length > length", arg=[chat.answer(0).element_handle(), length]
    )
    chat.button("Stop").click()
    chat.done(0)
    expect(chat.footer(0)).to_contain_text("cancelled")


def test_what_is_half_written_can_be_exported_without_its_kernel(own: Notebook, teller: Teller) -> None:
    chat = own.chat("compare={'temperature': 0}")
    half = ["Begun:\n\n```python\nx = 1\n```\n\nand ", "drip"]
    teller.say_each(half, half)
    chat.ask("Two\nlines")
    for side in (0, 1):
        expect(chat.answer(0, side)).to_contain_text("and drip")
    own.restart_kernel()
    expect(chat.line).to_have_text(NOT_CONNECTED)
    text = exported(chat, "Markdown file")
    assert "> Two\n> lines\n" in text
    assert text.count("Begun:\n\n```python\nx = 1\n```\n\nand drip") == 2
    kept = Conversation.from_json(exported(chat, "JSON file"))
    assert kept.head is not None
    assert len(kept.compared(kept.head)) == 2


def test_the_embedded_model_answers_in_a_chat(lab: Lab, browser: Browser, teller: Teller, embedded: Path) -> None:
    """In a notebook that knows the account too: the chat says whom it asks."""
    with opened(lab, browser, "lab", "embedded", teller) as own:
        chat = own.chat("backend='local', model='embedded', temperature=0, max_tokens=2000")
        expect(chat.root.locator(".mnb-who")).to_contain_text("SmolLM2 135M Instruct · local")
        chat.ask("Write a long story about a lighthouse keeper.")
        own.page.wait_for_function("node => node.textContent.length > 200", arg=chat.answer(0).element_handle())
        assert chat.button("Stop").is_enabled(), "the text grows while the answer is written"
        chat.area.press("Escape")
        chat.done(0)
        assert "lighthouse" in chat.answer(0).inner_text()
        expect(chat.footer(0)).to_contain_text(re.compile(r"first token.*cancelled"))
        result = own.value("chat.ask('Name a colour.').usage.completion_tokens > 0")
        assert result == "True"
        expect(chat.turns).to_have_count(2)
        expect(chat.footer(1)).to_contain_text("tokens/s")
