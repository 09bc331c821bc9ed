"""A shell with the magics, a peer that plays scripts, a hub with a tiny model, and real kernels that ask them."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from tests.backends.scripted import Peer, environment_of
from tests.chat.conftest import make, session  # noqa: F401  fixtures of a chat that asks `peer`
from tests.magics.kernels import Kernel
from tests.models.hub_server import HubServer, Repo, use_hub
from tests.models.tiny_repos import sharded


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def cloud(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """The peer as the account that `auto` selects, in this process and in those that it starts."""
    for name, value in environment_of(peer.url).items():
        monkeypatch.setenv(name, value)
    return peer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with the tiny model org/tiny, for pulls into a store of the test's own. Ask for it before `kernel`."""
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    with HubServer({"org/tiny": Repo(sharded())}) as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "hf_home")
        yield hub


@pytest.fixture(scope="module")
def bare_shell() -> Iterator[InteractiveShell]:
    shell = InteractiveShell.instance()
    yield shell
    atexit.unregister(shell.atexit_operations)
    shell.history_manager.end_session()
    shell.history_manager.db.close()
    InteractiveShell.clear_instance()


@pytest.fixture
def shell(bare_shell: InteractiveShell) -> Iterator[InteractiveShell]:
    """An IPython of this process with the extension loaded and no variables."""
    bare_shell.reset(new_session=False)
    bare_shell.config.pop("Mistral", None)
    bare_shell.run_line_magic("load_ext", "mistral_nb")
    yield bare_shell
    bare_shell.run_line_magic("unload_ext", "mistral_nb")


@pytest.fixture
def kernel(own_settings: None) -> Iterator[Kernel]:
    """A real kernel with the extension loaded. Ask for `cloud` before it to let it ask the peer."""
    with closing(Kernel()) as kernel:
        assert kernel.run("%load_ext mistral_nb").status == "ok"
        yield kernel


@pytest.fixture
def run(shell: InteractiveShell) -> Any:
    """Run a cell in the shell; its error, if any, is in the result."""
    return lambda code: shell.run_cell(code, store_history=True)
