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
    """For tests that end processes: a runtime folder and a log folder of their own."""
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MISTRAL_NB_LOG_DIR", str(tmp_path / "log"))
    engines = Engines()
    yield engines
    engines.end()


@pytest.fixture(scope="session")
def engine(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """The one engine that most tests share."""
    folder = tmp_path_factory.mktemp("shared-engine")
    engines = Engines()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MISTRAL_NB_RUNTIME_DIR", str(folder / "run"))
            patch.setenv("MISTRAL_NB_LOG_DIR", str(folder / "log"))
            shared = engines.start("--serve-as", STAND_IN, "--managed", "--idle-timeout", "600")
        shared.ready()
        yield shared
    finally:
        engines.end()
