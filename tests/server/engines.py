"""Engine processes for tests: start them, talk to them, end them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import pytest

from mistral_nb import models, runtime
from mistral_nb.runtime import EngineRecord

MODEL = models.EMBEDDED
STAND_IN = "@hf/mistral/mistral-7b-instruct-v0.2"
DEADLINE = 180.0


def eventually(condition: Callable[[], bool], what: str, deadline: float = DEADLINE) -> None:
    """Wait until another process or thread has made `condition` true."""
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"not within {deadline:g} s: {what}"
        time.sleep(0.01)


@dataclass
class EngineUnderTest:
    """An engine process that this test started, and how to talk to it."""

    process: subprocess.Popen[str]
    record: EngineRecord
    client: httpx.Client
    printed: list[str] = field(default_factory=list)

    def post(self, body: Any = None, *, model: str = MODEL, **options: Any) -> httpx.Response:
        """Ask; `body` as JSON, or raw through `content=`."""
        if body is not None:
            options["json"] = body
        return self.client.post(run_path(model), **options)

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get("/engine/health").json()
        return answer

    def ready(self) -> None:
        """Wait until the model is loaded."""

        def loaded() -> bool:
            health = self.health()
            assert health["state"] != "failed", health["error"]
            return bool(health["state"] == "ready")

        eventually(loaded, "the model is loaded")

    def idle(self) -> None:
        """Wait until nobody is being answered."""
        eventually(lambda: self.health()["active"] == 0, "the engine has nothing to do")

    def raw(self, head: str, body: bytes = b"") -> socket.socket:
        """A connection on which an HTTP/1.1 request was written by hand; `head` without host and authorization."""
        connection = socket.create_connection((self.record.host, self.record.port), timeout=DEADLINE)
        lines = [*head.splitlines(), f"Host: {self.record.host}", f"Authorization: Bearer {self.record.token}"]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        return connection

    def log(self) -> str:
        return Path(self.record.log).read_text(encoding="utf-8")


def free_port() -> int:
    """A port on which nobody listens, none of those that the system gives to whoever asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def run_path(model: str = MODEL) -> str:
    return f"/client/v4/accounts/local/ai/run/{model}"


def frames(response: httpx.Response) -> list[str]:
    """The data of every server-sent event, by lines; anything else in the stream fails."""
    lines = [line for line in response.read().decode().split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def text_of(response: httpx.Response) -> str:
    """The text of a streamed answer that ended well."""
    data = frames(response)
    assert data[-1] == "[DONE]"
    return "".join(json.loads(frame)["response"] for frame in data[:-1])


class Engines:
    """Starts engine processes and ends them all. Their runtime and log folders are below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.env = {"MISTRAL_NB_RUNTIME_DIR": str(folder / "run"), "MISTRAL_NB_LOG_DIR": str(folder / "log")}
        self._started: list[EngineUnderTest] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []

    def spawn(self, *arguments: str) -> subprocess.Popen[str]:
        """A process of `mistral-nb serve`, in a session of its own as a notebook starts it."""
        process = subprocess.Popen(
            [sys.executable, "-m", "mistral_nb", "serve", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | self.env,
        )
        self._processes.append(process)
        return process

    def start(self, *arguments: str, model: str = MODEL) -> EngineUnderTest:
        """An engine that listens; its model may still be loading."""
        process = self.spawn("--model", model, *arguments)
        record = self._record_of(process, models.canonical(model))
        client = httpx.Client(
            base_url=record.base_url,
            headers={"authorization": f"Bearer {record.token}"},
            timeout=DEADLINE,
            trust_env=False,
        )
        engine = EngineUnderTest(process, record, client)
        self._started.append(engine)
        assert process.stdout is not None
        self._readers.append(threading.Thread(target=_collect, args=(process.stdout, engine.printed), daemon=True))
        self._readers[-1].start()
        return engine

    def _record_of(self, process: subprocess.Popen[str], model: str) -> EngineRecord:
        found: list[EngineRecord] = []

        def listens() -> bool:
            assert process.poll() is None, process.communicate()
            record = runtime.read_record(model)
            found.extend([record] if record and record.pid == process.pid else [])
            return bool(found)

        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.env.items():
                patch.setenv(name, value)
            eventually(listens, "the engine process wrote its record")
        return found[0]

    def end(self) -> None:
        for engine in self._started:
            engine.client.close()
        for process in self._processes:
            process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(DEADLINE)
        for process in self._processes:
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _collect(stream: IO[str], lines: list[str]) -> None:
    lines.extend(stream)
