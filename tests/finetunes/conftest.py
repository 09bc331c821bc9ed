"""A server that keeps adapters, the settings with which it is the Cloudflare account, and a store of the test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_nb.config import Settings
from mistral_nb.secret import Secret
from tests.finetunes.adapters import write_adapter
from tests.finetunes.finetunes_server import ACCOUNT, TOKEN, FinetunesServer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this machine keeps, the notes of what was pushed too."""
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def server() -> Iterator[FinetunesServer]:
    with FinetunesServer() as server:
        yield server


@pytest.fixture
def settings(server: FinetunesServer) -> Settings:
    return Settings(
        cloudflare_account_id=ACCOUNT,
        cloudflare_api_token=Secret(TOKEN),
        cloudflare_base_url=server.url,
        cloudflare_trust_base_url=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that is fit for Cloudflare."""
    return write_adapter(tmp_path / "tone")
