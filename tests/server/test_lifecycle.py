"""From start to end: listening while it loads, ready, failed, idle, stopped, replaced."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mistral_nb import runtime
from mistral_nb.hardware import host_memory
from tests.engine.sparse_checkpoint import sparse_checkpoint
from tests.server.engines import DEADLINE, MODEL, Engines, EngineUnderTest, eventually, frames, run_path

SHORT = {"prompt": "Name three colours.", "temperature": 0, "max_tokens": 8}
LONG = {"prompt": "Write a very long story about a lighthouse.", "temperature": 0, "max_tokens": 4000, "stream": True}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`mistral-nb` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mistral_nb", *arguments], capture_output=True, text=True, timeout=DEADLINE
    )


def assert_ended(engine: EngineUnderTest, status: int, reason: str) -> None:
    """The process has ended, its record is gone, and its log says why."""
    assert engine.process.wait(DEADLINE) == status
    assert runtime.read_record(engine.record.model) is None
    assert reason in engine.log()


@pytest.fixture(scope="module")
def broken(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are none."""
    folder = tmp_path_factory.mktemp("checkpoint") / "broken model"
    folder.mkdir()
    for file in filter(Path.is_file, embedded.iterdir()):
        if file.suffix != ".safetensors" and file.name != "mistral_nb.json":
            shutil.copy(file, folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    return folder


@pytest.fixture(scope="module")
def failed(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineUnderTest]:
    """A managed process of the broken checkpoint; it stays for some seconds, while other tests run."""
    engines = Engines(tmp_path_factory.mktemp("failed-engine"))
    try:
        yield engines.start("--managed", "--idle-timeout", "600", model=str(broken))
    finally:
        engines.end()


def test_a_model_that_cannot_be_loaded(failed: EngineUnderTest, broken: Path) -> None:
    eventually(lambda: failed.health()["state"] == "failed", "the failure is told")
    error = failed.health()["error"]
    assert "safetensors" in error
    response = failed.post(SHORT, model=str(broken))
    assert response.status_code == 503
    (told,) = response.json()["errors"]
    assert told["code"] == 3043
    assert error in told["message"]
    assert failed.record.log in told["message"]
    assert error in failed.log()
    assert "Traceback" not in failed.log()
    assert failed.process.poll() is None, "it stays for a while to tell why"


def test_in_the_foreground_a_model_that_cannot_be_loaded_ends_it_at_once(engines: Engines, broken: Path) -> None:
    process = engines.spawn("--model", str(broken))
    shown, error = process.communicate(timeout=DEADLINE)
    assert (process.returncode, shown) == (1, "")
    loading, why = error.splitlines()
    assert "loading from" in loading
    assert why.startswith("the model could not be loaded: ")
    assert "safetensors" in why
    assert "Traceback" not in runtime.log_path(str(broken)).read_text()
    assert runtime.all_records() == []


def a_request_goes_away(engine: EngineUnderTest) -> str:
    """What the engine does by the time at which nothing is left of it."""
    body = json.dumps(SHORT).encode()
    impatient = engine.raw(f"POST {run_path()} HTTP/1.1\nContent-Length: {len(body)}", body)
    eventually(lambda: engine.health()["active"] == 1 or engine.health()["state"] == "ready", "the request has arrived")
    impatient.close()
    eventually(lambda: engine.health()["active"] == 0, "the request is gone")
    return str(engine.health()["state"])


def test_in_the_foreground(engines: Engines) -> None:
    """Requests wait for the model or go away; the terminal shows how to call it; Ctrl+C ends it, the second at once."""
    for _ in range(8):  # the model may be there before the request is gone, where this process was held up
        engine = engines.start()
        if a_request_goes_away(engine) == "loading":
            break
        engine.process.kill()
        engine.process.wait()
    else:
        raise AssertionError("no request went away while the model was loading")
    assert engine.post(SHORT).json()["success"], "a request that came early waits"
    assert engine.health()["state"] == "ready"

    eventually(lambda: len(engine.printed) == 6, "the terminal shows how to call it")
    shown = "".join(engine.printed)
    assert engine.record.token not in shown
    assert engine.record.log in shown
    link = next(word for word in engine.printed[4].split() if word.startswith(engine.record.base_url))
    logins = [httpx.get(link, timeout=DEADLINE, trust_env=False) for _ in range(2)]
    assert [(login.status_code, "set-cookie" in login.headers) for login in logins] == [(303, True), (303, False)]
    assert link.rpartition("=")[2] not in engine.log()
    if shutil.which("curl"):
        script = "".join(engine.printed[1:4]).replace('"stream"', '"max_tokens": 4, "stream"')
        said = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout
        assert said.endswith("data: [DONE]\n\n")

    second = command("serve", "--model", "embedded")
    assert second.returncode == 1
    assert f"process {engine.process.pid}" in second.stderr
    assert f"mistral-nb stop {MODEL}" in second.stderr
    assert second.stderr.count("\n") == 1

    state, row, *notes = command("status").stdout.splitlines()
    assert state.split()[:2] == ["MODEL", "STATE"]
    assert row.split()[:2] == [MODEL, "ready"]
    assert row.split()[-2:] == [str(engine.process.pid), engine.record.base_url]
    assert f"Log of {MODEL}: {engine.record.log}" in notes

    with engine.client.stream("POST", run_path(), json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        engine.process.send_signal(signal.SIGINT)
        eventually(lambda: engine.health()["state"] == "stopping", "the signal has arrived")
        assert next(line for line in lines if line).startswith('data: {"response"'), "the answer goes on"
        assert runtime.read_record(MODEL) is None, "nobody finds a process that is about to end"
        engine.process.send_signal(signal.SIGINT)
        *_, last = (line for line in lines if line)
    (error,) = json.loads(last.removeprefix("data: "))["errors"]
    assert error["code"] == 3043
    assert "stopped (signal SIGINT)" in error["message"]
    assert_ended(engine, 0, "stopping: signal SIGINT")


@pytest.mark.parametrize("grace", ["120", "0.5"])
def test_a_signal_leaves_running_answers_a_grace(engines: Engines, grace: str) -> None:
    """New requests are refused meanwhile."""
    engine = engines.start("--grace", grace)
    enough = grace != "0.5"
    with engine.client.stream("POST", run_path(), json={**LONG, "max_tokens": 500 if enough else 4000}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        engine.process.terminate()
        if enough:  # else it may be gone before it is asked
            eventually(lambda: engine.health()["state"] == "stopping", "the signal has arrived")
            refused = engine.post(SHORT)
            assert (refused.status_code, refused.json()["errors"][0]["code"]) == (503, 3043)
        *_, last = lines
    assert (last == "data: [DONE]") == enough
    assert "stopped (signal SIGTERM)" in last or enough
    assert_ended(engine, 0, "stopping: signal SIGTERM")


def test_stop_by_request(engines: Engines) -> None:
    """With force, in the middle of an answer. Before it, the signals of a terminal do not reach a managed process.

    The process before it was killed and left its record behind.
    """
    killed = engines.start("--managed")
    killed.process.kill()
    killed.process.wait()
    assert runtime.read_record(MODEL) == killed.record
    engine = engines.start("--managed")
    engine.ready()
    for number in (signal.SIGINT, signal.SIGHUP):
        engine.process.send_signal(number)
    with engine.client.stream("POST", run_path(), json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        refused = command("stop")
        assert refused.returncode == 1
        assert "answering 1 request" in refused.stderr
        assert command("stop", "--force", "embedded").stdout == f"Stopped {MODEL}.\n"
        assert runtime.read_record(MODEL) is None, "nobody finds a process that is about to end"
        assert any('"code":3043' in line for line in lines)
    assert_ended(engine, 0, "stopping: by request")
    assert engine.printed == []


@pytest.fixture(scope="module")
def large(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes some seconds to load: 10 GB of zeros that lie on no disk, 5 GB as int8."""
    memory = host_memory()
    if memory and memory.free < 8_000_000_000:
        pytest.skip(f"needs 8 GB of memory, and {memory.free / 1e9:.1f} GB are free")
    return sparse_checkpoint(tmp_path_factory.mktemp("checkpoint") / "large", embedded, layers=22)


def test_stop_while_it_loads(engines: Engines, large: Path) -> None:
    """The process tells how far it is, and does not wait for its loading thread; requests get an error."""
    engine = engines.start("--managed", "--context", "512", model=str(large))
    body = json.dumps(SHORT).encode()
    with engine.raw(f"POST {run_path(str(large))} HTTP/1.1\nContent-Length: {len(body)}", body) as waiting:
        eventually(lambda: engine.health()["active"] == 1, "the request has arrived")
        eventually(lambda: engine.health()["loaded"] > 0, "some of it is loaded")
        health = engine.health()
        assert health["state"] == "loading"
        assert health["loaded"] < health["to_load"] == pytest.approx(10e9, rel=0.1)
        engine.process.terminate()
        assert waiting.recv(65_536).startswith(b"HTTP/1.1 503 ")
    assert_ended(engine, 0, "stopping: signal SIGTERM")


def test_the_terminal_shows_how_far_it_is_above_what_it_says(engines: Engines, large: Path) -> None:
    pexpect: Any = pytest.importorskip("pexpect", reason="pexpect drives the terminal; it is not there on Windows")
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mistral_nb", "serve", "--context", "512", "--model", str(large)],
        env=os.environ | engines.env,
        dimensions=(24, 200),
        encoding="utf-8",
        timeout=DEADLINE,
    )
    child.expect(r"loading from [^\r]*\r\n")
    child.expect(r"\rLoading the model +[0-9]+%  [█░]{20}  [0-9.]+ of [0-9.]+ GB")
    child.sendintr()
    child.expect(r"\r\nstopping: signal SIGINT\r\n")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert "\n" not in child.before


def test_it_ends_when_idle_and_not_before(engines: Engines) -> None:
    """The answer takes several times the idle time."""
    engine = engines.start("--managed", "--idle-timeout", "0.5")
    assert frames(engine.post({**LONG, "max_tokens": 250}))[-1] == "[DONE]"
    assert_ended(engine, 0, "stopping: no request for 0.5 s")


def test_a_process_whose_record_was_replaced_ends(engines: Engines, broken: Path) -> None:
    """And leaves the other's record alone."""
    engine = engines.start("--managed", model=str(broken))
    eventually(lambda: engine.health()["state"] == "failed", "the failure is told")
    other = dataclasses.replace(engine.record, pid=os.getpid(), token="another")
    runtime.write_record(other)
    assert engine.process.wait(DEADLINE) == 1
    assert "its record" in engine.log()
    assert runtime.read_record(str(broken)) == other


def test_of_two_that_were_started_at_once_one_gives_way_while_it_loads(engines: Engines, large: Path) -> None:
    engine = engines.start("--managed", "--context", "512", model=str(large))
    other = dataclasses.replace(engine.record, pid=os.getpid(), token="another")
    runtime.write_record(other)
    assert engine.process.wait(DEADLINE) == 0
    assert "its record" in engine.log()
    assert "ready" not in engine.log()
    assert runtime.read_record(str(large)) == other


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "{port}"], "choose another --port"),
        (["--host", "no-such-host.invalid"], "--host no-such-host.invalid: no such address"),
    ],
)
def test_an_address_that_cannot_be_used(
    engine: EngineUnderTest, engines: Engines, arguments: list[str], expected: str
) -> None:
    filled = [argument.format(port=engine.record.port) for argument in arguments]
    process = engines.spawn(*filled)
    _, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert expected in error
    assert "Traceback" not in error
    assert runtime.read_record(MODEL) is None


def test_a_failed_process_ends_itself_after_a_while(failed: EngineUnderTest) -> None:
    """So that the next start tries again. It was started for the first test of this file."""
    assert failed.process.wait(DEADLINE) == 1
    assert "stopping: the model could not be loaded" in failed.log()
    assert list(Path(failed.record.log).parent.parent.glob("**/*.json")) == []
