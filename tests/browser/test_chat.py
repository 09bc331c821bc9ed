"""A chat in JupyterLab and in Notebook 7, from the first question to the export, against a scripted account."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from tests.backends.scripted import PATIENCE

if TYPE_CHECKING:
    from tests.browser.chat_page import Notebook, Teller

pytestmark = pytest.mark.browser

FIRST_TEXT = """root => {
    window.firstText = 0;
    const watcher = new MutationObserver(() => {
        const answer = [...root.querySelectorAll(".mnb-answer")].at(-1);
        if (answer?.textContent && !firstText) (window.firstText = Date.now()), watcher.disconnect();
    });
    watcher.observe(root, {subtree: true, childList: true, characterData: true});
}"""
# A button says for a moment only that it did.
COPIED = """root => {
    window.copied = false;
    const watcher = new MutationObserver(() => {
        if (root.querySelector("button[aria-label=Copied]")?.checkVisibility()) window.copied = true;
    });
    watcher.observe(root, {subtree: true, attributes: true, attributeFilter: ["aria-label"]});
}"""
TIME_STOP = """root => {
    const stopped = new Promise(resolve => {
        const watcher = new MutationObserver(() => {
            if (!root.querySelector("[aria-busy]")) watcher.disconnect(), resolve(performance.now());
        });
        watcher.observe(root, {subtree: true, attributes: true, attributeFilter: ["aria-busy"]});
    });
    const pressed = performance.now();
    root.querySelector("[data-act=stop]").click();
    return stopped.then(at => at - pressed);
}"""


@pytest.fixture(autouse=True)
def no_page_errors(notebook: Notebook) -> Iterator[None]:
    yield
    assert notebook.errors == []


def test_an_answer_streams(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat()
    said: list[float] = []
    gate = threading.Event()
    teller.say(lambda: said.append(time.time() * 1000), "The first part", gate, " and the **second** part.")
    chat.root.evaluate(FIRST_TEXT)
    chat.ask("Write two parts.")
    expect(chat.answer(0)).to_have_text("The first part")
    late = notebook.page.evaluate("firstText") - said[0]
    print(f"first text {late:.0f} ms after the first token [{notebook.front_end}]")
    expect(chat.prompt(0)).to_have_text("Write two parts.")
    expect(chat.area).to_have_value("")
    expect(chat.area).to_be_focused()
    expect(chat.button("Stop")).to_be_enabled()
    expect(chat.footer(0)).to_be_hidden()
    gate.set()
    chat.done(0)
    expect(chat.answer(0)).to_have_text("The first part and the second part.")
    expect(chat.answer(0).locator("strong")).to_have_text("second")
    expect(chat.footer(0)).to_contain_text("mistral-7b-instruct-v0.2 · cloudflare")
    expect(chat.footer(0)).to_contain_text(re.compile(r"2 tokens · .* · stop"))
    expect(chat.root.locator("[aria-live=polite]")).to_contain_text("The first part and the second part.")
    expect(chat.button("Send")).to_be_disabled()


@pytest.mark.parametrize("way", ["Escape", "button"])
def test_stop_keeps_the_text(notebook: Notebook, teller: Teller, way: str) -> None:
    chat = notebook.chat()
    teller.play("Once upon a time ", "drip")
    teller.gone.clear()
    chat.ask("A long story")
    expect(chat.answer(0)).to_contain_text("drip drip")
    if way == "Escape":
        chat.area.press("Escape")
    else:
        print(f"stopped {chat.root.evaluate(TIME_STOP):.0f} ms after the click [{notebook.front_end}]")
    chat.done(0)
    assert teller.gone.wait(PATIENCE), "the connection is closed"
    expect(chat.answer(0)).to_contain_text("Once upon a time drip")
    expect(chat.footer(0)).to_contain_text("cancelled")
    teller.say("Well then.")
    chat.ask_done("And now?")
    expect(chat.answer(1)).to_have_text("Well then.")
    roles = [message["role"] for message in teller.seen[-1].json["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_turns_are_regenerated_edited_deleted_and_brought_back(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat()
    teller.say_each("One.", "Two.", "Two again.", "Edited.")
    chat.ask_done("First")
    chat.ask_done("Second")
    chat.press("Answer again", turn=1)
    expect(chat.answer(1)).to_have_text("Two again.")
    expect(chat.turns).to_have_count(2)
    expect(chat.turns.nth(1).locator(".mnb-branch")).to_contain_text("2/2")
    chat.done(1)
    chat.press("Previous version", turn=1)
    expect(chat.answer(1)).to_have_text("Two.")
    chat.press("Edit and ask again", turn=0)
    editor = chat.root.get_by_label("Edit the question")
    expect(editor).to_have_value("First")
    editor.fill("First, edited")
    editor.press("Enter")
    expect(chat.answer(0)).to_have_text("Edited.")
    expect(chat.turns).to_have_count(1)
    chat.done(0)
    chat.press("Previous version", turn=0)
    expect(chat.turns).to_have_count(2)
    expect(chat.prompt(0)).to_have_text("First")
    chat.press("Delete this turn", turn=0)
    expect(chat.turns).to_have_count(1)
    chat.button("Undo").click()
    expect(chat.turns).to_have_count(2)
    chat.button("Clear the conversation").click()
    expect(chat.turns).to_have_count(0)
    expect(chat.root).to_contain_text("The conversation was cleared.")
    chat.button("Undo").click()
    expect(chat.turns).to_have_count(2)
    expect(chat.answer(1)).to_have_text("Two again.")


def test_answers_and_code_are_copied(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat()
    source = "Some **bold** text:\n\n```python\nif x < 1:\n    print('<&>')\n```\n\nThe end."
    teller.say(source)
    chat.ask_done("Code, please")
    for name, text in (("Copy the answer as Markdown", source), ("Copy code", "if x < 1:\n    print('<&>')")):
        notebook.page.evaluate("navigator.clipboard.writeText('before')")
        chat.root.evaluate(COPIED)
        chat.press(name, turn=0)
        notebook.page.wait_for_function("window.copied")
        assert notebook.page.evaluate("navigator.clipboard.readText()").rstrip("\n") == text
        expect(chat.button("Copied", turn=0)).to_have_count(0)


def test_parameters_apply_to_the_next_question(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat("temperature=0.9")
    panel = notebook.cell().locator(".widget-vbox").last
    chat.button("Settings").click()
    temperature = notebook.cell().get_by_label("temperature", exact=True)
    expect(temperature).to_have_value("0.9")
    teller.say("Warm.")
    chat.ask_done("One")
    for name, value in (("temperature", "0.25"), ("max tokens", "77"), ("seed", "5")):
        notebook.cell().get_by_label(name, exact=True).fill(value)
        notebook.cell().get_by_label(name, exact=True).press("Tab")
    teller.say("Cold.")
    expect(chat.button("Settings")).to_be_enabled()
    chat.ask_done("Two")
    first, second = (seen.json for seen in teller.seen[-2:])
    assert first["temperature"] == 0.9
    assert "seed" not in first
    assert {name: second[name] for name in ("temperature", "max_tokens", "seed")} == {
        "temperature": 0.25,
        "max_tokens": 77,
        "seed": 5,
    }
    expect(chat.footer(0)).to_contain_text("temperature 0.9")
    expect(chat.footer(1)).to_contain_text("temperature 0.25")
    recorded = notebook.value("[sorted(turn.choice.fields.items()) for turn in chat.conversation]")
    assert recorded == "[[('temperature', 0.9)], [('max_tokens', 77), ('seed', 5), ('temperature', 0.25)]]"
    temperature.fill("99")
    temperature.press("Tab")
    expect(notebook.cell().get_by_role("alert").filter(has_text="temperature")).to_be_visible()
    chat.button("Settings").click()
    expect(panel).to_be_hidden()


def test_presets_and_a_system_prompt(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat()
    chat.button("Presets").click()
    chat.root.get_by_role("menuitem", name="precise").click()
    expect(chat.button("Presets")).to_be_focused()
    chat.button("System prompt").click()
    system = chat.root.get_by_role("textbox", name="System prompt")
    system.fill("Answer in Dutch.")
    chat.button("Save").click()
    expect(system).to_be_hidden()
    teller.say("Goed.")
    chat.ask_done("How are you?")
    sent = teller.seen[-1].json
    assert sent["messages"][0] == {"role": "system", "content": "Answer in Dutch."}
    assert sent["temperature"] == 0


def test_two_answers_side_by_side(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat("compare={'model': '@cf/mistral/mistral-7b-instruct-v0.1', 'temperature': 0}")
    expect(chat.button("Compare two answers")).to_have_attribute("aria-pressed", "true")
    teller.say_each("The one answer.", "The other answer.")
    chat.ask_done("Compare")
    assert {chat.answer(0, side).inner_text() for side in (0, 1)} == {"The one answer.", "The other answer."}
    left, right = (chat.answer(0, side).bounding_box() for side in (0, 1))
    assert left
    assert right
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    expect(chat.turns.nth(0).locator(".mnb-side-who").nth(0)).to_contain_text("v0.2")
    expect(chat.turns.nth(0).locator(".mnb-side-who").nth(1)).to_contain_text("v0.1")
    assert len({seen.path for seen in teller.seen[-2:]}) == 2
    chat.button("Compare two answers").click()
    teller.say("Alone.")
    chat.ask_done("One only")
    expect(chat.turns.nth(1).locator(".mnb-side")).to_have_count(1)


def test_export(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat()
    teller.say("Run this:\n\n```python\nprint('exported')\n```")
    chat.ask_done("Some code")
    for label, suffix in (("Markdown file", ".md"), ("JSON file", ".json")):
        chat.button("Export").click()
        with notebook.page.expect_download() as download:
            chat.root.get_by_role("menuitem", name=label).click()
        assert download.value.suggested_filename == f"chat{suffix}"
        text = Path(download.value.path()).read_text()
        assert "print('exported')" in text
        if suffix == ".json":
            assert json.loads(text)
    cells = notebook.page.locator(".jp-Notebook .jp-Cell")
    before = cells.count()
    other_tab = "{'type': 'cells', 'cells': chat.conversation.to_cells(), 'ref': 1}"
    notebook.run(f"chat.widget.children[0].send({other_tab})", cell=1)
    chat.button("Export").click()
    chat.root.get_by_role("menuitem", name="New cells below").click()
    expect(notebook.cell(1)).to_contain_text("print('exported')")
    assert cells.count() > before
    expect(notebook.page.locator(".jp-MarkdownCell", has_text="Some code")).to_have_count(1)


def test_names_and_attachments(notebook: Notebook, teller: Teller) -> None:
    chat = notebook.chat()
    notebook.run("city, table = 'Utrecht', {'a': [1, 2, 3]}\n1 / 0", cell=1)
    chat.area.fill("")
    chat.area.press_sequentially("Weather in {{ci")
    expect(chat.root.get_by_role("option", name=re.compile("^city"))).to_be_visible()
    chat.area.press("Enter")
    expect(chat.area).to_have_value("Weather in {{city}}")
    chat.button(re.compile("^Attach")).click()
    field = chat.root.get_by_label("Name of what to attach")
    field.press_sequentially("tab")
    expect(chat.root.get_by_role("option")).to_have_count(1)
    field.press("Enter")
    chat.button(re.compile("^Attach")).click()
    chat.root.get_by_role("option", name=re.compile("last error")).click()
    expect(chat.root.locator(".mnb-composer .mnb-chip")).to_have_count(2)
    teller.say("Rain.")
    chat.area.press("Enter")
    expect(chat.answer(0)).to_have_text("Rain.")
    sent = teller.seen[-1].json["messages"][-1]["content"]
    for part in ("Weather in Utrecht", "{'a': [1, 2, 3]}", "ZeroDivisionError"):
        assert part in sent
    expect(chat.prompt(0)).to_have_text("Weather in {{city}}")
    expect(chat.turns.nth(0).locator(".mnb-chip")).to_have_count(2)
    asked = len(teller.seen)
    chat.ask("Who is {{nobody_at_all}}?")
    expect(chat.trouble).to_contain_text("nobody_at_all")
    expect(chat.area).to_have_value("Who is {{nobody_at_all}}?")
    assert len(teller.seen) == asked


def test_by_the_keyboard_alone(notebook: Notebook, teller: Teller) -> None:
    """No key that means something in the chat reaches the notebook, whose shortcuts cut and add cells."""
    chat = notebook.chat()
    page = notebook.page
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    chat.area.focus()
    teller.say("Keyed.")
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    page.keyboard.press("Enter")
    expect(chat.answer(0)).to_have_text("Keyed.")
    chat.done(0)
    assert teller.seen[-1].json["messages"][-1]["content"] == "line one\nline two"
    page.keyboard.press("ArrowUp")
    expect(chat.area).to_have_value("line one\nline two")
    page.keyboard.press("ArrowDown")
    expect(chat.area).to_have_value("")
    page.keyboard.press("Shift+Tab")
    expect(chat.button("Copy the answer as Markdown", turn=0)).to_be_focused()
    for key in ("a", "b", "d", "d", "x", "0", "m"):
        page.keyboard.press(key)
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells
    page.keyboard.press("ArrowRight")
    expect(chat.button("Answer again", turn=0)).to_be_focused()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    editor = chat.root.get_by_label("Edit the question")
    expect(editor).to_be_focused()
    page.keyboard.press("Escape")
    expect(editor).to_have_count(0)
    expect(chat.button("Edit and ask again", turn=0)).to_be_focused()
    chat.button("Export").focus()
    page.keyboard.press("Enter")
    expect(chat.root.get_by_role("menuitem", name="Markdown file")).to_be_focused()
    page.keyboard.press("ArrowDown")
    expect(chat.root.get_by_role("menuitem", name="JSON file")).to_be_focused()
    page.keyboard.press("Escape")
    expect(chat.button("Export")).to_be_focused()
    seen = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.getAttribute('aria-label')"))
    assert {"Settings", "Conversation", "Edit and ask again", "Your question", "Compare two answers"} <= seen


ENDINGS: dict[str, tuple[list[Any], str]] = {
    "cut": (["The first half"], "broke the answer off before its end"),
    "reset": (["The first half", "reset"], "Connection reset by peer"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_error_keeps_the_text_and_offers_another_try(notebook: Notebook, teller: Teller, ending: str) -> None:
    chat = notebook.chat()
    steps, message = ENDINGS[ending]
    teller.play(*steps)
    chat.ask_done("Halves")
    expect(chat.answer(0)).to_have_text("The first half")
    expect(chat.turns.nth(0).locator(".mnb-error")).to_contain_text(message)
    assert "s3cret" not in chat.root.inner_text()
    teller.say("The whole.")
    chat.button("Retry").click()
    expect(chat.answer(0)).to_have_text("The whole.")
    chat.done(0)
    expect(chat.turns).to_have_count(1)
    expect(chat.turns.nth(0).locator(".mnb-error")).to_be_hidden()


def test_two_chats_in_one_notebook(notebook: Notebook, teller: Teller) -> None:
    first = notebook.chat()
    notebook.run("other = mistral_nb.Chat(temperature=0)\nother", cell=1)
    second = notebook.shown(cell=1)
    gate = threading.Event()
    teller.say("The slow ", gate, "one.")
    first.ask("Slow")
    expect(first.answer(0)).to_contain_text("The slow")
    teller.say("The quick one.")
    second.ask_done("Quick")
    expect(second.answer(0)).to_have_text("The quick one.")
    expect(first.button("Stop")).to_be_enabled()
    gate.set()
    first.done(0)
    expect(first.answer(0)).to_have_text("The slow one.")
    expect(first.turns).to_have_count(1)
    expect(second.turns).to_have_count(1)
