"""Engine processes from outside: who is one, how it is, what a prompt becomes, and ending it, hung or not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mistral_nb import __version__, runtime
from mistral_nb.backends import Local
from mistral_nb.config import load_settings
from mistral_nb.engine_control import Child, call, check, ended, is_gone, kill, remember, status, stop
from mistral_nb.errors import EngineError, MistralError
from mistral_nb.models import EMBEDDED
from mistral_nb.runtime import EngineRecord
from mistral_nb.types import GenerationRequest
from tests.backends.scripted import PATIENCE, Peer, eventually, head
from tests.test_engine_process import SHORT, children, local, python, record, record_of, text_of


@pytest.fixture
def alone(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of one test's own, with no engine in them."""
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MISTRAL_NB_LOG_DIR", str(tmp_path / "log"))
    yield tmp_path
    stop(load_settings(), force=True)


def test_status_and_stop(alone: Path) -> None:
    list(local().stream(SHORT))
    engine = record()
    [found] = status(load_settings())
    assert found.record == engine
    assert found.health
    assert found.health.pid == engine.pid
    assert found.health.where == f"{found.health.device}, {found.health.precision}"
    assert re.fullmatch(
        r"CPU, [1-9]\d* threads, (int8|int4|bf16)|NVIDIA [\w -]+, (fp16|bf16|int8|int4)", found.health.where
    )
    assert engine.token not in repr(found)
    assert stop(load_settings(), "embedded") == [EMBEDDED]
    assert is_gone(engine)
    assert not runtime.process_alive(engine.pid), "not only its port is closed"
    assert status(load_settings()) == []
    assert stop(load_settings()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="an engine is known by its command line in /proc")
def test_an_engine_that_hangs_is_ended_and_never_taken_for_absent(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by `stop` without force; by the next question, and by `stop` with it."""
    monkeypatch.setattr("mistral_nb.engine_control._TERM_LIMIT", 0.5)
    list(local().stream(SHORT))
    hung = record()
    os.kill(hung.pid, signal.SIGSTOP)
    impatient = load_settings({"connect_timeout": 0.5})
    [seen] = status(impatient)
    assert (seen.record, seen.health) == (hung, None)
    with pytest.raises(EngineError, match=rf"{hung.pid}.*--force.*{hung.log}"):
        stop(impatient)
    assert runtime.process_alive(hung.pid)

    chunks = list(Local(impatient).stream(SHORT))
    assert "Replacing the engine" in [chunk.status for chunk in chunks]
    assert "Paris" in text_of(chunks)
    assert not runtime.process_alive(hung.pid)

    other = record()
    os.kill(other.pid, signal.SIGSTOP)
    [told] = stop(impatient, "embedded", force=True)
    assert told.startswith(EMBEDDED)
    assert "killed" in told
    assert not runtime.process_alive(other.pid)
    assert runtime.read_record(EMBEDDED) is None


def test_a_process_that_is_no_engine_is_never_ended(alone: Path) -> None:
    """Its number was an engine's once; nobody answers on that engine's port."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        runtime.write_record(record_of(other.pid))
        assert status(load_settings()) == []
        with pytest.raises(EngineError, match="no engine"):
            kill(record_of(other.pid))
        assert stop(load_settings(), force=True) == []
        assert other.poll() is None
        assert runtime.read_record(EMBEDDED) is None
        other.communicate(b"\n")


def test_a_child_that_ended_is_told_from_another_process_of_its_number(alone: Path) -> None:
    child = Child([sys.executable, "-c", "raise SystemExit(3)"])
    child.wait()
    remember(child, record_of(os.getpid()))
    assert is_gone(record_of(os.getpid()))
    assert ended(record_of(os.getpid())) == "exit status 3"
    later = replace(record_of(os.getpid()), started=1.0)
    assert ended(later) == ""
    assert sys.platform != "linux" or not is_gone(later)


def test_only_an_engine_that_takes_the_token_counts() -> None:
    silent = Peer(scripts=[["hold"]])
    rude = Peer(scripts=[[head("200 OK", "text/html") + b"<html>"]])
    stranger = Peer(scripts=[[head("200 OK", "application/json") + b'{"status": "fine"}']])
    base = EngineRecord(os.getpid(), silent.port, "t", EMBEDDED, __version__, runtime.PROTOCOL, "x.log", 0.0)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert check(base, timeout=0.2) is None
    assert check(replace(base, port=rude.port), timeout=5) is None
    assert check(replace(base, port=stranger.port), timeout=5) is None
    assert check(replace(base, pid=dead.pid, port=stranger.port), timeout=5) is None
    for peer in (silent, rude, stranger):
        peer.close()
    assert check(replace(base, port=rude.port), timeout=5) is None
    with pytest.raises(ValueError, match="not on this machine"):
        call(replace(base, host="192.0.2.1"), "GET", "/engine/health", timeout=0.2)
    assert check(replace(base, host="192.0.2.1"), timeout=0.2) is None


def test_a_dry_run_has_the_exact_tokens(alone: Path) -> None:
    shown: list[str] = []
    dry = local().tokenize(SHORT, shown.append)
    [last] = [chunk for chunk in local().stream(SHORT) if chunk.usage]
    assert last.usage
    assert len(dry.tokens) == last.usage.prompt_tokens
    assert "What is the capital of France?" in dry.prompt
    assert dry.context == 8192
    with pytest.raises(MistralError, match="surrogate"):
        local().tokenize(GenerationRequest(prompt="half \ud800"))


INTERRUPTED_DRY_RUN = """
    from mistral_nb.backends import Local
    from mistral_nb.config import load_settings
    from mistral_nb.types import GenerationRequest
    request = GenerationRequest(prompt="Hello")
    try:
        Local(load_settings()).tokenize(request, lambda status: print(status, flush=True))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(len(Local(load_settings()).tokenize(request).tokens) > 1)
"""


def test_a_dry_run_that_is_interrupted_leaves_no_second_engine(alone: Path) -> None:
    notebook = python(INTERRUPTED_DRY_RUN)
    assert notebook.stdout
    assert eventually(lambda: bool(children(notebook.pid)), 60)
    [engine] = children(notebook.pid)
    notebook.send_signal(signal.SIGINT)
    said = [line.strip() for line in notebook.stdout]
    notebook.stdout.close()
    assert notebook.wait(PATIENCE) == 0
    assert said[-2:] == ["interrupted", "True"]
    assert record().pid == engine
    assert runtime.log_path(EMBEDDED).read_text().count("loading from") == 1


def test_a_dry_run_ends_when_nobody_listens_to_it(alone: Path) -> None:
    class Gone(Exception): ...

    def say(status: str) -> None:
        raise Gone

    with runtime.start_lock(EMBEDDED), pytest.raises(Gone):
        local().tokenize(SHORT, say)
    assert eventually(lambda: "mistral-nb" not in {thread.name for thread in threading.enumerate()})
    assert runtime.read_record(EMBEDDED) is None
