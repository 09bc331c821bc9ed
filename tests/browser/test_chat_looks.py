"""How a chat looks: light and dark, narrow, right to left, and to those who cannot see it. Pictures of it are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.backends.scripted import frame, head
from tests.browser.chat_page import DONE, framed
from tests.browser.conftest import SIZE, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

    from tests.browser.chat_page import ChatPage, Notebook, Teller
    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser

Shoot = Callable[["Page | Locator", str], Path]

ANSWER = """The *harmonic* numbers grow like $\\ln n$:

$$H_n = \\sum_{k=1}^{n} \\frac{1}{k}$$

```python
def harmonic(n: int) -> float:
    \"\"\"The sum of 1/k for k = 1..n.\"\"\"
    return sum(1 / k for k in range(1, n + 1))
```

| n | H |
|--:|--:|
| 10 | 2.929 |
| 100 | 5.187 |

1. See `math.log`.
2. See [the series](https://example.org/harmonic).

> It diverges, slowly.
"""
ARABIC = "مرحبا بالعالم، هذا نص.\n\n- واحد\n- اثنان\n\n```python\nprint('left to right')\n```\n\nAnd English."


COMPARED = (
    "A generator is a function whose `yield` hands out one value at a time:\n\n"
    "```python\ndef squares(n: int):\n    for i in range(n):\n        yield i * i\n```\n",
    "It is an iterator that is written like a function and keeps its place between values.\n\n"
    "```python\nlines = (line for line in open(name))\nfirst = next(lines)\n```\n",
)


def usage(tokens: int) -> bytes:
    return frame({"response": "", "usage": {"prompt_tokens": 21, "completion_tokens": tokens}})


def slowly(text: str) -> Iterator[Any]:
    """Pieces of a text as steps, 10 ms apart."""
    for start in range(0, len(text), 16):
        yield framed(text[start : start + 16])
        yield lambda: threading.Event().wait(0.01)


@pytest.fixture(scope="module")
def own(lab: Lab, browser: Browser, teller: Teller) -> Iterator[Notebook]:
    with opened(lab, browser, "lab", "looks", teller) as notebook:
        yield notebook


@pytest.fixture(params=["Light", "Dark"])
def theme(request: pytest.FixtureRequest, own: Notebook) -> Iterator[str]:
    use_theme(own.page, request.param)
    yield request.param
    use_theme(own.page, "Light")


def use_theme(page: Page, name: str) -> None:
    """With the menu, as a user does."""
    if page.locator(f"body[data-jp-theme-name='JupyterLab {name}']").count():
        return
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.locator(".lm-Menu-item", has_text="Theme").first.hover()
    page.locator(".lm-Menu-item", has_text=f"JupyterLab {name}").filter(has_not_text="High Contrast").first.click()
    page.locator(f"body[data-jp-theme-name='JupyterLab {name}']").wait_for(state="attached")


def violations(page: Page, where: str) -> list[Any]:
    """What axe-core finds serious or critical in the cell's output."""
    found = Axe().run(page, context=where).response["violations"]
    return [
        (each["id"], node["target"], node["failureSummary"])
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def brightness(chat: ChatPage, selector: str, style: str) -> float:
    colour = chat.root.evaluate(f"root => getComputedStyle(root.querySelector('{selector}') || root).{style}")
    red, green, blue = (float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (red + green + blue) / 3


def test_everything_can_be_seen_and_named_in_both_themes(
    own: Notebook, teller: Teller, theme: str, shoot: Shoot
) -> None:
    chat = own.chat("temperature=0.3")
    teller.play(*slowly(ANSWER), usage(96), DONE)
    chat.ask_done("How fast do the harmonic numbers grow?")
    own.page.mouse.move(0, 0)
    shoot(own.cell(), f"chat-{theme.lower()}")
    light = theme == "Light"
    assert (brightness(chat, ".mnb-transcript", "color") < 128) is light
    assert (brightness(chat, ".mnb-code code", "color") < 128) is light
    assert (brightness(chat, "none", "backgroundColor") > 128) is light
    assert violations(own.page, ".jp-OutputArea") == []

    chat = own.chat("compare={'model': '@cf/mistral/mistral-7b-instruct-v0.1'}, temperature=0.3")
    assert violations(own.page, ".jp-OutputArea") == []
    shoot(own.page, f"empty-{theme.lower()}")
    teller.scripts = [[]] * teller.connections
    teller.scripts += [[head(), *slowly(text), usage(len(text) // 4), DONE] for text in COMPARED]
    chat.ask_done("What is a generator in Python? One sentence and a short example.")
    own.page.mouse.move(0, 0)
    shoot(own.cell(), f"chat-compare-{theme.lower()}")
    chat.button("Compare two answers").click()
    teller.play("The first half")
    chat.ask_done("An answer that breaks off")
    shoot(own.page, f"error-{theme.lower()}")
    assert violations(own.page, ".jp-OutputArea") == []
    chat.button("Export").click()
    chat.root.get_by_role("menuitem", name="Markdown file").wait_for()
    shoot(own.page, f"menu-{theme.lower()}")
    assert violations(own.page, ".mnb-chat") == []
    own.page.keyboard.press("Escape")
    gate = threading.Event()
    teller.say("It is being ", gate, "written.")
    chat.ask("Slowly, please")
    expect(chat.answer(2)).to_contain_text("It is being")
    shoot(own.page, f"writing-{theme.lower()}")
    assert violations(own.page, ".mnb-chat") == []
    gate.set()
    chat.done(2)
    chat.button("System prompt").click()
    chat.button("Settings").click()
    own.cell().get_by_label("temperature", exact=True).wait_for()
    expect(chat.footer(2)).to_be_in_viewport(ratio=1)
    own.page.set_viewport_size({"width": 1280, "height": 1600})
    shoot(own.page, f"settings-{theme.lower()}")
    assert violations(own.page, ".jp-OutputArea") == []
    own.page.set_viewport_size(SIZE)
    assert own.errors == []


def test_right_to_left(own: Notebook, teller: Teller, shoot: Shoot) -> None:
    chat = own.chat()
    teller.say(ARABIC)
    chat.ask_done("قل مرحبا")
    shoot(own.page, "right-to-left")
    direction = "node => getComputedStyle(node).direction"
    assert chat.prompt(0).evaluate(direction) == "rtl"
    assert chat.answer(0).get_by_text("مرحبا").evaluate(direction) == "rtl"
    assert chat.answer(0).locator("li").first.evaluate(direction) == "rtl"
    assert chat.answer(0).get_by_text("And English.").evaluate(direction) == "ltr"
    assert chat.answer(0).locator("pre").evaluate(direction) == "ltr"
    chat.area.fill("مرحبا")
    assert chat.area.evaluate(direction) == "rtl"


def test_a_narrow_column(own: Notebook, teller: Teller, shoot: Shoot) -> None:
    own.page.set_viewport_size({"width": 700, "height": 900})
    chat = own.chat("compare={'model': '@cf/mistral/mistral-7b-instruct-v0.1'}")
    chat.root.evaluate("node => node.parentElement.style.width = '300px'")
    teller.say(ANSWER + "\n\n" + "wide" * 100 + "\n\n|" + "column|" * 30 + "\n|" + "-|" * 30 + "\n")
    chat.ask_done("Narrow?")
    shoot(own.page, "narrow")
    assert chat.log.evaluate("log => log.scrollWidth - log.clientWidth") == 0
    outer = chat.root.bounding_box()
    assert outer
    assert outer["width"] <= 300
    for button in (*chat.root.locator(".mnb-bar button").all(), chat.button("Send")):
        box = button.bounding_box()
        assert box
        assert outer["x"] <= box["x"]
        assert box["x"] + box["width"] <= outer["x"] + outer["width"]
    left, right = (chat.answer(0, side).bounding_box() for side in (0, 1))
    assert left
    assert right
    assert left["y"] + left["height"] <= right["y"], "what is compared stands below one another"
    chat.button("Export").click()
    menu = chat.root.get_by_role("menu", name="Export").bounding_box()
    assert menu
    assert outer["x"] <= menu["x"]
    assert menu["x"] + menu["width"] <= outer["x"] + outer["width"]
    own.page.keyboard.press("Escape")
    assert violations(own.page, ".mnb-chat") == []
    own.page.set_viewport_size(SIZE)
