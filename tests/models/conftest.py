"""A store of its own, the embedded model's package with a tiny model in it, and disks that are small or read-only."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_nb.models import embedded as source_of_embedded
from mistral_nb.models.embedded import Package
from tests.models.hub_server import HubServer, Repo, use_hub
from tests.models.pip_index import PipIndex, use_index


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "temp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temp"))
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture(scope="session")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the embedded model's name with a tiny model in it."""
    pytest.importorskip("gguf")
    from tests.models.tiny_gguf import make_wheel, tiny_gguf

    folder = tmp_path_factory.mktemp("wheels")
    return make_wheel(folder, tiny_gguf(folder / "tiny.gguf"))


@pytest.fixture
def tiny(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """The embedded model's package, replaced by the tiny one."""
    from tests.models.tiny_gguf import MEMBER

    model = tiny_wheel.with_name("tiny.gguf")
    package = replace(
        source_of_embedded.SOURCE,
        wheel_bytes=tiny_wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(tiny_wheel.read_bytes()).hexdigest(),
        gguf=MEMBER,
        gguf_bytes=model.stat().st_size,
        gguf_sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
        needed_bytes=1_000_000,
    )
    monkeypatch.setattr(source_of_embedded, "SOURCE", package)
    return package


@pytest.fixture
def index(tiny: Package, tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PipIndex]:
    """An index with the tiny package, which is the only one that pip has."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with PipIndex(tiny_wheel) as index:
        use_index(monkeypatch, index.url)
        yield index


@pytest.fixture
def small_disk(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 4 MB, on which the store is."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("mount"):
        pytest.skip("no mount command here: a full and a read-only disk cannot be made")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a full and a read-only disk cannot be made: {mounted.stderr.strip()}")
    monkeypatch.setenv("MISTRAL_NB_HOME", str(disk))
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port where nobody listens, nor can anybody while the test runs: it is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def hub(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub with a tiny model in each layout, which pulls ask; they lose no time between their tries."""
    from tests.models.tiny_repos import consolidated, sharded

    monkeypatch.setattr("mistral_nb.models.download.FIRST_WAIT_S", 0.001)
    repos = {"org/sharded": Repo(sharded()), "org/single": Repo(sharded(1)), "org/mistral": Repo(consolidated())}
    with HubServer(repos) as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "hf_home")
        yield hub
