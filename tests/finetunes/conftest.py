"""A server that keeps adapters, and the settings with which it is the Cloudflare account."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_nb.config import Secret, Settings
from tests.finetunes.adapters import write_adapter
from tests.finetunes.finetunes_server import ACCOUNT, TOKEN, FinetunesServer


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
