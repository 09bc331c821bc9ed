"""A real engine process with the embedded model, reached over its socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_nb import models
from tests.server.engines import MODEL, STAND_IN, Engines, EngineUnderTest


@pytest.fixture(scope="session")
def embedded(own_settings: None) -> Path:
    """The embedded model's folder; pulled if the store does not hold it."""
    return models.pull(MODEL)


@pytest.fixture
def engines(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """For tests that end processes: folders of their own, which the test itself uses too."""
    engines = Engines(tmp_path)
    for name, value in engines.env.items():
        monkeypatch.setenv(name, value)
    yield engines
    engines.end()


@pytest.fixture(scope="session")
def engine(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """The one engine that most tests share. Its models are the store's; its adapters are its own."""
    folder = tmp_path_factory.mktemp("shared-engine")
    engines = Engines(folder)
    (folder / "home").mkdir()
    (folder / "home" / "models").symlink_to(models.store_path(), target_is_directory=True)
    engines.env["MISTRAL_NB_HOME"] = str(folder / "home")
    try:
        shared = engines.start("--serve-as", STAND_IN, "--managed", "--idle-timeout", "3600")
        shared.ready()
        yield shared
    finally:
        engines.end()
