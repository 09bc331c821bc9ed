"""Requests with an adapter over a real socket: by name, by id and as the model, with a scale, and those refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistral_nb.errors import AdapterError
from mistral_nb.finetunes import AdapterStore
from mistral_nb.finetunes.adapter import CONFIG_FILE
from mistral_nb.server.adapters import Adapters, Named
from mistral_nb.server.schemas import WireError
from mistral_nb.types import GenerationRequest
from tests.finetunes.adapters import write_adapter, write_random
from tests.server.engines import MODEL, EngineUnderTest, eventually, frames

ASK = {"prompt": "Name three colours.", "max_tokens": 12, "temperature": 0}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="session")
def tones(engine: EngineUnderTest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters in the engine's store, and where they came from."""
    home = Path(engine.record.log).parent.parent / "home"
    store, root = AdapterStore(home / "adapters"), tmp_path_factory.mktemp("tones")
    made = {
        "tone-a": write_random(root / "a", 1, ALL),
        "tone-b": write_random(root / "b", 2, ALL[:3]),
    }
    for name, folder in made.items():
        store.add(folder, name, MODEL)
    return made


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["result"]["response"])


def error_of(response: httpx.Response) -> tuple[int, int, str]:
    (error,) = response.json()["errors"]
    return response.status_code, error["code"], error["message"]


def test_an_adapter_has_an_id_and_a_name(engine: EngineUnderTest, tones: dict[str, Path]) -> None:
    listed = engine.client.get("/client/v4/accounts/local/ai/finetunes").json()["result"]
    ids = {each["name"]: each["id"] for each in listed}
    base = text_of(engine.post(ASK))
    texts = {name: text_of(engine.post({**ASK, "lora": name})) for name in tones}
    assert len({base, *texts.values()}) == 3
    for name in tones:
        assert text_of(engine.post({**ASK, "lora": ids[name]})) == texts[name]
    assert text_of(engine.post(ASK)) == base


def test_a_scale(engine: EngineUnderTest, tones: dict[str, Path]) -> None:
    texts = [text_of(engine.post({**ASK, "lora": "tone-a", "lora_scale": scale})) for scale in (0, 1, 3)]
    assert texts[0] == text_of(engine.post(ASK))
    assert texts[1] == text_of(engine.post({**ASK, "lora": "tone-a"}))
    assert len(set(texts)) == 3


def test_the_answer_and_the_log_name_the_adapter(engine: EngineUnderTest, tones: dict[str, Path]) -> None:
    assert engine.post({**ASK, "lora": "tone-a"}).json()["result"]["adapter"] == "tone-a"
    assert "adapter" not in engine.post(ASK).json()["result"]
    last = json.loads(frames(engine.post({**ASK, "lora": "tone-b", "stream": True}))[-2])
    assert (last["adapter"], last["finish_reason"]) == ("tone-b", "length")
    eventually(lambda: '"adapter": "tone-b"' in engine.log(), "the request is logged")


def test_the_engine_tells_which_adapters_are_in_use(engine: EngineUnderTest, tones: dict[str, Path]) -> None:
    body = {**ASK, "lora": "tone-b", "max_tokens": 2000, "stream": True}
    with engine.client.stream("POST", f"/client/v4/accounts/local/ai/run/{MODEL}", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert engine.health()["adapters"] == ["tone-b"]
        lines.close()
    eventually(lambda: engine.health()["adapters"] == [], "none is in use")


@pytest.mark.parametrize("stream", [False, True])
def test_an_adapter_is_a_model_on_openais_interface(
    engine: EngineUnderTest, tones: dict[str, Path], stream: bool
) -> None:
    chat = {"messages": [{"role": "user", "content": ASK["prompt"]}], "max_tokens": 12, "temperature": 0}
    asked = engine.client.post("/v1/chat/completions", json={**chat, "model": "tone-a", "stream": stream})
    if stream:
        chunks = [json.loads(frame) for frame in frames(asked)[:-1]]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        models = {chunk["model"] for chunk in chunks}
    else:
        text, models = asked.json()["choices"][0]["message"]["content"], {asked.json()["model"]}
    assert models == {"tone-a"}
    assert text == text_of(engine.post({**ASK, "lora": "tone-a"}))


def test_adapters_are_in_openais_list(engine: EngineUnderTest, tones: dict[str, Path]) -> None:
    listed = engine.client.get("/v1/models").json()["data"]
    assert {"tone-a", "tone-b"} <= {model["id"] for model in listed if model["parent"] == MODEL}
    one = engine.client.get("/v1/models/tone-a").json()
    assert (one["id"], one["root"], one["parent"]) == ("tone-a", MODEL, MODEL)


def test_one_that_is_not_there(engine: EngineUnderTest) -> None:
    for path in (f"/client/v4/accounts/local/ai/run/{MODEL}", "/engine/tokenize"):
        status, code, message = error_of(engine.client.post(path, json={**ASK, "lora": "tone-z"}))
        assert (status, code) == (404, 3037)
        assert message.startswith("no finetune 'tone-z' here")
        assert "; `mistral-nb lora list` shows those there are" in message


def find(adapters: Adapters, **fields: Any) -> Named | None:
    return adapters.find(GenerationRequest(prompt="Hi", **fields), paths=True)


def test_a_key_is_of_one_version_of_the_files(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store")
    folder, adapters = write_adapter(tmp_path / "tone"), Adapters(store)
    kept = store.add(folder, "tone", "mine")
    by_name, by_id = find(adapters, lora="tone"), find(adapters, lora=kept.id)
    assert by_name is not None
    assert by_id is not None
    assert (by_name.name, by_name.key, by_name.folder) == ("tone", by_id.key, store.path(kept))
    keys = {by_name.key}
    for _ in range(2):
        found = find(adapters, lora=str(folder))
        assert found is not None
        keys.add(found.key)
        os.utime(folder / CONFIG_FILE, ns=(1, 1))
    assert len(keys) == 3
    store.remove("tone")
    again = store.add(folder, "tone", "mine")
    assert again.id != kept.id
    renewed = find(adapters, lora="tone")
    assert renewed is not None
    assert renewed.key not in keys


def test_no_adapter_and_a_scale_of_none(tmp_path: Path) -> None:
    adapters = Adapters(AdapterStore(tmp_path))
    assert find(adapters) is None
    with pytest.raises(WireError, match="there is no adapter to weigh") as caught:
        find(adapters, lora_scale=0.5)
    assert (caught.value.status, caught.value.code, caught.value.field) == (400, 5006, "lora_scale")


def test_a_refusal_does_not_tell_where_the_store_is(tmp_path: Path) -> None:
    named = Named("tone", "k", tmp_path, "")
    assert str(named.refused(AdapterError(f"{tmp_path}: bias is set"))) == "lora = 'tone': bias is set"
    several = AdapterError(f"{tmp_path} has 2 problems", ("one", f"{tmp_path}/x is not whole"))
    assert str(named.refused(several)) == "lora = 'tone': one; x is not whole"
