"""The playground in a real browser: logging in, an answer that grows, stopping it, and text that stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mistral_nb import models
from mistral_nb.finetunes import AdapterStore
from tests.finetunes.adapters import write_random
from tests.server.engines import STAND_IN, Engines, EngineUnderTest, eventually

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = pytest.mark.browser

WATCH = """() => {
    window.lengths = [];
    const answer = document.getElementById("answer");
    new MutationObserver(() => window.lengths.push(answer.textContent.length))
        .observe(answer, {subtree: true, childList: true, characterData: true});
}"""
HOSTILE = """<img src=x onerror="window.hit = 1"><script>window.hit = 2</script>\n<a href="javascript:0">x</a>"""


@pytest.fixture(scope="module")
def engine(embedded: Path, chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    folder = tmp_path_factory.mktemp("playground-engine")
    engines = Engines(folder)
    (folder / "home").mkdir()
    (folder / "home" / "models").symlink_to(models.store_path(), target_is_directory=True)
    engines.env["MISTRAL_NB_HOME"] = str(folder / "home")
    try:
        engine = engines.start("--serve-as", STAND_IN)
        engine.ready()
        yield engine
    finally:
        engines.end()


@pytest.fixture
def complaints(page: Page) -> list[str]:
    """What the page's console says; a refused policy is told there."""
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    return said


def log_in(page: Page, engine: EngineUnderTest) -> None:
    page.goto(engine.record.base_url)
    page.get_by_label("The server's token").fill(engine.record.token)
    page.get_by_role("button", name="Log in").click()
    page.get_by_label("Prompt").wait_for()


def test_an_event_source_streams_a_full_answer(engine: EngineUnderTest, page: Page, complaints: list[str]) -> None:
    """After the link that the terminal shows, which works once; logging in with a wrong token says so."""
    eventually(lambda: len(engine.printed) == 6, "the terminal shows the link")
    link = next(word for word in engine.printed[4].split() if word.startswith(engine.record.base_url))
    page.goto(link)
    page.get_by_label("Prompt").wait_for()
    assert page.url == f"{engine.record.base_url}/"
    assert not page.evaluate("document.cookie"), "no script reads the session"
    assert page.locator("#model").inner_text() == "smollm2-135m-instruct"
    page.evaluate(WATCH)
    page.get_by_label("Prompt").fill("Write a story about a lighthouse keeper.")
    page.get_by_label("Most tokens").fill("60")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Prompt").press("Control+Enter")
    page.get_by_text(re.compile("tokens in, 60 out, ended by length")).wait_for()
    lengths = page.evaluate("window.lengths")
    assert len([length for length in lengths if length]) > 10
    assert lengths == sorted(lengths)
    body = {"prompt": "Write a story about a lighthouse keeper.", "max_tokens": 60, "temperature": 0}
    assert page.locator("#answer").text_content() == engine.post(body, model=STAND_IN).json()["result"]["response"]
    assert page.get_by_role("button", name="Send").is_enabled()
    assert complaints == []

    page.context.clear_cookies()
    page.goto(link)
    page.get_by_label("The server's token").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("alert").filter(has_text="That is not this server's token").wait_for()
    assert not page.get_by_label("Prompt").is_visible()


def test_stop_ends_the_generation(engine: EngineUnderTest, page: Page, complaints: list[str]) -> None:
    """The text so far stays; the next prompt is answered. So are errors told, and an ended session."""
    log_in(page, engine)
    complaints.clear()  # Chromium notes the 401 that led to the form
    page.get_by_label("Prompt").fill("Write a very long story about a lighthouse keeper.")
    page.get_by_label("Most tokens").fill("4000")
    page.get_by_role("button", name="Send").click()
    eventually(lambda: len(page.locator("#answer").inner_text()) > 40, "the answer grows")
    cancelled = engine.client.get("/health").json()["cancelled"]
    page.get_by_role("button", name="Stop").click()
    eventually(lambda: engine.client.get("/health").json()["cancelled"] == cancelled + 1, "the engine is free")
    assert len(page.locator("#answer").inner_text()) > 40
    page.get_by_label("Prompt").fill("word " * 9000)
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").filter(has_text="(code 5021)").wait_for()
    assert complaints == []
    page.context.clear_cookies()
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").filter(has_text="The session has ended").wait_for()
    assert page.get_by_label("The server's token").is_visible()


def test_an_adapter_is_named_and_weighed(
    engine: EngineUnderTest, page: Page, complaints: list[str], tmp_path: Path
) -> None:
    store = AdapterStore(Path(engine.record.log).parent.parent / "home" / "adapters")
    store.add(write_random(tmp_path / "tone", 1), "tone", "embedded")
    log_in(page, engine)
    complaints.clear()
    page.get_by_label("Prompt").fill("Name three colours.")
    page.get_by_label("Most tokens").fill("12")
    page.get_by_label("Temperature").fill("0")
    said = []
    for lora, scale, footer in (
        ("", "1", "ended by length"),
        ("tone", "1", "adapter tone at 1"),
        ("tone", "0", "tone at 0"),
    ):
        page.get_by_label("Adapter").fill(lora)
        page.get_by_label("Scale").fill(scale)
        page.get_by_role("button", name="Send").click()
        page.get_by_text(re.compile(f"{footer}$")).wait_for()
        said.append(page.locator("#answer").text_content())
    assert said[0] == said[2] != said[1]
    assert page.locator("#adapters option").evaluate_all("options => options.map(one => one.value)") == ["tone"]
    page.get_by_label("Adapter").fill("tune")
    page.get_by_role("button", name="Send").click()
    page.get_by_role("alert").filter(has_text="(code 3037)").wait_for()
    assert complaints == []


def test_what_a_model_writes_stays_text_in_light_and_dark(engine: EngineUnderTest, page: Page) -> None:
    def answer(route: Route) -> None:
        frame = json.dumps({"response": HOSTILE})
        route.fulfill(content_type="text/event-stream", body=f"data: {frame}\n\ndata: [DONE]\n\n")

    log_in(page, engine)
    page.route("**/playground/stream?*", answer)
    page.get_by_label("Prompt").fill("Hello")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("window.hit = 1").wait_for()
    assert page.locator("#answer").text_content() == HOSTILE
    assert page.locator("#answer *").count() == 0
    assert page.evaluate("window.hit") is None
    shades = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shades.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert shades == ["rgb(251, 250, 248)", "rgb(23, 23, 26)"]
