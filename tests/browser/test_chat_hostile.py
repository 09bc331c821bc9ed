"""Hostile answers streamed into a chat in a real JupyterLab: nothing of them acts, and the page keeps its shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import opened
from tests.hostile import HOSTILE, LINKS, MARKUP

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.chat_page import ChatPage, Notebook, Teller
    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser

PIECES = 6
NAMES = [name for name, text in HOSTILE.items() if text.strip()]
ASK_ALL = """from mistral_nb.errors import MistralError
for name in {names!r}:
    try:
        chat.ask(name)
    except MistralError as error:
        print(name, error)"""
SHAPE = """() => {
    const chat = document.querySelector(".mnb-chat").getBoundingClientRect();
    const log = document.querySelector(".mnb-transcript");
    const root = document.documentElement;
    return {
        page: [root.scrollWidth - root.clientWidth, root.scrollHeight - root.clientHeight],
        chat: [chat.left, chat.right],
        sideways: log.scrollWidth - log.clientWidth,
    };
}"""
# Of each turn, what has left its place: the turn itself, or something in it that no box around it clips.
OUT_OF_PLACE = """() => {
    const log = document.querySelector(".mnb-transcript").getBoundingClientRect();
    const found = [];
    let bottom = -Infinity;
    for (const turn of document.querySelectorAll(".mnb-turn")) {
        const box = turn.getBoundingClientRect();
        const name = turn.querySelector(".mnb-prompt").textContent;
        if (box.top < bottom - 1) found.push([name, "over the turn before"]);
        if (box.left < log.left - 1 || box.right > log.right + 1) found.push([name, "wider than the chat"]);
        const {direction} = getComputedStyle(turn.querySelector(".mnb-prompt"));
        if (direction !== "ltr") found.push([name, "turned around"]);
        for (const node of turn.querySelectorAll(".mnb-answer *")) {
            const {position} = getComputedStyle(node);
            if (position === "fixed" || position === "sticky") found.push([name, position]);
        }
        bottom = box.bottom;
    }
    return found;
}"""
ACTIVE = """() => [...document.querySelectorAll(".mnb-answer *")].filter(node =>
    /^(script|style|link|meta|base|iframe|object|embed|form|input|img|svg|video|audio|template|maction)$/.test(node.localName)
        && !node.closest("button")
    || [...node.attributes].some(({name, value}) => /^on/.test(name) || name === "id"
        || /href|src/.test(name) && !/^(https?|mailto|ftp):/i.test(value))
).map(node => node.outerHTML.slice(0, 200))"""
RAW = "markup => document.querySelector('.mnb-answer').insertAdjacentHTML('beforeend', markup)"


def pieces(text: str) -> list[str]:
    size = -(-len(text) // PIECES)
    return [text[start : start + size] for start in range(0, len(text), size)]


@pytest.fixture
def own(request: pytest.FixtureRequest, lab: Lab, browser: Browser, teller: Teller) -> Iterator[Notebook]:
    with opened(lab, browser, "lab", request.function.__name__, teller) as notebook:
        yield notebook


def watch(notebook: Notebook) -> list[str]:
    """What happens on the page from now on that no answer may cause."""
    happened: list[str] = []
    page = notebook.page

    def ask_where(request: Any) -> None:
        if not request.url.startswith((notebook.lab.url, "blob:", "data:")):
            happened.append(f"request to {request.url}")

    page.on("request", ask_where)
    page.on("dialog", lambda dialog: (happened.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("popup", lambda popup: happened.append(f"window {popup.url}"))
    page.on("framenavigated", lambda frame: happened.append(f"navigation to {frame.url}"))
    page.on("download", lambda download: happened.append(f"download of {download.url}"))
    page.evaluate("window.hit = undefined")
    return happened


def check(notebook: Notebook, chat: ChatPage, happened: list[str], shape: Any) -> None:
    assert happened == []
    assert notebook.errors == []
    assert notebook.page.evaluate("window.hit === undefined && parent.hit === undefined")
    assert notebook.page.evaluate(ACTIVE) == []
    assert notebook.page.evaluate(OUT_OF_PLACE) == []
    assert notebook.page.evaluate(SHAPE) == shape
    expect(chat.root).to_be_visible()


def test_nothing_that_a_model_writes_acts_or_breaks_the_page(own: Notebook, teller: Teller) -> None:
    """In a layout of the user's own, where no transcript stands below the chat."""
    assert len(NAMES) >= 40
    own.run("chat = mistral_nb.Chat()\nchat.widget")
    chat = own.shown()
    happened, shape = watch(own), own.page.evaluate(SHAPE)
    teller.say_each(*(pieces(HOSTILE[name]) for name in NAMES))
    cell = own.run(ASK_ALL.format(names=NAMES), cell=1, within=180)
    expect(cell.locator(".jp-OutputArea-output")).to_have_count(0)
    expect(chat.turns).to_have_count(len(NAMES))
    chat.done(len(NAMES) - 1)
    check(own, chat, happened, shape)
    teller.say("All is well.")
    chat.ask_done("After all that")
    last = chat.answer(len(NAMES))
    expect(last).to_have_text("All is well.")
    expect(last).to_be_in_viewport()
    check(own, chat, happened, shape)
    own.page.evaluate(RAW, "<img src=http://127.0.0.1:9/x onerror='window.hit = 1'>")
    own.page.wait_for_function("window.hit === 1")
    assert own.page.evaluate(ACTIVE) != []
    assert happened != [], "what acts is seen"


def test_what_is_saved_of_it_does_not_act_either(own: Notebook, teller: Teller) -> None:
    """The transcript, which JupyterLab renders itself once the kernel is gone."""
    names = [*MARKUP, *LINKS]
    own.chat()
    teller.say_each(*(pieces(HOSTILE[name]) for name in names))
    own.run("%%capture\n" + ASK_ALL.format(names=names), cell=1, within=180)
    own.wait_for_transcript(names[-1])
    own.save()
    own.end_kernel()
    happened = watch(own)
    own.go()
    transcript = own.cell().locator(".jp-OutputArea-child").nth(1)
    expect(transcript).to_contain_text(names[-1])
    assert [each for each in happened if not each.startswith(f"navigation to {own.lab.url}")] == []
    assert own.page.evaluate("window.hit === undefined")
    assert transcript.locator("img, script, iframe, svg, form, a[href^=javascript]").count() == 0
    assert own.errors == []
