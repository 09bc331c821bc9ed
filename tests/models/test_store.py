"""The store: names, what is listed and found in it, manifests, and removal."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.errors import ModelError, PullError, UnknownModel
from mistral_nb.locks import StartLock
from mistral_nb.models import EMBEDDED
from mistral_nb.models.gguf_import import convert
from mistral_nb.models.manifest import MANIFEST, FileEntry, Manifest, damage, read_manifest, write_manifest
from mistral_nb.models.staging import file_sha256
from tests.models.tiny_gguf import tiny_gguf

MISTRAL = "mistral-7b-instruct-v0.2"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint of a tiny model, outside of every store."""
    folder = tmp_path_factory.mktemp("checkpoint")
    convert(tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf"), folder, lambda done, total: None)
    return folder


def place(checkpoint: Path, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint, folder))


def pulled(checkpoint: Path, folder: Path, **source: str) -> Path:
    """A folder as a pull leaves it."""
    place(checkpoint, folder)
    listed = {path.name: path for path in folder.iterdir()}
    files = {name: FileEntry(path.stat().st_size, file_sha256(path, lambda *_: None)) for name, path in listed.items()}
    write_manifest(folder, Manifest(folder.name, source, None, files))
    return folder


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("embedded", EMBEDDED),
        ("SmolLM2-135M-Instruct", EMBEDDED),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", EMBEDDED),
        ("mistral-7b-instruct-v0.3", "mistral-7b-instruct-v0.3"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-instruct-v0.1"),
        ("mistral-7b", MISTRAL),
    ],
)
def test_canonical(store: Path, name: str, canonical: str) -> None:
    assert models.canonical(name) == canonical


@pytest.mark.parametrize("name", ["mistral-7b-instruct-v0.4", "", "@hf/mistral/mistral-7b-instruct-v0.2", "/no/such"])
def test_an_unknown_model_is_named_with_the_known(store: Path, name: str) -> None:
    for call in (models.canonical, models.pull):
        with pytest.raises(UnknownModel, match=r"mistral-7b-instruct-v0.1, .*smollm2-135m-instruct") as caught:
            call(name)
        assert repr(name) in str(caught.value)
        assert ("did you mean 'mistral-7b-instruct-v0." in str(caught.value)) == name.startswith("mistral")


def test_a_folder_is_a_model(checkpoint: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = place(checkpoint, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert models.canonical("mine") == str(mine)
    assert models.locate("mine") == mine
    (mine / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"mine holds no tokenizer.json"):
        models.locate("mine")


def test_a_gguf_file_and_a_hub_id_are_to_be_pulled(store: Path, tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(UnknownModel, match=rf"bring it into the store with: mistral-nb pull {file}"):
        models.canonical(str(file))
    with pytest.raises(UnknownModel, match="run: mistral-nb pull org/name"):
        models.canonical("org/name")


def test_a_folder_placed_in_the_store_is_installed(checkpoint: Path, store: Path) -> None:
    assert models.installed() == []
    with pytest.raises(ModelError, match=f"{MISTRAL} is not in the store; run: mistral-nb pull mistral-7b"):
        models.locate("mistral-7b")
    for name in (MISTRAL, "my-own", "org--name"):
        place(checkpoint, store / name)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert [(model.name, model.title, model.bytes) for model in models.installed()] == [
        (MISTRAL, "Mistral 7B Instruct v0.2", size),
        ("my-own", "my-own", size),
        ("org--name", "org--name", size),
    ]
    assert models.locate("mistral-7b") == models.pull("mistral-7b") == store / MISTRAL
    assert models.locate("my-own") == models.pull("my-own") == store / "my-own"
    assert models.locate("org/name") == models.pull("org/name") == store / "org--name"


def test_the_store_may_be_a_link(
    checkpoint: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    store.parent.mkdir()
    store.symlink_to(tmp_path / "elsewhere")
    place(checkpoint, tmp_path / "elsewhere" / "my-own")
    assert models.locate("my-own") == store / "my-own"
    assert [model.name for model in models.installed()] == ["my-own"]
    with pytest.raises(ModelError, match="is in the store already; use it as my-own"):
        models.pull(str(store / "my-own"))
    assert models.remove("my-own") > 0
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == [".my-own.lock"]


def test_the_stores_folder_does_not_move_with_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MISTRAL_NB_HOME", "home")
    assert models.store_path() == tmp_path / "home" / "models"


def test_a_link_to_a_checkpoint_elsewhere(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    store.mkdir(parents=True)
    (store / "mine").symlink_to(checkpoint)
    assert models.locate("mine") == models.pull("mine") == store / "mine"
    [model] = models.installed()
    assert model.bytes == sum(file.stat().st_size for file in checkpoint.iterdir())
    assert models.remove("mine") == 0
    assert models.installed() == []
    assert (checkpoint / "config.json").is_file()


def test_a_link_to_a_snapshot_of_the_hubs_cache(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--o--n" / "blobs", tmp_path / "models--o--n" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    store.mkdir(parents=True)
    (store / MISTRAL).symlink_to(snapshot)
    assert models.locate("mistral-7b") == models.pull("mistral-7b") == store / MISTRAL
    [model] = models.installed()
    assert model.bytes == sum(file.stat().st_size for file in checkpoint.iterdir())


@pytest.mark.parametrize("kind", ["folder that lacks a file", "empty folder", "link", "link to nothing", "file"])
@pytest.mark.parametrize("name", [EMBEDDED, MISTRAL])
def test_a_pull_never_replaces_what_the_user_placed(
    checkpoint: Path, store: Path, tmp_path: Path, kind: str, name: str
) -> None:
    store.mkdir(parents=True)
    placed, broken = store / name, tmp_path / "broken"
    if kind == "folder that lacks a file":
        (place(checkpoint, placed) / "tokenizer.json").unlink()
    elif kind == "empty folder":
        placed.mkdir()
    elif kind == "file":
        placed.write_text("mine")
    else:
        placed.symlink_to(broken)
    if kind == "link":
        (pulled(checkpoint, broken) / "tokenizer.json").unlink()
    before = sorted(os.walk(store)), sorted(os.walk(broken))
    with pytest.raises(PullError, match=rf"{placed} was placed there by hand.* mistral-nb rm {name}, then pull again"):
        models.pull(name)
    assert (sorted(os.walk(store)), sorted(os.walk(broken))) == before
    assert models.installed() == []
    models.remove(name)
    assert not os.path.lexists(placed)
    assert broken.is_dir() == (kind == "link")


def test_a_pulled_folder_is_checked_against_its_manifest(checkpoint: Path, store: Path, tmp_path: Path) -> None:
    own = pulled(checkpoint, tmp_path / "own")
    assert models.locate(str(own)) == own
    by_hand = ", or, if you changed it yourself, remove its mistral_nb.json"
    again = f"run: mistral-nb rm evil, and pull it again from where it came{by_hand}"
    advice = {
        pulled(checkpoint, store / MISTRAL, hub="mistralai/x"): f"run: mistral-nb pull mistral-7b{by_hand}",
        pulled(checkpoint, store / "org--name", hub="org/name"): f"run: mistral-nb pull org/name{by_hand}",
        pulled(
            checkpoint, store / "at", hub="org/at", revision="v1"
        ): f"run: mistral-nb pull org/at --revision v1{by_hand}",
        pulled(checkpoint, store / "mine", path="/my own"): f"run: mistral-nb pull '/my own' --name mine{by_hand}",
        pulled(checkpoint, store / "evil", hub="x; rm -rf ~"): again,
        pulled(checkpoint, store / "evil2", path="/x\n\x1b[2J"): again.replace("evil", "evil2"),
        own: f"copy it again{by_hand}",
    }
    for folder, command in advice.items():
        (folder / "config.json").write_text("{}")
        with pytest.raises(ModelError, match=rf"config.json is not \d+ bytes\); {command}$"):
            models.locate(str(own) if folder == own else folder.name)
    assert models.installed() == []
    (own / MANIFEST).unlink()
    assert models.locate(str(own)) == own


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"format": 1, "files": {}}', "store format 1, this version reads 2"),
        ('{"format": 3}', "store format 3, this version reads 2"),
        ("", "unreadable manifest"),
        ("[]", "unreadable manifest"),
        ('{"format": 2}', "unreadable manifest"),
        ("[" * 100_000, "unreadable manifest"),
        *(
            (json.dumps({"format": 2, "name": "n", "source": {}, "files": {name: {"size": 0, "sha256": ""}}}), problem)
            for name in ("../x", "a/../../x", "/etc/passwd", "c:x")
            for problem in ("unreadable manifest",)
        ),
    ],
)
def test_a_manifest_that_cannot_be_read(checkpoint: Path, store: Path, text: str, problem: str) -> None:
    folder = place(checkpoint, store / MISTRAL)
    (folder / MANIFEST).write_text(text)
    assert damage(folder) == problem
    before = sorted(os.walk(folder))
    advice = "upgrade mistral-nb" if "format 3" in problem else f"move it away or run: mistral-nb rm {MISTRAL}, then"
    with pytest.raises(ModelError, match=rf"does not match its manifest \({problem}\); {advice}"):
        models.locate(MISTRAL)
    with pytest.raises(PullError, match="upgrade mistral-nb" if "format 3" in problem else "move it away, or remove"):
        models.pull(MISTRAL)
    assert sorted(os.walk(folder)) == before
    assert models.installed() == []
    assert models.remove(MISTRAL) > 0


def test_a_pull_does_not_replace_what_the_user_added_to_a_pulled_model(checkpoint: Path, store: Path) -> None:
    folder = pulled(checkpoint, store / MISTRAL, hub="mistralai/x")
    (folder / "config.json").write_text("{}")
    (folder / "adapters").mkdir()
    (folder / "adapters" / "mine").write_text("mine")
    with pytest.raises(ModelError, match=f"move it away or run: mistral-nb rm {MISTRAL}, then pull it again, or, if"):
        models.locate(MISTRAL)
    with pytest.raises(PullError, match=r"would replace it with adapters/mine, which no pull brought; move it away"):
        models.pull(MISTRAL)
    assert (folder / "adapters" / "mine").read_text() == "mine"


@pytest.mark.parametrize("spelling", ["Mistral-7B-Instruct-v0.2", "mistral-7b", "MISTRAL-7B-INSTRUCT"])
def test_a_known_model_may_lie_under_any_of_its_names(checkpoint: Path, store: Path, spelling: str) -> None:
    folder = place(checkpoint, store / spelling)
    names = (spelling, MISTRAL, "mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2")
    assert {models.canonical(name) for name in names} == {MISTRAL}
    assert {models.locate(name) for name in names} == {models.pull(name) for name in names} == {folder}
    assert [(model.name, model.path) for model in models.installed()] == [(MISTRAL, folder)]
    (folder / "tokenizer.json").unlink()
    assert list(models.broken()) == [MISTRAL]
    with pytest.raises(PullError, match=f"{folder} was placed there by hand"):
        models.pull(MISTRAL)
    assert models.remove(MISTRAL) > 0
    assert not folder.exists()


def test_the_very_name_of_a_folder_comes_first(checkpoint: Path, store: Path) -> None:
    for name in ("mistral-7b", MISTRAL):
        place(checkpoint, store / name)
    for name in ("mistral-7b", MISTRAL):
        assert models.locate(name) == store / name
    assert sorted(model.name for model in models.installed()) == ["mistral-7b", MISTRAL]
    models.remove("mistral-7b")
    assert models.locate("mistral-7b") == store / MISTRAL


@pytest.mark.parametrize("name", ["n" * 300, f"org/{'n' * 300}", "a\0b", "~nobody-of-that-name/model"])
def test_a_name_that_no_file_can_have(store: Path, name: str) -> None:
    for call in (models.canonical, models.pull, models.locate, models.remove):
        with pytest.raises(UnknownModel):
            call(name)


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A folder in which the system refuses to look, for everybody: a link that leads to itself."""
    (tmp_path / "refused").symlink_to(tmp_path / "refused")
    return tmp_path / "refused"


def test_a_path_that_cannot_be_read(store: Path, refused: Path) -> None:
    for call in (models.canonical, models.pull):
        with pytest.raises(ModelError, match=r"refused/model cannot be read \(.*\); check its permissions and"):
            call(str(refused / "model"))


def test_a_store_that_cannot_be_read(refused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(refused))
    for call in (lambda: models.canonical("x"), models.installed, models.broken, models.unfinished):
        with pytest.raises(ModelError, match=rf"the store {refused}/models cannot be read .* set MISTRAL_NB_HOME to"):
            call()


def test_unfinished_pulls(checkpoint: Path, store: Path) -> None:
    assert models.unfinished() == {}
    (store / ".staging-org--name" / "work").mkdir(parents=True)
    (store / ".staging-org--name" / "work" / "half").write_bytes(bytes(1000))
    assert models.unfinished() == {"org--name": 1000}
    assert models.installed() == []


def test_a_manifest_that_is_no_file_makes_nobody_wait(checkpoint: Path, tmp_path: Path) -> None:
    folder = place(checkpoint, tmp_path / "own")
    os.mkfifo(folder / MANIFEST)
    assert damage(folder) == "unreadable manifest"


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = Manifest("name", {"hub": "org/näme"}, "MIT", {"a/b": FileEntry(3, "0f")})
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    write_manifest(tmp_path, replace(manifest, licence=None))
    assert read_manifest(tmp_path) == replace(manifest, licence=None)


def test_verify_reads_every_byte(checkpoint: Path, store: Path) -> None:
    weights = pulled(checkpoint, store / "mine") / "model.safetensors"
    assert models.verify("mine") == []
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert models.locate("mine")
    [wrong] = models.verify("mine")
    assert wrong.startswith("model.safetensors has the SHA-256 ")
    place(checkpoint, store / "placed")
    with pytest.raises(ModelError, match="was not pulled, so there are no sums to compare"):
        models.verify("placed")


def test_removing_gives_the_room_back(checkpoint: Path, store: Path) -> None:
    folder = place(checkpoint, store / "mine")
    staging = store / ".staging-mine" / "work"
    staging.mkdir(parents=True)
    (staging / "half").write_bytes(bytes(1000))
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert models.remove("mine") == size + 1000
    assert [path.name for path in store.iterdir()] == [".mine.lock"]
    with pytest.raises(UnknownModel, match="'mine' is not in the store, which holds nothing"):
        models.remove("mine")


def test_what_was_begun_to_be_pulled_can_be_dropped(store: Path) -> None:
    (store / ".staging-org--name" / "work").mkdir(parents=True)
    (store / ".staging-org--name" / "work" / "half").write_bytes(bytes(1000))
    assert models.remove("org/name") == 1000


def test_a_model_that_is_being_pulled_is_not_removed(checkpoint: Path, store: Path) -> None:
    place(checkpoint, store / "mine")
    with StartLock(store / ".mine.lock"), pytest.raises(ModelError, match="mine is being pulled; interrupt that pull"):
        models.remove("mine")
    assert models.locate("mine")


@pytest.mark.parametrize("name", [".staging-mine", "..", ".", "", "mine/..", "../models/mine", "/"])
def test_only_models_are_removed(checkpoint: Path, store: Path, tmp_path: Path, name: str) -> None:
    place(checkpoint, store / "mine")
    (store / ".staging-mine").mkdir()
    with pytest.raises(ModelError, match=r"is not in the store|but a folder of yours; remove it yourself"):
        models.remove(name)
    with pytest.raises(ModelError, match="but a folder of yours; remove it yourself"):
        models.remove(str(checkpoint))
    assert {path.name for path in store.iterdir()} == {"mine", ".staging-mine"}


def test_what_a_removal_that_was_cut_short_left_goes_with_the_next_one(checkpoint: Path, store: Path) -> None:
    place(checkpoint, store / "mine")
    place(checkpoint, store / ".removed-other")
    place(checkpoint, store / ".removed-busy")
    assert [model.name for model in models.installed()] == ["mine"]
    with StartLock(store / ".busy.lock"):
        models.remove("mine")
    assert sorted(path.name for path in store.iterdir() if path.suffix != ".lock") == [".removed-busy"]
