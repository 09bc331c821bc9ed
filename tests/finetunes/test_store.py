"""The adapters on this machine: what is there, what may be put there, several at once, and what a crash leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_nb.errors import AdapterError
from mistral_nb.finetunes.adapter import ASSETS, CONFIG_FILE, DEFAULT_MODEL, WEIGHTS_FILE, Adapter, adapter_from_wire
from mistral_nb.finetunes.store import ASSET_LIMITS, AdapterStore, adapters_path

PATIENCE = 180.0


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def hidden(store: AdapterStore) -> list[str]:
    """What is left of work under way."""
    return [path.name for path in store.folder.rglob(".*") if not path.name.endswith(".lock")]


def test_the_store_is_beside_that_of_the_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path))
    assert adapters_path() == tmp_path / "adapters"
    assert AdapterStore().list() == []
    assert not adapters_path().exists(), "looking makes no folder"


def test_an_adapter_from_its_record_to_its_files(store: AdapterStore) -> None:
    made = store.create("tone", DEFAULT_MODEL, "answers like a pirate ☠")
    assert store.missing_files(made) == ASSETS
    store.put_asset(made, CONFIG_FILE, [b"{", b"}"])
    assert store.missing_files(made) == (WEIGHTS_FILE,)
    store.put_asset(made, WEIGHTS_FILE, iter([b"weights"]))
    assert store.missing_files(made) == ()
    again = AdapterStore(store.folder)
    (found,) = again.list()
    assert found == replace(made, modified_at=found.modified_at)
    assert found.modified_at >= made.created_at
    assert again.find(made.id) == again.find("tone") == found
    assert again.find("ton") is None
    assert (again.path(found) / CONFIG_FILE).read_bytes() == b"{}"
    assert hidden(store) == []


def test_the_wire_has_every_field() -> None:
    adapter = Adapter("11111111-2222-3333-4444-555555555555", "a", "m", "2026-01-01T00:00:00Z", "", "d", True)
    assert adapter_from_wire({**adapter.to_wire(), "more": 1}) == adapter
    assert adapter_from_wire({"id": "1", "name": "a", "description": None}).description == ""
    assert adapter_from_wire({"id": "1", "name": "Élan vital (2)"}).name == "Élan vital (2)"


@pytest.mark.parametrize(
    ("adapter_id", "name"),
    [("", "a"), ("1", ""), ("1", " "), ("1", "\x1b[2J"), ("\x1b[2J", "a"), ("../..", "a"), ("1", "a" * 257), (1, "a")],
)
def test_a_record_that_is_of_no_adapter(adapter_id: object, name: str) -> None:
    with pytest.raises(ValueError, match="without an id"):
        adapter_from_wire({"id": adapter_id, "name": name})


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "letters"),
        ("../up", "letters"),
        ("a b", "letters"),
        ("a\x1b[2J", r"'a\\x1b\[2J'"),
        ("x" * 101, "1 to 100"),
        ("cf-public-mine", "Cloudflare's own"),
        ("00000000-0000-0000-0000-00000000000A", "ids look"),
    ],
)
def test_names(store: AdapterStore, name: str, problem: str) -> None:
    with pytest.raises(AdapterError, match=problem):
        store.create(name, DEFAULT_MODEL)
    assert store.list() == []


def test_a_name_is_taken_once(store: AdapterStore) -> None:
    def create(_: int) -> bool:
        try:
            AdapterStore(store.folder).create("one", DEFAULT_MODEL)
        except AdapterError as error:
            assert "already" in str(error)  # noqa: PT017
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(8))) == 1
    assert len(store.list()) == 1


def test_a_description_is_bounded(store: AdapterStore) -> None:
    with pytest.raises(AdapterError, match="at most 1024"):
        store.create("one", DEFAULT_MODEL, "x" * 1025)


@pytest.mark.parametrize("file_name", ["../../evil", "adapter_model.bin", "adapter.json", ".adapter_config.json.part"])
def test_only_the_two_names(store: AdapterStore, file_name: str) -> None:
    made = store.create("one", DEFAULT_MODEL)
    with pytest.raises(AdapterError, match=r"must be adapter_config\.json or"):
        store.put_asset(made, file_name, [b"x"])


def test_an_id_is_no_path(store: AdapterStore) -> None:
    made = store.create("one", DEFAULT_MODEL)
    with pytest.raises(AdapterError, match="UUID"):
        store.put_asset(replace(made, id="../.."), CONFIG_FILE, [b"x"])


def test_an_asset_is_not_written_again(store: AdapterStore) -> None:
    made = store.create("one", DEFAULT_MODEL)
    store.put_asset(made, CONFIG_FILE, [b"first"])
    with pytest.raises(AdapterError, match="cannot be replaced"):
        store.put_asset(made, CONFIG_FILE, [b"second"])
    assert (store.path(made) / CONFIG_FILE).read_bytes() == b"first"


def test_an_asset_too_large_leaves_nothing(store: AdapterStore) -> None:
    made = store.create("one", DEFAULT_MODEL)
    with pytest.raises(AdapterError, match="may have 1000000 bytes"):
        store.put_asset(made, CONFIG_FILE, [b"x" * ASSET_LIMITS[CONFIG_FILE], b"x"])
    assert store.missing_files(made) == ASSETS
    assert hidden(store) == []


def test_an_upload_that_breaks_off_leaves_nothing(store: AdapterStore) -> None:
    made = store.create("one", DEFAULT_MODEL)

    def chunks() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError("the client has gone")

    with pytest.raises(ConnectionResetError):
        store.put_asset(made, WEIGHTS_FILE, chunks())
    assert hidden(store) == []
    store.put_asset(made, WEIGHTS_FILE, [b"whole"])


def test_one_upload_of_a_file_at_a_time(store: AdapterStore) -> None:
    made = store.create("one", DEFAULT_MODEL)
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Iterator[bytes]:
        yield b"first"
        begun.set()
        assert go_on.wait(PATIENCE)

    with ThreadPoolExecutor() as pool:
        upload = pool.submit(store.put_asset, made, CONFIG_FILE, slow())
        assert begun.wait(PATIENCE)
        with pytest.raises(AdapterError, match="being uploaded already"):
            AdapterStore(store.folder).put_asset(made, CONFIG_FILE, [b"second"])
        store.put_asset(made, WEIGHTS_FILE, [b"the other file"])
        assert store.missing_files(made) == (CONFIG_FILE,), "half a file does not show"
        go_on.set()
        upload.result(PATIENCE)
    assert (store.path(made) / CONFIG_FILE).read_bytes() == b"first"


def test_removing_ends_an_upload(store: AdapterStore) -> None:
    made = store.create("one", DEFAULT_MODEL)

    def chunks() -> Iterator[bytes]:
        yield b"first"
        store.remove("one")
        yield b"second"

    with pytest.raises(AdapterError, match="removed meanwhile"):
        store.put_asset(made, CONFIG_FILE, chunks())
    assert store.list() == []
    assert [path.name for path in store.folder.iterdir()] == [".lock"]


def test_remove(store: AdapterStore) -> None:
    one, two = store.create("one", DEFAULT_MODEL), store.create("two", DEFAULT_MODEL)
    assert store.remove(one.id) == one
    assert store.list() == [two]
    with pytest.raises(AdapterError, match=r"no adapter 'one' .* there are: two"):
        store.remove("one")


ADDING = """
import os, pathlib, sys
from mistral_nb.finetunes.store import AdapterStore
try:
    AdapterStore(pathlib.Path(sys.argv[1])).add(pathlib.Path(sys.argv[2]), "one", "mine")
except KeyboardInterrupt:
    os._exit(9)
"""

KILLED = """
import os, pathlib, sys
from mistral_nb.finetunes.store import AdapterStore
store = AdapterStore(pathlib.Path(sys.argv[1]))
def chunks():
    yield b"half"
    os._exit(9)
store.put_asset(store.find("one"), "adapter_config.json", chunks())
"""


def test_a_killed_upload_is_in_nobodys_way(store: AdapterStore) -> None:
    made = store.create("one", DEFAULT_MODEL)
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.folder)], check=False)
    assert done.returncode == 9
    assert hidden(store) == [f".{CONFIG_FILE}.part"]
    assert store.missing_files(made) == ASSETS
    store.put_asset(made, CONFIG_FILE, [b"whole"])
    assert (store.path(made) / CONFIG_FILE).read_bytes() == b"whole"
    (store.folder / ".removed-x").mkdir()
    store.create("two", DEFAULT_MODEL)
    assert hidden(store) == []


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b'{"id": "other", "name": "x"}', None])
def test_a_damaged_record_hides_itself_alone(store: AdapterStore, record: bytes | None) -> None:
    broken, whole = store.create("broken", DEFAULT_MODEL), store.create("whole", DEFAULT_MODEL)
    path = store.path(broken) / "adapter.json"
    path.unlink()
    if record is not None:
        path.write_bytes(record)
    assert store.list() == [whole]
    assert store.damaged() == [store.path(broken)]


def test_add_copies_both_files(store: AdapterStore, tmp_path: Path) -> None:
    for file_name in ASSETS:
        (tmp_path / file_name).write_bytes(file_name.encode() * 3)
    made = store.add(tmp_path, "one", DEFAULT_MODEL)
    for file_name in ASSETS:
        assert (store.path(made) / file_name).read_bytes() == file_name.encode() * 3
    assert json.loads((store.path(made) / "adapter.json").read_text())["name"] == "one"


def test_add_of_half_an_adapter_leaves_nothing(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b"{}")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
        store.add(tmp_path, "one", DEFAULT_MODEL)
    assert store.list() == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither named pipes nor SIGINT for one process")
def test_an_interrupted_add_leaves_nothing(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(b"{}")
    os.mkfifo(tmp_path / WEIGHTS_FILE)
    command = [sys.executable, "-c", ADDING, str(store.folder), str(tmp_path)]
    with subprocess.Popen(command) as process, (tmp_path / WEIGHTS_FILE).open("wb"):  # open waits until it is read
        (half,) = store.list()
        assert store.missing_files(half) == (WEIGHTS_FILE,)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 9
    assert [path.name for path in store.folder.iterdir()] == [".lock"]


def test_a_store_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapters").write_bytes(b"a file")
    with pytest.raises(AdapterError, match="set MISTRAL_NB_HOME"):
        AdapterStore(tmp_path / "adapters").create("one", DEFAULT_MODEL)
