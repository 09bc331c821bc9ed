"""The endpoints for LoRA adapters over a real socket: made, filled, listed, and named in a request."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.engines import DEADLINE, STAND_IN, EngineUnderTest

FINETUNES = "/client/v4/accounts/local/ai/finetunes"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def name() -> str:
    """One that no other test takes."""
    return f"tone-{uuid.uuid4().hex[:8]}"


def create(engine: EngineUnderTest, **body: Any) -> httpx.Response:
    return engine.client.post(FINETUNES, json={"model": STAND_IN, **body})


def upload(engine: EngineUnderTest, which: str, file_name: str, content: bytes = b"{}") -> httpx.Response:
    form = {"data": {"file_name": file_name}, "files": {"file": (file_name, content)}}
    return engine.client.post(f"{FINETUNES}/{which}/finetune-assets", **form)  # type: ignore[arg-type]


def error_of(response: httpx.Response) -> tuple[int, int, str]:
    (error,) = response.json()["errors"]
    return response.status_code, error["code"], error["message"]


def folder(engine: EngineUnderTest, made: dict[str, Any]) -> Path:
    """Where this engine keeps an adapter; its home is the folder beside that of its log."""
    return Path(engine.record.log).parent.parent / "home" / "adapters" / made["id"]


def test_an_adapter_from_its_name_to_a_request(engine: EngineUnderTest, name: str) -> None:
    body = create(engine, name=name, description="like a pirate ☠", public=False).json()
    made = body["result"]
    assert (body["success"], body["errors"], body["messages"]) == (True, [], [])
    assert uuid.UUID(made["id"])
    assert (made["name"], made["model"], made["description"], made["public"]) == (
        *(name, STAND_IN, "like a pirate ☠", False),
    )
    assert made in engine.client.get(FINETUNES).json()["result"]

    ask = {"prompt": "hello", "max_tokens": 1}
    status, code, message = error_of(engine.post({**ask, "lora": name}))
    assert (status, code) == (400, 3039)
    assert CONFIG in message
    assert WEIGHTS in message
    weights = bytes(range(256)) * 20_000
    assert upload(engine, name, CONFIG, b'{"r": 8}').json()["success"] is True
    assert WEIGHTS in error_of(engine.post({**ask, "lora": made["id"]}))[2]
    assert upload(engine, made["id"], WEIGHTS, weights).json()["success"] is True
    assert (folder(engine, made) / WEIGHTS).read_bytes() == weights
    assert (folder(engine, made) / CONFIG).read_bytes() == b'{"r": 8}'

    for lora in (name, made["id"]):
        status, code, message = error_of(engine.post({**ask, "lora": lora, "stream": True}))
        assert (status, code) == (400, 5006), "these files are no adapter"
        assert message.startswith(f"lora = {lora!r}: ")
        assert str(folder(engine, made).parent) not in message, "where the store is stays here"
    chat = {"model": name, "messages": [{"role": "user", "content": "hello"}]}
    refused = engine.client.post("/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora"), "a name for the model, as in vLLM"


def test_cloudflares_own_are_not_here(engine: EngineUnderTest) -> None:
    assert engine.client.get(f"{FINETUNES}/public").json()["result"] == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, "name"),
        ({"name": None}, "name"),
        ({"name": 7}, "must be a text"),
        ({"name": "../up"}, "name = '../up'"),
        ({"name": "ok", "model": ["m"]}, "model"),
        ({"name": "ok", "public": True}, "public"),
        ({"name": "ok", "rank": 8}, "holds only name, model, description and public"),
        ({"name": "ok", "description": "x" * 2000}, "description"),
    ],
)
def test_one_that_cannot_be_made(engine: EngineUnderTest, body: dict[str, Any], expected: str) -> None:
    status, code, message = error_of(create(engine, **body))
    assert (status, code) == (400, 5006)
    assert expected in message
    assert "ok" not in [each["name"] for each in engine.client.get(FINETUNES).json()["result"]]


def test_bodies_that_are_no_objects(engine: EngineUnderTest) -> None:
    for content in (b"", b"[]", b'"name"'):
        assert error_of(engine.client.post(FINETUNES, content=content))[:2] == (400, 5006)


def test_a_name_is_taken_once(engine: EngineUnderTest, name: str) -> None:
    assert create(engine, name=name).status_code == 200
    status, code, message = error_of(create(engine, name=name))
    assert (status, code) == (400, 5006)
    assert name in message


def test_a_file_is_uploaded_once_and_under_its_name(engine: EngineUnderTest, name: str) -> None:
    made = create(engine, name=name).json()["result"]
    assert error_of(upload(engine, "nobodys", CONFIG))[:2] == (404, 3037)
    for other in ("adapter_model.bin", "../adapter_config.json", ""):
        assert error_of(upload(engine, name, other))[:2] == (400, 5006)
    assert upload(engine, name, CONFIG).status_code == 200
    assert error_of(upload(engine, name, CONFIG, b"other"))[:2] == (400, 5006)
    assert (folder(engine, made) / CONFIG).read_bytes() == b"{}"


def test_a_disk_that_fails_is_not_the_requests_fault(engine: EngineUnderTest, name: str) -> None:
    made = create(engine, name=name).json()["result"]
    (folder(engine, made) / f".{CONFIG}.lock").mkdir()
    status, code, message = error_of(upload(engine, name, CONFIG))
    assert (status, code) == (507, 3043)
    assert "mend that" in message


@pytest.mark.parametrize(
    "sent",
    [
        {"json": {"file": "x", "file_name": CONFIG}},
        {"data": {"file_name": CONFIG, "file": "x"}},
        {"files": {"file": (CONFIG, b"{}")}},
        {"content": b"--b\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        {"content": b"{}", "headers": {"content-type": "multipart/form-data"}},
        {"files": [("file", (CONFIG, b"{}")), ("file", (WEIGHTS, b"{}"))], "data": {"file_name": CONFIG}},
    ],
    ids=["json", "no-file", "no-name", "broken", "no-boundary", "two-files"],
)
def test_forms_that_are_wrong(engine: EngineUnderTest, name: str, sent: dict[str, Any]) -> None:
    made = create(engine, name=name).json()["result"]
    response = engine.client.post(f"{FINETUNES}/{name}/finetune-assets", **sent)
    assert error_of(response)[:2] == (400, 5006)
    assert [path.name for path in folder(engine, made).iterdir() if path.name.startswith("adapter_")] == []


def test_an_upload_over_the_limit_is_refused_before_it_is_sent(engine: EngineUnderTest, name: str) -> None:
    create(engine, name=name)
    head = f"POST {FINETUNES}/{name}/finetune-assets HTTP/1.1\nContent-Length: 3000000000\nExpect: 100-continue"
    with engine.raw(f"{head}\nContent-Type: multipart/form-data; boundary=b") as connection:
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_cloudflares_own_curls(engine: EngineUnderTest, name: str, tmp_path: Path) -> None:
    """As in its documentation: the file comes before its name, and the header names no boundary."""
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    base, token = f"{engine.record.base_url}{FINETUNES}", f"Authorization: Bearer {engine.record.token}"

    def curl(*arguments: str) -> dict[str, Any]:
        command = ["curl", "--noproxy", "*", "-s", "-H", token, *arguments]
        answer: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, timeout=DEADLINE).stdout)
        return answer

    made = curl(base, "-H", "Content-Type: application/json", "-d", json.dumps({"model": STAND_IN, "name": name}))
    form = ["-F", f"file=@{tmp_path / WEIGHTS}", "-F", f"file_name={WEIGHTS}"]
    assert curl(f"{base}/{name}/finetune-assets", "-H", "Content-Type: multipart/form-data", *form)["success"] is True
    assert (folder(engine, made["result"]) / WEIGHTS).read_bytes() == b"weights"
    assert name in [each["name"] for each in curl(base)["result"]]


def test_other_methods(engine: EngineUnderTest) -> None:
    assert error_of(engine.client.delete(FINETUNES))[:2] == (405, 7001)
    assert error_of(engine.client.get(f"{FINETUNES}/x/finetune-assets"))[:2] == (405, 7001)
