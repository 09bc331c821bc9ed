"""What a chat keeps while its user changes it: drafts, the answer that was chosen, and its place for cells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.chat_page import Notebook, Teller
    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def own(lab: Lab, browser: Browser, teller: Teller) -> Iterator[Notebook]:
    with opened(lab, browser, "lab", "kept", teller) as notebook:
        yield notebook
        assert notebook.errors == []


def test_the_better_of_two_answers_is_continued(own: Notebook, teller: Teller) -> None:
    chat = own.chat("compare={'model': '@cf/mistral/mistral-7b-instruct-v0.1'}")
    teller.say_each("An answer.", "An answer.")
    chat.ask_done("Compare")
    sides = chat.turns.nth(0).locator(".mnb-side")
    mark = "The next question follows this answer"
    expect(sides.nth(0).get_by_text(mark)).to_be_visible()
    expect(chat.button("Continue from this answer")).to_have_count(1)
    better = own.value("chat.conversation.compared(chat.conversation.head)[1].id")
    sides.nth(1).get_by_role("button", name="Continue from this answer").click()
    expect(sides.nth(1).get_by_text(mark)).to_be_visible()
    expect(sides.nth(0).get_by_text(mark)).to_be_hidden()
    expect(chat.area).to_be_focused()
    expect(chat.root.locator("[aria-live=polite]")).to_contain_text(mark)
    chat.button("Compare two answers").click()
    teller.say("Further.")
    chat.ask_done("And then?")
    assert own.value("chat.conversation.path[0].id") == better
    expect(sides.nth(1).get_by_text(mark)).to_be_visible()

    chat.press("Delete this turn", turn=0)
    expect(chat.prompt(0)).to_have_text("And then?")
    expect(chat.turns).to_have_count(1)
    chat.button("Undo").click()
    expect(chat.turns).to_have_count(2)
    expect(sides).to_have_count(2)
    expect(chat.button("Undo")).to_be_hidden()
    assert own.value("len(chat.conversation.turns)") == "3"


def test_a_draft_of_an_edit_outlives_another_version_of_its_turn(own: Notebook, teller: Teller) -> None:
    chat = own.chat()
    teller.say_each("One.", "One again.", "Edited.")
    chat.ask_done("First")
    chat.press("Edit and ask again", turn=0)
    editor = chat.root.get_by_label("Edit the question")
    editor.fill("First, but longer")
    chat.press("Answer again", turn=0)
    expect(chat.answer(0)).to_have_text("One again.")
    chat.done(0)
    expect(editor).to_have_value("First, but longer")
    chat.press("Previous version", turn=0)
    expect(chat.answer(0)).to_have_text("One.")
    expect(chat.turns).to_have_count(1)
    expect(editor).to_have_value("First, but longer")
    editor.press("Enter")
    expect(chat.prompt(0)).to_have_text("First, but longer")
    expect(chat.answer(0)).to_have_text("Edited.")
    expect(editor).to_have_count(0)
    chat.done(0)


def test_a_draft_of_the_system_prompt_stays_until_it_is_cancelled(own: Notebook) -> None:
    chat = own.chat("system='Be brief.'")
    system = chat.root.get_by_role("textbox", name="System prompt")
    chat.button("System prompt").click()
    system.fill("Be long.")
    system.press("Escape")
    expect(system).to_be_hidden()
    chat.button("System prompt").click()
    expect(system).to_have_value("Be long.")
    chat.button("Cancel").click()
    expect(system).to_be_hidden()
    chat.button("System prompt").click()
    expect(system).to_have_value("Be brief.")


def test_cells_come_to_where_the_chat_is_shown_after_an_export(own: Notebook, teller: Teller) -> None:
    chat = own.chat()
    teller.say("Said.")
    chat.ask_done("Something to tell")
    chat.button("Export").click()
    with own.page.expect_download():
        chat.root.get_by_role("menuitem", name="Markdown file").click()
    own.run("chat")
    own.shown()
    own.run("exported = chat.to_cells()", cell=1)
    expect(own.page.locator(".jp-MarkdownCell", has_text="Something to tell")).to_have_count(1)
