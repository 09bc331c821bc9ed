"""An adapter's folder in a request over a real socket: taken from who has read the engine's record, and nobody else."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistral_nb import runtime
from mistral_nb.backends import Local
from mistral_nb.checkpoints import adapter_files
from mistral_nb.config import load_settings
from mistral_nb.errors import InvalidRequest
from mistral_nb.finetunes import AdapterStore
from mistral_nb.finetunes.adapter import WEIGHTS_FILE
from mistral_nb.runtime import PROOF_HEADER
from mistral_nb.server.adapters import Adapters
from mistral_nb.server.edge import has_read_record
from mistral_nb.server.schemas import WireError
from mistral_nb.types import GenerationRequest
from tests.finetunes.adapters import write_adapter, write_random
from tests.server.engines import MODEL, EngineUnderTest, run_path

ASK = {"prompt": "Name three colours.", "max_tokens": 12, "temperature": 0}
ASK_HERE = GenerationRequest(prompt="Name three colours.", max_tokens=12, temperature=0)
PATHS = (run_path(), "/engine/tokenize")


@pytest.fixture(scope="module")
def tone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("folders") / "tone", 21)


@pytest.fixture
def backend(engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch) -> Local:
    """A notebook's, which finds the engine by its record."""
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(Path(engine.record.log).parent.parent / "run"))
    return Local(load_settings({}), MODEL)


def proven(engine: EngineUnderTest, lora: Path | str, path: str = PATHS[0], **fields: Any) -> httpx.Response:
    """Asked by one who has read the record."""
    body = {**ASK, "lora": str(lora), **fields}
    return engine.client.post(path, json=body, headers={PROOF_HEADER: engine.record.proof})


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["result"]["response"])


def error_of(response: httpx.Response) -> tuple[int, int, str]:
    (error,) = response.json()["errors"]
    return response.status_code, error["code"], error["message"]


def test_a_notebook_gives_a_folder_of_its_own(
    engine: EngineUnderTest, backend: Local, tone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tone.parent)
    base, by_path = text_of(engine.post(ASK)), text_of(proven(engine, tone))
    assert base != by_path
    assert "".join(chunk.text for chunk in backend.stream(ASK_HERE.with_(lora="./tone"))) == by_path
    assert backend.tokenize(ASK_HERE.with_(lora="./tone")).tokens == backend.tokenize(ASK_HERE).tokens


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {PROOF_HEADER: ""},
        {PROOF_HEADER: "guessed"},
        {PROOF_HEADER: "\xff"},
        {"Host": "localhost", "X-Forwarded-For": "127.0.0.1"},
    ],
)
def test_others_are_not_told_which_folders_there_are(
    engine: EngineUnderTest, tone: Path, headers: dict[str, str]
) -> None:
    """The token alone is handed on, and requests through a tunnel or a proxy come from this machine too."""
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    for path in PATHS:
        told = set()
        for lora in (str(tone), "/root", "/nobody/here", "./tone", "~/tone", "/" + "x" * 300):
            answer = engine.client.post(path, json={**ASK, "lora": lora}, headers=pairs)
            status, code, message = error_of(answer)
            assert (status, code) == (400, 5006)
            told.add(message.partition(": ")[2])
        assert len(told) == 1
        assert "add it with `mistral-nb lora add FOLDER --name NAME` there, and give the name" in told.pop()


def test_openais_interface_names_the_field(engine: EngineUnderTest, tone: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": MODEL, "max_tokens": 2, "lora": str(tone)}
    refused = engine.client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora")
    proof = {PROOF_HEADER: engine.record.proof}
    assert engine.client.post("/v1/chat/completions", json=body, headers=proof).status_code == 200


def test_the_token_is_no_proof(engine: EngineUnderTest, backend: Local, tone: Path) -> None:
    """Nor does an engine without a proof take any."""
    assert engine.record.proof not in (engine.record.token, "")
    assert engine.record.proof not in repr(engine.record)
    scope = {"type": "http", "headers": [(PROOF_HEADER.encode(), b"")]}
    assert not has_read_record(scope, "")
    assert not has_read_record({"type": "http", "headers": []}, "")
    path = runtime.record_path(MODEL)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 or sys.platform == "win32"
    kept = path.read_bytes()
    try:
        runtime.write_record(replace(engine.record, proof=""))
        with pytest.raises(InvalidRequest, match="a folder's path is for programs"):
            list(backend.stream(ASK_HERE.with_(lora=str(tone))))
    finally:
        path.write_bytes(kept)


def test_health_tells_the_last_part_of_a_path(engine: EngineUnderTest, tone: Path) -> None:
    body = {**ASK, "lora": str(tone), "max_tokens": 2000, "stream": True}
    proof = {PROOF_HEADER: engine.record.proof}
    with engine.client.stream("POST", run_path(), json=body, headers=proof) as response:
        lines = response.iter_lines()
        next(lines)
        assert engine.health()["adapters"] == ["tone"]
        lines.close()
    engine.idle()


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ("./tone", "give the whole path"),
        ("/nobody/here", "there is no folder '/nobody/here'"),
        ("/" + "x" * 300, "cannot be read (File name too long); let the engine's user read it, or add it to"),
        ("/" + "é" * 200, "cannot be read (File name too long)"),
        ("/a\0b", "there is no folder"),
    ],
)
def test_what_is_not_there_or_cannot_be_read(engine: EngineUnderTest, lora: str, told: str) -> None:
    for path in PATHS:
        status, code, message = error_of(proven(engine, lora, path))
        assert (status, code) == (404, 3037)
        assert told in message


def test_a_folder_that_lacks_a_file(engine: EngineUnderTest, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "half")
    (folder / WEIGHTS_FILE).unlink()
    status, code, message = error_of(proven(engine, folder))
    assert (status, code) == (400, 3039)
    assert f"lacks {WEIGHTS_FILE}; give the folder that PEFT's save_pretrained has written" in message


def test_one_of_another_model_is_refused_by_name(engine: EngineUnderTest, tmp_path: Path) -> None:
    for lora, config in ((tmp_path / "mistral", {}), (tmp_path / "dora", {"use_dora": True})):
        write_adapter(lora, config)
        for stream in (False, True):
            status, code, message = error_of(proven(engine, lora, stream=stream))
            assert (status, code) == (400, 5006)
            assert message.startswith(f"lora = '{str(lora)[:60]}"), "a long path is cut short"
    assert "DoRA" in message


def test_a_folder_that_was_written_again_is_another_adapter(engine: EngineUnderTest, tmp_path: Path) -> None:
    texts = [text_of(proven(engine, write_random(tmp_path / "trained", seed))) for seed in (3, 4)]
    assert texts[0] != texts[1]


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """An adapter in a folder that this user, who is not root meanwhile, may not enter."""
    folder = write_adapter(tmp_path / "private" / "tone")
    folder.parent.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.parent.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_folder_that_the_engine_may_not_enter(closed: Path, tmp_path: Path) -> None:
    with pytest.raises(WireError, match=r"cannot be read \(Permission denied\)") as caught:
        Adapters(AdapterStore(tmp_path / "store")).find(GenerationRequest(prompt="Hi", lora=str(closed)), paths=True)
    assert (caught.value.status, caught.value.code, caught.value.field) == (404, 3037, "lora")


def test_one_that_goes_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are there when they are looked for, and gone when they are measured."""
    store = AdapterStore(tmp_path / "store")
    kept = store.add(write_adapter(tmp_path / "tone"), "tone", "mine")
    measure = adapter_files.looks

    def late(folder: Path) -> str:
        store.remove(kept.id)
        return measure(folder)

    monkeypatch.setattr("mistral_nb.server.adapters.looks", late)
    with pytest.raises(WireError, match="was removed just now") as caught:
        Adapters(store).find(GenerationRequest(prompt="Hi", lora="tone"), paths=False)
    assert (caught.value.status, caught.value.code) == (404, 3037)
