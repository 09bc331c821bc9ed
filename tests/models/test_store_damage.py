"""One folder of the store that is broken in any way: it is told as broken, and the others are listed as ever."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import models
from mistral_nb.checkpoints import describe
from mistral_nb.errors import ModelError
from mistral_nb.model_report import models_table
from mistral_nb.models.manifest import MANIFEST, damage
from tests.checkpoints.test_fuzz import WRONG, places, replaced
from tests.models.tiny_repos import sharded


@pytest.fixture
def whole(store: Path, tmp_path: Path) -> Path:
    """A model in the store that was pulled, and one beside it."""
    for name in ("fine", "other"):
        write(tmp_path / name, sharded(1))
        models.pull(str(tmp_path / name))
    return store / "other"


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def listed() -> tuple[list[str], list[str]]:
    """The names of the whole models and of the broken ones, which the table has all."""
    table = models_table()
    here, broken = [model.name for model in models.installed()], list(models.broken())
    assert all(name in table for name in (*here, *broken))
    return here, broken


def settings(**content: Any) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps(content).encode(), "tokenizer.model": b"none"}


@pytest.mark.parametrize(
    "files",
    [
        settings(chat_template=[{"name": [], "template": "x"}]),
        settings(chat_template=[{"name": {}, "template": "x"}, {"name": "default", "template": []}]),
        settings(added_tokens_decoder=5),
        {"tokenizer_config.json": b"[]", "tokenizer.model": b"none"},
        {"added_tokens.json": b"5", "tokenizer.model": b"none"},
    ],
    ids=str,
)
def test_a_folder_with_odd_settings_hides_no_other(whole: Path, store: Path, files: dict[str, bytes]) -> None:
    write(store / "odd", sharded(1) | files)
    here, broken = listed()
    assert sorted([*here, *broken]) == ["fine", "odd", "other"]
    assert "odd" not in here or models.locate("odd")
    assert here[0] == "fine"


def test_a_decoder_that_is_none(store: Path) -> None:
    store.mkdir(parents=True)
    tokenizer = json.loads(sharded(1)["tokenizer.json"]) | {"decoder": {"type": "Sequence", "decoders": 5}}
    write(store / "odd", sharded(1) | {"tokenizer.json": json.dumps(tokenizer).encode()})
    assert listed() == (["odd"], [])
    assert describe(models.locate("odd")).template == "Mistral v1"


def test_a_manifest_with_any_wrong_value_hides_no_other(whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    for way in places(manifest):
        for wrong in (*WRONG, -1, 10**400):
            (whole / MANIFEST).write_text(json.dumps(replaced(manifest, way, wrong)))
            damage(whole)
            with suppress(ModelError):
                models.locate("other")
    (whole / MANIFEST).write_text(json.dumps(manifest))
    assert listed() == (["fine", "other"], [])


@pytest.mark.parametrize("size", [float("inf"), float("nan"), 1.5, "12", True, -1, None, []])
def test_a_size_that_is_none(whole: Path, size: Any) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    manifest["files"]["config.json"]["size"] = size
    (whole / MANIFEST).write_text(json.dumps(manifest))
    assert damage(whole) == "unreadable manifest"
    assert listed() == (["fine"], ["other"])


def test_a_name_in_a_manifest_does_not_act_on_the_terminal(whole: Path) -> None:
    manifest = json.loads((whole / MANIFEST).read_text())
    manifest["files"]["\x1b[2J\ud800"] = {"size": 1, "sha256": ""}
    (whole / MANIFEST).write_text(json.dumps(manifest))
    assert listed() == (["fine"], ["other"])
    assert models.broken()["other"].isprintable()


def test_a_removal_goes_on_where_it_was_cut_short(whole: Path, store: Path) -> None:
    shutil.copytree(whole, store / ".removed-big")
    assert models.remove("big") == sum(file.stat().st_size for file in whole.iterdir())
    assert not (store / ".removed-big").exists()
    with pytest.raises(ModelError, match="'big' is not in the store"):
        models.remove("big")


@pytest.mark.parametrize("known", [False, True])
def test_a_pull_ends_the_removals_that_were_cut_short(whole: Path, store: Path, tmp_path: Path, known: bool) -> None:
    shutil.copytree(whole, store / ".removed-big")
    models.pull(str(tmp_path / "fine"), store_name="fine" if known else "new")
    assert not (store / ".removed-big").exists()


def test_the_room_of_a_removal_that_was_cut_short_can_be_had(small_disk: Path, tmp_path: Path) -> None:
    removed = small_disk / "models" / ".removed-big"
    removed.mkdir(parents=True)
    (removed / "model.safetensors").write_bytes(bytes(3_500_000))
    assert models.pull(str(write(tmp_path / "fine", sharded(1)))).is_dir()
