"""Pulls from a hub that read the headers of the weights before the weights, and those that go on with other names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import models
from mistral_nb.errors import ModelError, PullError
from mistral_nb.models import Progress
from mistral_nb.models.hub import HubSource
from mistral_nb.models.manifest import read_manifest
from mistral_nb.models.staging import Staging, staging_path
from tests.checkpoints.tiny import packed
from tests.models.hub_server import Fault, HubServer, Repo, header_of
from tests.models.pulls import left_behind
from tests.models.tiny_repos import sharded


def weights_of(changed: Callable[[dict[str, Any]], object], pad: int = 0) -> dict[str, bytes]:
    """A repository whose weights have another header, `pad` bytes longer."""
    content = sharded(1)["model.safetensors"]
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    changed(header)
    return sharded(1) | {"model.safetensors": packed(json.dumps(header).encode() + b" " * pad, content[end:])}


def tokens(count: int) -> dict[str, bytes]:
    """A repository with the tokenizer of another vocabulary."""
    model = {"type": "BPE", "vocab": {f"token {number}": number for number in range(count)}, "merges": []}
    return sharded() | {"tokenizer.json": json.dumps({"model": model, "added_tokens": []}).encode()}


NORM = "model.norm.weight"
BEFORE = "org/asked cannot be run, so its weights are not fetched:"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (tokens(9999), f"{BEFORE} tokenizer.json has token ids up to 9998, .+; choose another model or revision"),
        (tokens(9), f"{BEFORE} tokenizer.json has only 9 tokens, .+; choose another model or revision"),
        (
            weights_of(lambda header: header[NORM].update(dtype="I16")),
            f"{BEFORE} model.safetensors: the tensor {NORM} is I16, .+",
        ),
        (
            weights_of(lambda header: header[NORM].update(shape=[2, 128])),
            rf"{BEFORE} model.safetensors: the tensor {NORM} is \[2, 128\], .+; choose another model or revision",
        ),
        (
            weights_of(lambda header: header.update(more=header.pop(NORM)), pad=100_000),
            f"{BEFORE} model.safetensors: the tensor {NORM} is missing; choose another model or revision",
        ),
        (
            sharded(1) | {"model.safetensors": sharded(1)["model.safetensors"][:-2]},
            f"{BEFORE} model.safetensors is truncated: .+; choose another model or revision",
        ),
        (
            sharded(1) | {"model.safetensors": b""},
            f"{BEFORE} model.safetensors is empty; choose another model or revision",
        ),
        (
            sharded(1) | {"model.safetensors": (1 << 40).to_bytes(8, "little") + b"{" + bytes(200_000)},
            f"{BEFORE} model.safetensors claims a header of .+; choose another model or revision",
        ),
    ],
    ids=["tokens", "few tokens", "dtype", "shape", "long header", "truncated", "empty", "huge header"],
)
def test_what_the_headers_tell_is_refused_before_the_weights(
    hub: HubServer, store: Path, files: dict[str, bytes], message: str
) -> None:
    hub.repos["org/asked"] = Repo(files)
    with pytest.raises(ModelError, match=rf"^{message}$") as caught:
        models.pull("org/asked")
    assert type(caught.value) is ModelError
    assert not hub.asked("model.safetensors")
    assert left_behind(store) == []


def test_a_long_header_is_read_whole(hub: HubServer) -> None:
    hub.repos["org/asked"] = Repo(weights_of(lambda header: None, pad=100_000))
    folder = models.pull("org/asked")
    short, long = [each.declared for each in hub.asked(header_of("model.safetensors"), "cdn")]
    assert short == 65_536
    assert long > 100_000
    assert models.verify(folder.name) == []


@pytest.mark.parametrize("kind", ["whole", "short", "cut", "elsewhere", "drop"])
def test_a_header_that_does_not_come_as_asked(hub: HubServer, kind: str) -> None:
    hub.fail(header_of("model.safetensors"), Fault(kind, 100), Fault(kind, 100))
    assert models.verify(models.pull("org/single").name) == []


@pytest.mark.parametrize("revision", ["v1", None])
def test_another_name_of_the_commit_keeps_what_was_fetched(hub: HubServer, revision: str | None) -> None:
    repo = hub.repos["org/single"]
    repo.tags = ("v1",)
    hub.fail("model.safetensors", Fault("status", status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(PullError, match="asks to wait"):
        models.pull("org/single", revision=revision)
    hub.seen.clear()
    manifest = read_manifest(models.pull("org/single", revision=repo.commit))
    assert manifest
    assert manifest.source["revision"] == repo.commit
    assert not hub.asked("tokenizer.json")


def seal(folder: Path) -> None:
    """Make of a pulled model what its pull leaves when it is killed before its last rename."""
    staging = Staging(folder.parent, folder.name)
    staging.begin(HubSource(folder.name, "org/single", None).identity())
    staging.checkpoint.rmdir()
    folder.rename(staging.checkpoint)


def test_a_sealed_folder_of_another_revision_is_not_taken(hub: HubServer) -> None:
    repo = hub.repos["org/single"]
    repo.tags = ("v1",)
    folder = models.pull("org/single")
    seal(folder)
    repo.files["README.md"] = b"of v1"
    folder = models.pull("org/single", revision="v1")
    assert (folder / "README.md").read_bytes() == b"of v1"
    assert not hub.asked("model.safetensors", "cdn")[1:]


def test_a_sealed_folder_is_not_mixed_with_another_revision(hub: HubServer, store: Path) -> None:
    """The other one is cancelled when it has replaced one file of two by another of the same size."""
    repo = hub.repos["org/single"]
    repo.tags = ("v1",)
    folder = models.pull("org/single")
    seal(folder)
    repo.files["config.json"] = repo.files["config.json"].replace(b"2048", b"1024")
    repo.files["README.md"] = repo.files["README.md"].upper()
    config = staging_path(store, folder.name) / "checkpoint" / "config.json"
    with pytest.raises(PullError, match="was cancelled"):
        models.pull("org/single", revision="v1", cancelled=lambda: config.is_file() and b"1024" in config.read_bytes())
    folder = models.pull("org/single")
    assert (folder / "README.md").read_bytes() == repo.files["README.md"]


def test_a_disk_that_fails_is_not_the_models_fault(hub: HubServer, store: Path) -> None:
    """What was fetched is kept. Memory that is mapped nowhere stands for a file that the disk cannot read."""
    if not shutil.which("mount"):
        pytest.skip("no mount command here: a file that cannot be read cannot be made")
    repo = hub.repos["org/single"]
    repo.files["LICENSE"] = b"Apache"
    file = staging_path(store, "org--single") / "checkpoint" / "LICENSE"
    mounted: list[subprocess.CompletedProcess[str]] = []

    def fail(progress: Progress) -> None:
        if progress.step.startswith("Downloading model") and not mounted:
            command = ["mount", "--bind", f"/proc/{os.getpid()}/mem", str(file)]
            mounted.append(subprocess.run(command, capture_output=True, text=True, check=False))
            if mounted[0].returncode:
                pytest.skip(f"a file that cannot be read cannot be made: {mounted[0].stderr.strip()}")

    try:
        with pytest.raises(PullError, match="Input/output error"):
            models.pull("org/single", fail)
    finally:
        subprocess.run(["umount", "--lazy", str(file)], capture_output=True, check=False)
    hub.seen.clear()
    assert models.verify(models.pull("org/single").name) == []
    assert not hub.asked("tokenizer.json")
