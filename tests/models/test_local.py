"""Checkpoint folders and GGUF files of this machine, brought into the store."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.errors import ModelError, PullError, UnknownModel
from mistral_nb.models import EMBEDDED, Progress
from mistral_nb.models.gguf_import import convert
from mistral_nb.models.manifest import MANIFEST, read_manifest
from tests.models.pulls import hashes, left_behind
from tests.models.tiny_gguf import tiny_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def folder(gguf: Path, tmp_path: Path) -> Path:
    """A checkpoint folder with files that do not belong to it."""
    folder = tmp_path / "My Model"
    folder.mkdir()
    convert(gguf, folder, lambda done, total: None)
    (folder / "LICENSE.txt").write_text("MIT License")
    (folder / "README.md").write_text("About")
    for name in ("notes.txt", "optimizer.pt", ".hidden"):
        (folder / name).write_text("not of the checkpoint")
    (folder / "runs").mkdir()
    return folder


def wanted(folder: Path) -> dict[str, str]:
    return {
        name: found
        for name, found in hashes(folder).items()
        if name not in ("notes.txt", "optimizer.pt", ".hidden", MANIFEST)
    }


def test_a_folder_is_copied(folder: Path, store: Path) -> None:
    seen: list[Progress] = []
    copy = models.pull(str(folder), seen.append)
    assert copy == store / "My-Model" == models.locate("My-Model")
    assert set(hashes(copy)) == {*wanted(folder), MANIFEST}
    manifest = read_manifest(copy)
    assert manifest
    assert {name: entry.sha256 for name, entry in manifest.files.items()} == wanted(folder) == wanted(copy)
    assert manifest.source["path"] == str(folder)
    assert list(dict.fromkeys(step.step for step in seen)) == ["Copying", "Saving"]
    assert seen[-1].done == seen[-1].total
    assert left_behind(store) == ["My-Model"]
    assert models.verify("My-Model") == []
    seen.clear()
    assert models.pull(str(folder), seen.append) == models.pull("My-Model") == copy
    assert seen == []


def test_a_link_is_copied_under_its_own_name(folder: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(folder)
    assert models.pull(str(tmp_path / "linked")) == store / "linked"
    assert not (store / "linked").is_symlink()


def test_a_snapshot_of_the_hubs_cache_is_copied_as_files(folder: Path, store: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in wanted(folder):
        shutil.copy(folder / name, blobs / f"blob of {name}")
        (snapshot / name).symlink_to(Path("..", "..", "blobs", f"blob of {name}"))
    copy = models.pull(str(snapshot), store_name="mine")
    assert wanted(copy) == wanted(folder)
    assert not [path for path in copy.iterdir() if path.is_symlink()]


def test_a_name_may_be_given_and_a_known_one_counts(folder: Path, store: Path, tmp_path: Path) -> None:
    assert models.pull(str(folder), store_name="mine") == store / "mine"
    assert models.pull(str(folder), store_name="mistral-7b") == store / "mistral-7b-instruct-v0.2"
    for name in ("..", ".hidden", "a/b", "", "-x", "ä"):
        with pytest.raises(ModelError, match="cannot be a model's name in the store"):
            models.pull(str(folder), store_name=name)
    with pytest.raises(ModelError, match="a name for the store goes with a path"):
        models.pull("embedded", store_name="mine")
    with pytest.raises(ModelError, match="a revision goes with a model of the Hugging Face hub"):
        models.pull(str(folder), revision="main")
    with pytest.raises(ModelError, match="mine is a name in the store; give that id"):
        models.pull("mine", revision="main")


def test_two_folders_of_one_name(folder: Path, store: Path, tmp_path: Path) -> None:
    models.pull(str(folder))
    other = tmp_path / "other" / folder.name
    shutil.copytree(folder, other)
    with pytest.raises(PullError, match=rf"a My-Model in the store that comes from {folder}; .* with --name"):
        models.pull(str(other))
    shutil.copytree(folder, store / "placed")
    with pytest.raises(PullError, match="a placed in the store that comes from elsewhere"):
        models.pull(str(other), store_name="placed")


def test_a_damaged_copy_is_copied_again(folder: Path, store: Path) -> None:
    copy = models.pull(str(folder))
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=f"run: mistral-nb pull '{folder}' --name My-Model"):
        models.locate("My-Model")
    assert models.pull(str(folder)) == copy
    assert wanted(copy) == wanted(folder)


def test_a_copy_goes_on_file_by_file(folder: Path, store: Path) -> None:
    staged = store / ".staging-My-Model" / "checkpoint"

    def in_the_weights(progress: Progress) -> bool:
        return (staged / "tokenizer.json").exists()

    with pytest.raises(PullError, match=r"cancelled; what was fetched is kept \(\d+ kB\): the next pull goes on from"):
        models.pull(str(folder), cancelled=lambda: in_the_weights(Progress("", 0, None)))
    kept = {path: path.stat().st_ino for path in staged.iterdir()}
    assert {path.name for path in kept} == {*wanted(folder)} - {"model.safetensors"}
    assert models.installed() == []
    copy = models.pull(str(folder))
    assert {path.name: path.stat().st_ino for path in copy.iterdir() if path.name in {p.name for p in kept}} == {
        path.name: number for path, number in kept.items()
    }
    assert wanted(copy) == wanted(folder)
    assert models.verify("My-Model") == []


def test_a_copy_goes_on_inside_a_file_on_a_nearly_full_disk(
    folder: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mistral_nb.models.local.PIECE", 50_000)
    monkeypatch.setattr(sys.modules["mistral_nb.models.pull"], "_REPORT_S", 0)
    size = (folder / "model.safetensors").stat().st_size
    part = small_disk / "models" / ".staging-My-Model" / "work" / "model.safetensors.part"
    with pytest.raises(PullError, match="cancelled"):
        models.pull(str(folder), cancelled=lambda: part.is_file() and part.stat().st_size >= size // 2)
    begun, node = part.stat().st_size, part.stat().st_ino
    assert size // 2 <= begun < size
    part.write_bytes(part.read_bytes()[:-10] + b"power cut!")
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - (size - begun) - 60_000))
    assert shutil.disk_usage(small_disk).free < size
    seen: list[Progress] = []
    copy = models.pull(str(folder), seen.append)
    assert (copy / "model.safetensors").stat().st_ino == node
    assert list(dict.fromkeys(step.step for step in seen))[:2] == ["Checking", "Copying"]
    assert wanted(copy) == wanted(folder)
    assert models.verify("My-Model") == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_has_changed_since_it_was_pulled_is_not_there_already(
    folder: Path, gguf: Path, store: Path, kind: str
) -> None:
    source, changed = (folder, folder / "config.json") if kind == "folder" else (gguf, gguf)
    name = models.pull(str(source)).name
    os.utime(changed, ns=(0, 0))
    with pytest.raises(PullError, match=rf"{source} has changed since it was pulled; run: mistral-nb rm {name}, and"):
        models.pull(str(source))
    assert models.pull(str(source), store_name="other") == store / "other"
    models.remove(name)
    assert models.pull(str(source)) == store / name


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "README.md"])
def test_a_link_that_leads_out_is_not_copied(folder: Path, store: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    copy = models.pull(str(folder))
    assert not (copy / name).exists()
    assert left_behind(store) == ["My-Model"]


def test_a_folder_that_is_named_like_a_known_model_is_not_taken_for_it(folder: Path, store: Path) -> None:
    known = {"SmolLM2": EMBEDDED, "Mistral-7B-Instruct-v0.3": "mistral-7b-instruct-v0.3"}
    for spelling, name in known.items():
        named = shutil.copytree(folder, folder.parent / spelling)
        with pytest.raises(ModelError, match=f"the name of a known model; if it is that one, give --name {name}"):
            models.pull(str(named))
        assert models.pull(str(named), store_name=name) == store / name


def test_a_whole_conversion_is_not_made_again(gguf: Path, store: Path) -> None:
    with pytest.raises(PullError, match="what was fetched is kept"):
        models.pull(str(gguf), cancelled=lambda: (store / ".staging-tiny" / "checkpoint" / "config.json").exists())
    assert models.installed() == []
    seen: list[Progress] = []
    models.pull(str(gguf), seen.append)
    assert {step.step for step in seen} == {"Checking", "Saving"}
    assert models.verify("tiny") == []


def test_a_part_of_a_conversion_is_not_kept(gguf: Path, store: Path) -> None:
    half = store / ".staging-tiny" / "work" / "converted" / "config.json"
    with pytest.raises(PullError, match="was cancelled; nothing of it is kept: the next pull starts again"):
        models.pull(str(gguf), cancelled=half.exists)
    assert left_behind(store) == []


def test_a_folder_that_changes_is_not_mixed(folder: Path, store: Path) -> None:
    staged = store / ".staging-My-Model" / "checkpoint"
    with pytest.raises(PullError, match="cancelled"):
        models.pull(str(folder), cancelled=lambda: (staged / "tokenizer.json").exists())
    (folder / "README.md").write_text("Other")
    file = folder / "model.safetensors"

    def touch(progress: Progress) -> None:
        if progress.step == "Copying":
            file.touch()

    with pytest.raises(PullError, match=rf"{file} was changed while it was copied; pull {folder} again once that has"):
        models.pull(str(folder), touch)
    copy = models.pull(str(folder))
    assert wanted(copy) == wanted(folder)
    assert left_behind(store) == ["My-Model"]


def test_a_folder_that_was_pulled_is_copied_with_its_origin(folder: Path, store: Path, tmp_path: Path) -> None:
    pulled = models.pull(str(folder))
    manifest = json.loads((pulled / MANIFEST).read_text())
    origin = {"hub": "org/name", "revision": "v1", "commit": "0" * 40}
    (pulled / MANIFEST).write_text(json.dumps(manifest | {"source": origin, "licence": "mit"}))
    moved = shutil.copytree(pulled, tmp_path / "moved")
    copy = read_manifest(models.pull(str(moved), store_name="org--name"))
    assert copy
    assert dict(copy.source) == {**origin, "path": str(moved), "stamp": copy.source["stamp"]}
    assert copy.licence == "mit"
    assert models.pull(str(moved), store_name="org--name") == models.pull("org/name", revision="v1")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_that_was_pulled_is_compared_with_its_manifest(
    folder: Path, store: Path, tmp_path: Path, name: str
) -> None:
    moved = shutil.copytree(models.pull(str(folder)), tmp_path / "moved")
    content = (moved / name).read_bytes()
    (moved / name).write_bytes(content.replace(b"1e-05", b"2e-05") if name == "config.json" else content[:-1] + b"!")
    told = rf"{moved / name} has the SHA-256 \w+, not \w+ as its {MANIFEST} says; copy it again .+ remove that"
    with pytest.raises(ModelError, match=told):
        models.pull(str(moved))
    assert left_behind(store) == ["My-Model"]
    (moved / MANIFEST).write_text("{")
    assert models.pull(str(moved)) == store / "moved"


def test_what_the_engine_cannot_run_is_refused_before_it_is_copied(folder: Path, store: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("LlamaFor", "OtherFor"))
    seen: list[Progress] = []
    with pytest.raises(ModelError, match="OtherForCausalLM"):
        models.pull(str(folder), seen.append)
    assert seen == []
    assert left_behind(store) == []
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer.json"):
        models.pull(str(folder))


def test_room_for_the_copy_is_asked_for_first(folder: Path, small_disk: Path) -> None:
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(3_900_000))
    with pytest.raises(
        PullError, match=rf"pulling My-Model needs 3\d\d kB in {small_disk}/models, where \d+ kB are free"
    ):
        models.pull(str(folder))
    assert left_behind(small_disk / "models") == []


def test_a_gguf_file_is_converted(gguf: Path, store: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    made = models.pull(str(gguf), seen.append)
    assert made == store / "tiny"
    manifest = read_manifest(made)
    assert manifest
    assert manifest.source["path"] == str(gguf)
    assert manifest.source["gguf_sha256"] == hashes(tmp_path)["tiny.gguf"]
    convert(gguf, tmp_path, lambda done, total: None)
    assert hashes(made)["model.safetensors"] == hashes(tmp_path)["model.safetensors"]
    assert {step.step for step in seen} == {"Converting", "Checking", "Saving"}
    assert left_behind(store) == ["tiny"]


def test_a_gguf_file_is_known_by_its_content(gguf: Path, store: Path, tmp_path: Path) -> None:
    shutil.copy(gguf, tmp_path / "sha256-abc")
    assert models.pull(str(tmp_path / "sha256-abc")) == store / "sha256-abc"
    for name, content in (("model.gguf", b"<html>"), ("model.safetensors", b"12345678{}"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name} is no GGUF file; give one, or the folder of a checkpoint"):
            models.pull(str(tmp_path / name))
    for name in ("none.gguf", "none.whl"):
        with pytest.raises(UnknownModel, match=rf"there is no file {tmp_path / name}; give the path of one"):
            models.pull(str(tmp_path / name))


def test_a_gguf_file_that_lies_in_the_store(gguf: Path, store: Path) -> None:
    (store / "mine").mkdir(parents=True)
    shutil.move(gguf, store / "mine" / "mine.gguf")
    with pytest.raises(PullError, match=r"mine was placed there by hand") as caught:
        models.pull(str(store / "mine" / "mine.gguf"))
    assert f"mistral-nb pull {store / 'mine' / 'mine.gguf'}" in str(caught.value)
    assert models.pull(str(store / "mine" / "mine.gguf"), store_name="other") == store / "other"
    shutil.copy(store / "mine" / "mine.gguf", store / "top.gguf")
    assert models.pull(str(store / "top.gguf")) == store / "top"


def test_a_file_that_cannot_be_read_is_not_the_stores_fault(folder: Path, store: Path) -> None:
    def take_away(progress: Progress) -> None:
        (folder / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(PullError, match=r"model.safetensors cannot be read \(No such file or directory\); check"):
        models.pull(str(folder), take_away)


def test_a_gguf_file_that_goes_away_is_not_the_stores_fault(gguf: Path, store: Path) -> None:
    def take_away(progress: Progress) -> None:
        if progress.step == "Converting":
            gguf.unlink(missing_ok=True)

    with pytest.raises(PullError, match=rf"^{gguf} cannot be read \(No such file or directory\); check that it is"):
        models.pull(str(gguf), take_away)
