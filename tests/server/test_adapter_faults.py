"""Adapters that fail over a real socket: by their names and the caller's fault, while loading as before it."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistral_nb.finetunes import AdapterStore
from mistral_nb.finetunes.adapter import WEIGHTS_FILE
from mistral_nb.server.adapters import Adapters
from mistral_nb.types import GenerationRequest
from tests.finetunes.adapters import EMBEDDED, matrices, write_adapter, write_random
from tests.server.engines import MODEL, EngineUnderTest, frames

ASK = {"prompt": "Name three colours.", "max_tokens": 12, "temperature": 0}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def store(engine: EngineUnderTest) -> AdapterStore:
    """The engine's own."""
    return AdapterStore(Path(engine.record.log).parent.parent / "home" / "adapters")


def kept(store: AdapterStore, folder: Path) -> str:
    """An adapter of the store, of the folder's name."""
    return store.add(folder, folder.name, MODEL).name


def errors_of(engine: EngineUnderTest, **body: Any) -> list[dict[str, Any]]:
    """How it is refused in one body, and as the last frame of a stream, or instead of it."""
    whole = engine.post({**ASK, **body})
    streamed = engine.post({**ASK, **body, "stream": True})
    assert whole.status_code == 400, whole.text
    last = json.loads(frames(streamed)[-1]) if streamed.status_code == 200 else streamed.json()
    found = [whole.json()["errors"][0], last["errors"][0]]
    assert [error["code"] for error in found] == [5006, 5006]
    return found


def broken(folder: Path, seed: int, value: float) -> Path:
    """An adapter one of whose numbers is `value`."""
    write_random(folder, seed, ALL[:3])
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<f", value))
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(
    engine: EngineUnderTest, store: AdapterStore, tmp_path: Path, value: float
) -> None:
    name = kept(store, broken(tmp_path / f"broken-{value}", 5, value))
    for error in errors_of(engine, lora=name):
        assert error["message"].startswith(f"lora = {name!r}: it cannot be read: ")
        assert "; train it again" in error["message"]


def test_a_scale_beyond_32_bits(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    shapes = matrices(("q_proj",), layers=30, features=EMBEDDED)
    config = {"target_modules": ["q_proj"], "lora_alpha": 1e300}
    name = kept(store, write_adapter(tmp_path / "loud", config, shapes))
    for error in errors_of(engine, lora=name):
        assert error["message"].startswith(f"lora = {name!r}: lora_alpha is 1e+300")


def test_numbers_that_break_down_at_a_scale(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    name = kept(store, write_random(tmp_path / "wild", 6, ALL, size=1e18))
    for error in errors_of(engine, lora=name, lora_scale=10):
        assert error["message"].startswith(f"lora = {name!r}: the model's numbers break down with it at 10")
        assert "lower lora_scale" in error["message"]
    assert engine.post(ASK).status_code == 200


def test_a_rank_over_the_slots(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    """By the name that it was asked for, and not by its folder's."""
    shapes = matrices(("q_proj",), rank=80, layers=30, features=EMBEDDED)
    name = kept(store, write_adapter(tmp_path / "wide", {"target_modules": ["q_proj"], "r": 80}, shapes))
    for error in errors_of(engine, lora=name):
        assert error["message"].startswith(f"lora = {name!r}: it has rank 80, and slots hold up to 64; start ")


def test_a_header_that_is_too_long_is_not_parsed(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    """Parsing holds up every other answer."""
    folder = write_random(tmp_path / "long", 7)
    header = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(20_000)}
    data = json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(data)) + data)
    for error in errors_of(engine, lora=kept(store, folder)):
        assert "has a header of" in error["message"]
        assert "far more than" in error["message"]


def named(store: AdapterStore, name: str) -> tuple[str, str]:
    found = Adapters(store).find(GenerationRequest(prompt="Hi", lora=name), paths=False)
    assert found is not None
    return found.key, found.looks


def test_other_files_of_the_same_size_and_date(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    """As an archive that was made reproducible leaves them, on an inode that is given out again."""
    adapter = store.add(write_random(tmp_path / "again", 8, ALL), "again", MODEL)
    folder, texts, seen = store.path(adapter), [], []
    for seed in (8, 9):
        other = write_random(tmp_path / str(seed), seed, ALL)
        for file in other.iterdir():
            (folder / file.name).unlink()
            shutil.copyfile(file, folder / file.name)
            os.utime(folder / file.name, (1e9, 1e9))
        seen.append(named(store, "again"))
        texts.append(engine.post({**ASK, "lora": "again"}).json()["result"]["response"])
    assert seen[0] != seen[1]
    assert texts[0] != texts[1]


def listed(engine: EngineUnderTest) -> set[str]:
    return {model["id"] for model in engine.client.get("/v1/models").json()["data"]}


def test_models_lists_the_adapters_that_fit(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    fits = kept(store, write_random(tmp_path / "fits", 10))
    kept(store, write_adapter(tmp_path / "mistral-sized"))
    store.create("half", MODEL)
    assert fits in listed(engine)
    assert listed(engine).isdisjoint({"mistral-sized", "half"})
    assert engine.client.get("/v1/models/mistral-sized").status_code == 404
    store.remove(fits)
    assert fits not in listed(engine)


def chat(engine: EngineUnderTest, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **fields}
    return engine.client.post("/v1/chat/completions", json=body)


def test_a_misspelt_adapter_is_told(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    kept(store, write_random(tmp_path / "tone-of-old", 11))
    for asked in ("tone-of-olde", "Tone-Of-Old"):
        told = chat(engine, asked).json()["error"]["message"]
        assert f"No such model {asked} (did you mean tone-of-old?)" in told
        assert "`mistral-nb lora list`" in told
        assert "--serve-as" not in told


def test_a_name_that_is_nearly_one(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    kept(store, write_random(tmp_path / "pirate", 14))
    refused = engine.post({**ASK, "lora": "pirat"})
    assert (refused.status_code, refused.json()["errors"][0]["code"]) == (404, 3037)
    assert "no finetune 'pirat' here (did you mean pirate?)" in refused.json()["errors"][0]["message"]


def test_an_adapter_in_two_fields(engine: EngineUnderTest, store: AdapterStore, tmp_path: Path) -> None:
    kept(store, write_random(tmp_path / "once", 12))
    kept(store, write_random(tmp_path / "twice", 13))
    assert chat(engine, "once", lora="once").status_code == 200
    refused = chat(engine, "once", lora="twice")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora")
    assert "model names the adapter once already" in refused.json()["error"]["message"]
