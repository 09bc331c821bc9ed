"""A real JupyterLab server and a real Chromium page on it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page, ViewportSize, expect, sync_playwright

from tests.browser.chat_page import Notebook, Teller

SIZE: ViewportSize = {"width": 1280, "height": 900}
CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Lab:
    """A JupyterLab server on a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)
        runtime = folder / ".runtime"
        news = folder / ".settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        news.parent.mkdir(parents=True)
        news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        self._log = (folder / "server.log").open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port=0"),
                *(f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={self.token}"),
            ],
            env={
                **os.environ,
                "JUPYTER_RUNTIME_DIR": str(runtime),
                "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
            },
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        try:
            self.url = self._wait(runtime)
        except BaseException:
            self.close()
            raise

    def _wait(self, runtime: Path, seconds: float = 180) -> str:
        """The server's address, from the file that it writes once it listens."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self._process.poll() is None:
            for path in runtime.glob("jpserver-*.json"):
                # The file is there before what it says is.
                with suppress(json.JSONDecodeError):
                    return str(json.loads(path.read_text())["url"])
            time.sleep(0.1)
        raise RuntimeError(f"JupyterLab did not start:\n{(self.folder / 'server.log').read_text()}")

    def address(self, notebook: str, front_end: str = "lab") -> str:
        """Of a notebook in JupyterLab, or with "notebook" in Notebook 7, which the same server has."""
        place = {"lab": "lab/tree", "notebook": "notebooks"}[front_end]
        return f"{self.url}{place}/{notebook}?token={self.token}&reset"

    def open(self, page: Page, notebook: str, cells: Sequence[str]) -> list[Locator]:
        """Open a new notebook with `cells` in `page`, its kernel idle; returns the cells."""
        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        )
        nbformat.write(book, self.folder / notebook)
        page.goto(self.address(notebook))
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
        return [page.locator(".jp-Notebook .jp-CodeCell").nth(index) for index in range(len(cells))]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@pytest.fixture(scope="session")
def lab(own_settings: None, chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    server = Lab(tmp_path_factory.mktemp("lab"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """Not for longer than a module: as long as it is there, asyncio cannot be used beside it."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page with cookies and storage of its own."""
    page = browser.new_page(viewport=SIZE)
    page.set_default_timeout(180_000)
    yield page
    page.close()


@pytest.fixture(scope="module")
def teller() -> Iterator[Teller]:
    """The account that the kernels of this module's notebooks ask."""
    expect.set_options(timeout=180_000)
    teller = Teller()
    yield teller
    teller.close()


@pytest.fixture(scope="module", params=["lab", "notebook"])
def notebook(request: pytest.FixtureRequest, lab: Lab, browser: Browser, teller: Teller) -> Iterator[Notebook]:
    """One notebook for all tests of a module, in JupyterLab and then in Notebook 7."""
    with opened(
        lab, browser, request.param, f"{request.module.__name__.rpartition('.')[2]}-{request.param}", teller
    ) as it:
        yield it


@contextmanager
def opened(lab: Lab, browser: Browser, front_end: str, name: str, teller: Teller) -> Iterator[Notebook]:
    context = browser.new_context(viewport=SIZE, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(180_000)
    yield Notebook(lab, page, front_end, f"{name}.ipynb", teller)
    context.close()


@pytest.fixture
def shoot(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Page | Locator, str], Path]:
    """Keeps a picture by its name in $TEST_SCREENSHOTS, or in a folder that pytest keeps for the last three runs."""
    wanted = os.environ.get("TEST_SCREENSHOTS")
    folder = Path(wanted) if wanted else tmp_path_factory.getbasetemp() / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(what: Page | Locator, name: str) -> Path:
        path = folder / f"{name}.png"
        what.screenshot(path=path)
        return path

    return shoot
