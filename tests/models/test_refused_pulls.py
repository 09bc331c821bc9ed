"""A pull that is refused takes nothing from another one of that name, nor is it answered by another's model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.errors import ModelError, PullError
from mistral_nb.models import Progress
from mistral_nb.models.manifest import MANIFEST, read_manifest
from tests.models.hub_server import LISTING, Fault, HubServer, Repo
from tests.models.pulls import left_behind
from tests.models.tiny_repos import CONFIG, sharded

KNOWN, KNOWN_ID = "mistral-7b-instruct-v0.2", "mistralai/Mistral-7B-Instruct-v0.2"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def staged(store: Path, name: str) -> dict[str, int]:
    """The files of weights that a pull of that name left, with their sizes."""
    files = (store / f".staging-{name}").rglob("model*")
    return {path.name: path.stat().st_size for path in files if ".json" not in path.name}


def cut_short(hub: HubServer, store: Path, hub_id: str, name: str) -> dict[str, int]:
    """Pull until two shards and a part of the third are there."""
    fault = hub.fail(SHARDS[2], Fault("stalled", 300_000))
    with pytest.raises(PullError, match="cancelled"):
        models.pull(hub_id, cancelled=lambda: fault.happened.is_set() and 300_000 in staged(store, name).values())
    fault.over.set()
    hub.heal()
    kept = staged(store, name)
    assert len(kept) == 3
    return kept


@pytest.mark.parametrize("kind", ["folder", "GGUF"])
def test_a_path_that_is_refused_leaves_what_the_hub_has_sent(
    hub: HubServer, store: Path, tmp_path: Path, kind: str
) -> None:
    hub.repos[KNOWN_ID] = Repo(sharded())
    kept = cut_short(hub, store, KNOWN_ID, KNOWN)
    if kind == "folder":
        path = write(tmp_path / "bad", sharded() | {SHARDS[1]: b"short"})
    else:
        path = tmp_path / "bad.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError):
        models.pull(str(path), store_name=KNOWN)
    assert staged(store, KNOWN) == kept
    hub.seen.clear()
    assert models.pull(KNOWN_ID) == store / KNOWN
    assert [hub.sent(name) for name in SHARDS[:2]] == [0, 0]


@pytest.mark.parametrize("why", ["listing", "config", "nobody answers", "offline"])
def test_a_hub_id_that_is_refused_leaves_what_was_copied(
    hub: HubServer, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    name = "org--asked"
    source = write(tmp_path / "source", sharded())
    with pytest.raises(PullError, match="cancelled"):
        models.pull(str(source), store_name=name, cancelled=lambda: SHARDS[0] in staged(store, name))
    kept = staged(store, name)
    if why == "listing":
        hub.repos["org/asked"] = Repo({"README.md": b"", "model.gguf": b""})
    elif why == "config":
        config = json.dumps(CONFIG | {"architectures": ["GemmaForCausalLM"]}).encode()
        hub.repos["org/asked"] = Repo(sharded() | {"config.json": config})
    elif why == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError):
        models.pull("org/asked")
    assert staged(store, name) == kept
    hub.repos["org/asked"] = Repo(sharded(seed=3))
    if why != "offline":
        assert models.pull("org/asked") == store / name
        assert (store / name / SHARDS[0]).read_bytes() == sharded(seed=3)[SHARDS[0]]


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": b"", "model.gguf": b""},
        sharded() | {"config.json": b"{}"},
        sharded() | {"config.json": json.dumps(CONFIG | {"hidden_size": 128}).encode()},
        sharded(2) | {"tokenizer.json": b"{}"},
    ],
    ids=["listing", "config", "headers", "other shards"],
)
def test_a_revision_that_is_refused_leaves_what_another_has_sent(
    hub: HubServer, store: Path, files: dict[str, bytes]
) -> None:
    kept = cut_short(hub, store, "org/sharded", "org--sharded")
    hub.repos["org/sharded"] = Repo(files, tags=("v1",))
    with pytest.raises(ModelError):
        models.pull("org/sharded", revision="v1")
    assert staged(store, "org--sharded") == kept
    hub.repos["org/sharded"] = Repo(sharded())
    hub.seen.clear()
    folder = models.pull("org/sharded")
    assert [hub.sent(name) for name in SHARDS[:2]] == [0, 0]
    assert all((folder / name).read_bytes() == sharded()[name] for name in ("config.json", "tokenizer.json", *SHARDS))
    assert left_behind(store) == ["org--sharded"]


def test_a_refused_commit_leaves_nothing_of_its_own(hub: HubServer, store: Path) -> None:
    """Also of an earlier pull of it, which was cut short before the refusal."""
    hub.repos["org/bad"] = Repo(sharded(1) | {"config.json": json.dumps(CONFIG | {"hidden_size": 128}).encode()})
    hub.fail("the header of model.safetensors", Fault("status", status=403, headers={"X-Error-Code": "No"}))
    with pytest.raises(PullError):
        models.pull("org/bad")
    assert left_behind(store) == [".staging-org--bad"]
    with pytest.raises(ModelError, match="org/bad cannot be run"):
        models.pull("org/bad")
    assert left_behind(store) == []


def seal(store: Path, hub_id: str, name: str, revision: str | None = None) -> None:
    """Pull, and keep the last rename from being made."""

    def place(progress: Progress) -> None:
        (store / name).mkdir(exist_ok=True)

    with pytest.raises(PullError, match="was placed there by hand"):
        models.pull(hub_id, place, revision=revision)
    shutil.rmtree(store / name)


def test_what_was_sealed_of_another_revision_is_not_taken(hub: HubServer, store: Path) -> None:
    hub.repos["org/single"].tags = ("old",)
    old = hub.repos["org/single"]
    seal(store, "org/single", "org--single", "old")
    hub.repos["org/single"] = Repo(sharded(1, seed=7))
    folder = models.pull("org/single")
    manifest = read_manifest(folder)
    assert manifest
    assert manifest.source["revision"] == "main"
    assert manifest.source["commit"] == hub.repos["org/single"].commit != old.commit
    assert models.verify("org--single") == []


@pytest.mark.parametrize("revision", [None, "main", "its commit"])
def test_what_was_sealed_of_the_revision_is_taken_as_it_is(hub: HubServer, store: Path, revision: str | None) -> None:
    seal(store, "org/single", "org--single")
    asked = len(hub.asked(LISTING))
    models.pull("org/single", revision=hub.repos["org/single"].commit if revision == "its commit" else revision)
    assert len(hub.asked(LISTING)) == asked


def test_a_hub_id_is_not_answered_by_a_path_or_by_another_id(hub: HubServer, store: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", sharded(1))
    folder = models.pull(str(source), store_name="org--single")
    advice = "run: mistral-nb rm org--single, and pull again"
    with pytest.raises(
        PullError, match=rf"a org--single in the store that comes from {source}, not from org/single; {advice}"
    ):
        models.pull("org/single")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"source": {"hub": "other/one"}}))
    with pytest.raises(PullError, match=rf"that comes from other/one, not from org/single; {advice}"):
        models.pull("org/single")
    assert not hub.seen
    (folder / MANIFEST).write_text(json.dumps(manifest | {"source": {"hub": "Org/Single"}}))
    assert models.pull("org/single") == folder


def test_a_known_model_may_have_come_from_a_path(hub: HubServer, store: Path, tmp_path: Path) -> None:
    folder = models.pull(str(write(tmp_path / "source", sharded(1))), store_name=KNOWN)
    assert models.pull(KNOWN) == models.pull(KNOWN_ID) == folder
    assert not hub.seen
