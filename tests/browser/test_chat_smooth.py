"""Two hundred messages and an answer of 50,000 characters in a real JupyterLab: what was said before is left alone.

How smooth typing and scrolling are is printed: that depends on the machine.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.chat_page import Notebook, Teller
    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser

LONG = 50_000
ANSWER = """Some **prose** with `code` and a [link](https://example.org).

- one
- two

```python
for i in range(3):
    print(i)
```
"""
TURNS = f"""from mistral_nb.chat import Choice, Conversation, Turn
conversation = Conversation()
for number in range(100):
    parent = str(number - 1) if number else None
    turn = Turn(str(number), parent, f"Question {{number}}", Choice(), answer={ANSWER!r}, finish_reason="stop")
    conversation.add(turn)"""
# Milliseconds between frames, and from a key to the frame that shows it, until `measured` is called.
MEASURE = """() => {
    const frames = [], keys = [];
    let last = performance.now(), on = true;
    const frame = now => { frames.push(now - last); last = now; if (on) requestAnimationFrame(frame); };
    requestAnimationFrame(frame);
    const key = event => requestAnimationFrame(() => setTimeout(() => keys.push(performance.now() - event.timeStamp)));
    addEventListener("keydown", key, true);
    window.measured = () => { on = false; removeEventListener("keydown", key, true); return [frames.slice(2), keys]; };
}"""
# How often anything was made anew in a turn that was there when this began, and in others.
WATCH = """log => {
    const old = [...log.querySelectorAll(".mnb-turn")];
    window.touched = [0, 0];
    const count = records => {
        for (const { target } of records) window.touched[old.some(turn => turn.contains(target)) ? 0 : 1] += 1;
    };
    new MutationObserver(count).observe(log, { subtree: true, childList: true, characterData: true });
}"""
SCROLL = """async log => {
    for (let i = 0; i < 60; i += 1) {
        log.scrollTop += i < 30 ? -400 : 400;
        await new Promise(requestAnimationFrame);
    }
}"""


@pytest.fixture
def own(lab: Lab, browser: Browser, teller: Teller) -> Iterator[Notebook]:
    with opened(lab, browser, "lab", "smooth", teller) as notebook:
        yield notebook


def told(what: str, values: Sequence[float]) -> None:
    """Print a median, a 95th percentile and the worst of some milliseconds."""
    p95 = statistics.quantiles(values, n=20)[-1]
    print(f"{what}: median {statistics.median(values):.0f}, p95 {p95:.0f}, worst {max(values):.0f} ms of {len(values)}")


def prose(size: int) -> str:
    paragraph = "The *lighthouse* keeper wrote `a line` of **code** that evening, and the sea was calm. " * 4 + "\n\n"
    return (paragraph * (size // len(paragraph) + 1))[:size]


def test_a_long_chat_is_not_made_anew_for_what_is_added(own: Notebook, teller: Teller) -> None:
    own.run(TURNS)
    chat = own.chat("conversation")
    expect(chat.turns).to_have_count(100)
    text = prose(LONG)
    pieces = [text[start : start + 500] for start in range(0, LONG, 500)]

    chat.log.evaluate(WATCH)
    own.page.evaluate(MEASURE)
    pause = threading.Event()
    steps = [step for piece in pieces for step in (piece, lambda: pause.wait(0.04))]
    teller.say(*steps)
    chat.ask("A long answer, please")
    expect(chat.answer(100)).to_contain_text("lighthouse")
    chat.area.press_sequentially("typed while the answer streams", delay=60)
    chat.done(100)
    frames, keys = own.page.evaluate("measured()")
    told("frames while 50,000 characters stream and a question is typed", frames)
    told("key to its frame while it streams", keys)

    chat.area.fill("")
    own.page.evaluate(MEASURE)
    chat.area.press_sequentially("typed in a chat of 200 messages", delay=40)
    frames, keys = own.page.evaluate("measured()")
    told("frames while typing", frames)
    told("key to its frame", keys)

    own.page.evaluate(MEASURE)
    chat.log.evaluate(SCROLL)
    told("frames while scrolling", own.page.evaluate("measured()")[0])

    own.page.evaluate(MEASURE)
    teller.say("Short.")
    chat.area.fill("One more")
    chat.area.press("Enter")
    chat.done(101)
    own.wait_for_transcript("Short.")
    told("frames while a short answer ends", own.page.evaluate("measured()")[0])
    before, after = own.page.evaluate("touched")
    print(f"{before} changes in the hundred turns of before, {after} in the two that were added")
    assert before < 20 < after
