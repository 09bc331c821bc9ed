"""The chat's panel against a real local engine: an adapter picked, weighed and changed within a conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from mistral_nb import models
from mistral_nb.finetunes import AdapterStore
from tests.browser.conftest import opened
from tests.finetunes.adapters import write_random

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.browser.chat_page import ChatPage, Notebook
    from tests.browser.conftest import Lab

pytestmark = pytest.mark.browser

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def home(embedded: Path, tmp_path: Path) -> Path:
    """A store with the embedded model and two adapters of it."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(models.store_path(), target_is_directory=True)
    for name, seed in (("tone-a", 1), ("tone-b", 2)):
        folder = write_random(tmp_path / name, seed, MODULES, size=0.12)
        AdapterStore(home / "adapters").add(folder, name, "embedded")
    return home


@pytest.fixture
def own(home: Path, lab: Lab, browser: Browser) -> Iterator[Notebook]:
    with opened(lab, browser, "lab", "adapters", None) as notebook:
        folders = {name: str(home / name) for name in ("run", "log")}
        notebook.run(
            "import os, mistral_nb\n"
            f"os.environ.update(MISTRAL_NB_HOME={str(home)!r}, MISTRAL_NB_RUNTIME_DIR={folders['run']!r}, "
            f"MISTRAL_NB_LOG_DIR={folders['log']!r})"
        )
        yield notebook
        notebook.run("%load_ext mistral_nb\n%mistral stop --force", cell=1)


def said_at(chat: ChatPage, turn: int) -> str:
    chat.done(turn)
    return chat.answer(turn).inner_text()


def test_an_adapter_is_picked_weighed_and_changed_between_two_answers(own: Notebook) -> None:
    chat = own.chat("backend='local', model='embedded', temperature=0, max_tokens=12")
    expect.set_options(timeout=180_000)
    chat.ask_done("Name a colour.")
    expect(chat.footer(0)).not_to_contain_text("adapter")
    chat.button("Settings").click()
    adapter = own.cell().get_by_label("adapter", exact=True).first
    scale = own.cell().get_by_role("slider", name="scale").first
    expect(own.cell().get_by_role("slider", name="scale", disabled=True)).to_have_count(2)
    own.page.wait_for_function(
        "input => ['tone-a', 'tone-b'].every(name => [...input.list.options].some(option => option.value === name))",
        arg=adapter.element_handle(),
    )

    adapter.fill("tone-a")
    adapter.press("Tab")
    expect(own.cell().get_by_role("slider", name="scale", disabled=True)).to_have_count(1)
    chat.ask_done("Tell me a story about a ship.")
    said = {"tone-a": said_at(chat, 1)}
    expect(chat.footer(1)).to_contain_text("adapter tone-a ·")

    for keys, footer in ((["Home"], "tone-a at 0"), (["End"], "tone-a at 2")):
        for key in keys:
            scale.press(key)
        expect(own.cell().locator(".mnb-scale output").first).to_have_text(re.compile(rf"{footer[-1]}\.00"))
        chat.press("Answer again", turn=1)
        expect(chat.footer(1)).to_contain_text(f"adapter {footer} ·")
        said[footer] = said_at(chat, 1)

    adapter.fill("tone-b")
    adapter.press("Tab")
    chat.press("Answer again", turn=1)
    expect(chat.footer(1)).to_contain_text("adapter tone-b at 2 ·")
    said["tone-b at 2"] = said_at(chat, 1)
    adapter.fill("")
    adapter.press("Tab")
    chat.press("Answer again", turn=1)
    expect(chat.footer(1)).not_to_contain_text("adapter")
    assert said_at(chat, 1) == said["tone-a at 0"], "a scale of 0 is the model without it"
    assert len(set(said.values())) == 4
    assert own.errors == []
