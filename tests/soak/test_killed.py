"""An engine that is killed while it answers many, and started again: what each of its clients gets."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mistral_nb import runtime
from mistral_nb.answer import Answer
from mistral_nb.backends import Local
from mistral_nb.config import load_settings
from mistral_nb.engine_control import check, stop
from mistral_nb.errors import EngineCrashed, EngineStartError, MistralError
from mistral_nb.models import EMBEDDED
from mistral_nb.runtime import EngineRecord
from mistral_nb.types import GenerationRequest
from tests.server.engines import DEADLINE, Engines, eventually

PLACES = 8
"""In the engine's batch."""
LONG = GenerationRequest(prompt="Write a very long story about a lighthouse.", max_tokens=1500, temperature=0)
SHORT = GenerationRequest(prompt="What is the capital of France? Answer in one sentence.", max_tokens=12, temperature=0)


class Client(threading.Thread):
    """A notebook's cell: it reads an answer to its end."""

    def __init__(self, request: GenerationRequest) -> None:
        super().__init__(daemon=True)
        self.answer = Answer(Local(load_settings()), request)
        self.error: MistralError | None = None
        self.begun = threading.Event()
        self.start()

    def run(self) -> None:
        try:
            for chunk in self.answer:
                if chunk.text:
                    self.begun.set()
        except MistralError as error:
            self.error = error


@pytest.fixture
def engines(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engines]:
    """Folders of one test's own, with no engine in them."""
    engines = Engines(tmp_path)
    for name, value in engines.env.items():
        monkeypatch.setenv(name, value)
    try:
        yield engines
        stop(load_settings(), force=True)
    finally:
        engines.end()


def by_a_notebook(engines: Engines) -> None:
    """The first question starts it."""
    assert "Paris" in asked()


def by_somebody_else(engines: Engines) -> None:
    """`mistral-nb serve` in a terminal; the notebook finds it."""
    engines.start("--managed").ready()


def asked() -> str:
    return "".join(chunk.text for chunk in Local(load_settings()).stream(SHORT))


def record() -> EngineRecord:
    found = runtime.read_record(EMBEDDED)
    assert found
    return found


def under_load() -> tuple[list[Client], list[Client]]:
    """Clients that are in the middle of an answer, as many as there are places, and as many that wait for one."""
    streaming = [Client(LONG) for _ in range(PLACES)]
    assert all(client.begun.wait(DEADLINE) for client in streaming)
    waiting = [Client(SHORT) for _ in range(PLACES)]

    def all_there() -> bool:
        health = check(record(), DEADLINE)
        return health is not None and health.active == 2 * PLACES

    eventually(all_there, "everybody has asked")
    assert not any(client.begun.is_set() for client in waiting)
    return streaming, waiting


def kill() -> EngineRecord:
    killed = record()
    os.kill(killed.pid, signal.SIGKILL)
    return killed


def check_told(clients: list[Client], killed: EngineRecord, how: str) -> None:
    """Each was told what happened, where the log is and what to do, and keeps the text that it had."""
    for client in clients:
        client.join(3 * DEADLINE)
        assert isinstance(client.error, EngineCrashed), client.error
        told = str(client.error)
        assert told.startswith(f"the engine process ended in the middle of an answer{how}")
        assert f"Its log {killed.log} ends with" in told
        assert told.endswith("Ask again to start it anew")
        assert client.error.result
        assert client.error.result.finish_reason == "error"
    longest = max((client.answer.text for client in clients), key=len)
    assert all(client.answer.text and longest.startswith(client.answer.text) for client in clients)


@pytest.mark.parametrize(
    ("started", "how"), [(by_a_notebook, " (killed by SIGKILL)"), (by_somebody_else, "")], ids=["ours", "another's"]
)
def test_who_had_text_is_told_and_who_had_none_is_answered_by_the_next(
    engines: Engines, started: Callable[[Engines], None], how: str
) -> None:
    """All of those by one engine, which nobody has to ask for."""
    started(engines)
    streaming, waiting = under_load()
    killed = kill()
    check_told(streaming, killed, how)
    for client in waiting:
        client.join(3 * DEADLINE)
        assert client.error is None
        assert "Paris" in client.answer.text
    after = record()
    assert after.pid != killed.pid
    assert "Paris" in asked()
    assert record() == after
    assert Path(after.log).read_text(encoding="utf-8").count("loading from") == 2


def test_the_next_engine_is_killed_too_while_it_loads(engines: Engines) -> None:
    """Who waits for it is told so, or is answered by the one after it."""
    by_a_notebook(engines)
    streaming, waiting = under_load()
    killed = kill()

    def loading() -> bool:
        found = runtime.read_record(EMBEDDED)
        return found is not None and found.pid != killed.pid

    eventually(loading, "the next engine listens")
    kill()
    check_told(streaming, killed, " (killed by SIGKILL)")
    for client in waiting:
        client.join(3 * DEADLINE)
        if client.error is None:
            assert "Paris" in client.answer.text
        else:
            assert isinstance(client.error, EngineStartError), client.error
            assert "SIGKILL" in str(client.error)
    assert any(client.error for client in waiting)
    assert "Paris" in asked()
