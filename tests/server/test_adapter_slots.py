"""Adapters of requests at once over a real socket: each as alone, their rank, and files that go while one waits."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistral_nb.checkpoints.adapter_files import AdapterFiles, open_adapter
from mistral_nb.engine import Engine, adapters
from mistral_nb.engine.tokenizer import load_tokenizer
from mistral_nb.finetunes import AdapterStore
from mistral_nb.runtime import PROOF_HEADER
from mistral_nb.server.adapters import Named
from mistral_nb.server.generation import Model
from mistral_nb.types import GenerationRequest
from tests.checkpoints import tiny
from tests.finetunes.adapters import matrices, write_adapter, write_random
from tests.server.engines import MODEL, Engines, EngineUnderTest, eventually, frames, run_path, text_of

ASK = {"prompt": "Name three colours.", "max_tokens": 24, "temperature": 0}
SLOTS = 8


def opened(engine: EngineUnderTest, stack: ExitStack, body: dict[str, Any]) -> httpx.Response:
    """A stream whose headers have come: its request waits for the engine, or is under way there."""
    proof = {PROOF_HEADER: engine.record.proof}
    stream = engine.client.stream("POST", run_path(), json={**body, "stream": True}, headers=proof)
    return stack.enter_context(stream)


def in_use(engine: EngineUnderTest) -> tuple[int, list[str]]:
    """Of the cache, and of the adapters."""
    health = engine.health()
    return health["kv_used"], health["adapters"]


def test_several_at_once_say_what_each_says_alone(engine: EngineUnderTest, tmp_path: Path) -> None:
    seeds = {str(write_random(tmp_path / name, seed)): seed for name, seed in (("one", 31), ("two", 32))}
    bodies = [{**ASK, "lora": path, "lora_scale": scale} for path in seeds for scale in (0, 1, 2)]
    bodies += [ASK, {**ASK, "temperature": 0.8, "seed": 5}, {**ASK, "temperature": 0.8, "seed": 5, "lora": min(seeds)}]

    def answer(body: dict[str, Any]) -> str:
        with ExitStack() as stack:
            return text_of(opened(engine, stack, body))

    alone = [answer(body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        assert list(pool.map(answer, bodies)) == alone
    assert len(set(alone)) == 7, "scale 0 is the model without an adapter, of both"
    eventually(lambda: in_use(engine) == (0, []), "nothing is in use")


def test_files_that_go_while_a_request_waits_for_a_slot(engine: EngineUnderTest, tmp_path: Path) -> None:
    folders = [write_random(tmp_path / f"held-{number}", 40 + number) for number in range(SLOTS)]
    store = AdapterStore(Path(engine.record.log).parent.parent / "home" / "adapters")
    kept = store.add(write_random(tmp_path / "gone", 50), "gone", MODEL)
    with ExitStack() as waiting:
        with ExitStack() as running:
            for folder in folders:
                body = {**ASK, "lora": str(folder), "max_tokens": 2000}
                next(opened(engine, running, body).iter_raw())
            late = opened(engine, waiting, {**ASK, "lora": "gone"})
            shutil.rmtree(store.path(kept))
        (frame,) = frames(late)
    (error,) = json.loads(frame)["errors"]
    assert error["code"] == 5006
    assert error["message"].startswith("lora = 'gone': ")
    assert str(store.folder) not in error["message"]
    engine.idle()
    assert engine.post(ASK).status_code == 200


@pytest.fixture(scope="module")
def narrow(own_settings: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """A tiny model's engine, for adapters of a rank up to 16, which answers for tone-a too."""
    folder = tmp_path_factory.mktemp("narrow")
    engines = Engines(folder)
    engines.env["MISTRAL_NB_HOME"] = str(folder / "home")
    try:
        model = str(tiny.hugging_face(folder / "model"))
        named = ["--serve-as", "tone-a"]
        engine = engines.start("--precision", "fp32", "--lora-rank", "16", *named, model=model)
        engine.ready()
        yield engine
    finally:
        engines.end()


def fitting(folder: Path, rank: int = 8) -> Path:
    """An adapter of the tiny model."""
    features = {"dim": tiny.DIM, "q": tiny.Q, "kv": tiny.KV, "hidden": tiny.HIDDEN}
    return write_adapter(folder, {"r": rank}, matrices(rank=rank, layers=tiny.LAYERS, features=features))


@pytest.mark.parametrize(("rank", "status"), [(16, 200), (17, 400)])
def test_serve_takes_adapters_up_to_its_rank(narrow: EngineUnderTest, tmp_path: Path, rank: int, status: int) -> None:
    folder = fitting(tmp_path / "tone", rank)
    body = {"prompt": "fox", "max_tokens": 2, "lora": str(folder)}
    proof = {PROOF_HEADER: narrow.record.proof}
    answer = narrow.client.post(run_path(narrow.record.model), json=body, headers=proof)
    assert answer.status_code == status, answer.text
    assert (f"has rank {rank}, and slots hold up to 16" in answer.text) == (status == 400)


def test_an_adapter_of_a_name_that_the_engine_answers_to_is_not_listed(narrow: EngineUnderTest, tmp_path: Path) -> None:
    """Who asks for that name gets the model."""
    store = AdapterStore(Path(narrow.record.log).parent.parent / "home" / "adapters")
    for name in ("tone-a", "tone-b"):
        store.add(fitting(tmp_path / name), name, MODEL)
    listed = [model["id"] for model in narrow.client.get("/v1/models").json()["data"]]
    assert listed == [narrow.record.model, "tone-a", "tone-b"]


def test_files_are_read_beside_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it stands still, every answer does."""
    readers: list[threading.Thread] = []

    def noted(*asked: Any) -> AdapterFiles:
        readers.append(threading.current_thread())
        return open_adapter(*asked)

    monkeypatch.setattr(adapters, "open_adapter", noted)
    folder = tiny.hugging_face(tmp_path / "model")
    tone = Named("tone", "tone 1", fitting(tmp_path / "tone"), "")
    model = Model(Engine.load(folder, precision="fp32"), load_tokenizer(folder))

    async def asked() -> None:
        answer = await model.start(GenerationRequest(prompt="fox", max_tokens=2), adapter=tone)
        assert [piece async for piece in answer.pieces()][-1].adapter == "tone"

    try:
        asyncio.run(asked())
    finally:
        model.engine.close()
    assert readers
    assert threading.main_thread() not in readers
