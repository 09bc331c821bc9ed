"""%mistral pull in a real JupyterLab: one bar that moves, in a font of one width, and gone when the model is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Lab
from tests.browser.test_cell import execute, output, wait_done
from tests.models.hub_server import Fault, HubServer, Repo, use_hub
from tests.models.tiny_repos import sharded

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

MONOSPACED_BAR = """() => [...document.querySelectorAll(".jp-OutputArea-output pre")].some(
    bar => bar.textContent.includes("B/s") && /mono/i.test(getComputedStyle(bar).fontFamily)
)"""
"""Found and looked at in one go: each report puts a new element in the place of the last, which then has no style."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    with HubServer({"org/tiny": Repo(sharded())}) as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "hf_home")
        yield hub


@pytest.fixture
def own_lab(hub: HubServer, tmp_path: Path, chromium: str) -> Iterator[Lab]:
    """A server whose kernels know the hub and the store."""
    (tmp_path / "lab").mkdir()
    server = Lab(tmp_path / "lab")
    yield server
    server.close()


def test_the_bar_is_shown_and_goes(own_lab: Lab, hub: HubServer, page: Page) -> None:
    fault = hub.fail("model-00002-of-00003.safetensors", Fault("stalled", at=500_000))
    load, pull = own_lab.open(page, "pull.ipynb", ["%load_ext mistral_nb", "%mistral pull org/tiny"])
    execute(page, load)
    wait_done(load, 1)
    execute(page, pull)
    bar = output(pull).locator("pre", has_text="B/s")
    shown = re.compile(r"  \d+%  █{5,}░{5,}  [\d.]+ of [\d.]+ MB  [\d.]+ .?B/s")
    expect(bar).to_have_text(shown, timeout=180_000)
    page.wait_for_function(MONOSPACED_BAR)
    assert output(pull).count() == 1
    fault.over.set()
    wait_done(pull, 2)
    text = " ".join(output(pull).all_inner_texts())
    assert "org--tiny is in " in text
    assert "█" not in text
