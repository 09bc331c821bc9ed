"""What the tests of the backends share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.backends import Local
from mistral_nb.backends.workers_ai import Timeouts, WorkersAI
from mistral_nb.config import load_settings
from mistral_nb.secret import Secret
from mistral_nb.types import GenerationRequest
from tests.backends.scripted import TOKEN, Peer


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.close()


@pytest.fixture
def client(peer: Peer) -> Callable[..., WorkersAI]:
    """Makes a client of `peer` as it would be one of Cloudflare's; its limits end nothing that a test waits for."""

    def make(**changes: Any) -> WorkersAI:
        values: dict[str, Any] = {
            "base_url": peer.url,
            "account": "0123456789abcdef0123456789abcdef",
            "token": Secret(TOKEN),
            "model": "@cf/mistral/mistral-7b-instruct-v0.2-lora",
            "timeouts": Timeouts(600, 600, 600),
        }
        return WorkersAI(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def engine(embedded: Path) -> Local:
    """The embedded model on an engine that the whole session shares, and that has answered once."""
    local = Local(load_settings())
    for _ in local.stream(GenerationRequest(prompt="Hello", max_tokens=1)):
        pass
    return local
