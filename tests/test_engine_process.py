"""Engine processes as their clients see them: real processes, the real model, and everything that can go wrong."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mistral_nb
from mistral_nb import __version__, runtime
from mistral_nb.answer import Answer
from mistral_nb.backends import Local, engine_process
from mistral_nb.backends.pump import Pump
from mistral_nb.config import load_settings
from mistral_nb.engine_control import check, is_gone, status, stop
from mistral_nb.errors import (
    ConfigurationError,
    EngineBusy,
    EngineCrashed,
    EngineStartError,
    InvalidRequest,
    MissingDependency,
    ModelError,
    StreamTruncated,
    UnknownModel,
)
from mistral_nb.hardware import nvidia_gpus
from mistral_nb.models import EMBEDDED
from mistral_nb.runtime import EngineRecord
from mistral_nb.types import Chunk, GenerationRequest, Usage
from tests.backends.scripted import PATIENCE, Peer, eventually, frame, head
from tests.engine.sparse_checkpoint import BYTES_A_LAYER, memory_to_exceed, sparse_checkpoint
from tests.finetunes.adapters import EMBEDDED as EMBEDDED_FEATURES
from tests.finetunes.adapters import matrices, write_adapter
from tests.server.engines import Engines

ROOT = Path(__file__).resolve().parent.parent
SHORT = GenerationRequest(prompt="What is the capital of France? Answer in one sentence.", max_tokens=12, temperature=0)
LONG = GenerationRequest(prompt="Write a very long story.", max_tokens=4000, temperature=0)


@pytest.fixture(scope="module", autouse=True)
def playground(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders of this module's own: its tests use the engine that is there, and leave one or none."""
    folder = tmp_path_factory.mktemp("playground")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MISTRAL_NB_RUNTIME_DIR", str(folder))
        patch.setenv("MISTRAL_NB_LOG_DIR", str(folder))
        yield folder
        stop(load_settings(), force=True)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folders of one test's own, with no engine in them."""
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MISTRAL_NB_LOG_DIR", str(tmp_path / "log"))
    yield tmp_path
    stop(load_settings(), force=True)


def local(**settings: Any) -> Local:
    return Local(load_settings(settings))


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def record() -> EngineRecord:
    found = runtime.read_record(EMBEDDED)
    assert found
    return found


def until(stream: Pump, wanted: str) -> None:
    """Read up to a status, or up to the first text for "text"."""
    for chunk in stream:
        if chunk.status.startswith(wanted) or (wanted == "text" and chunk.text):
            return
    raise AssertionError(f"{wanted!r} did not come")


def close_while_blocked(stream: Pump) -> None:
    """Close from here while another thread reads on, which then has the last chunk, a cancelled one."""
    ended: list[list[Chunk]] = []
    reader = threading.Thread(target=lambda: ended.append(list(stream)))
    reader.start()
    stream.close()
    reader.join(PATIENCE)
    assert ended[0][-1] == Chunk(finish_reason="cancelled")


@pytest.mark.skipif(os.name != "posix", reason="lets a process stand still")
def test_closing_while_the_engine_starts_and_while_it_loads_leaves_one_engine(alone: Path) -> None:
    """Closing does not wait for the engine, which stands still."""
    stream = local().stream(SHORT)
    until(stream, "Starting the engine")
    close_while_blocked(stream)
    stream = local().stream(SHORT)
    until(stream, "Loading the model")
    first = record().pid
    os.kill(first, signal.SIGSTOP)
    try:
        close_while_blocked(stream)
    finally:
        os.kill(first, signal.SIGCONT)
    chunks = list(local().stream(SHORT))
    assert "Paris" in text_of(chunks)
    assert record().pid == first
    [engine] = status(load_settings())
    assert engine.health
    assert (engine.health.state, engine.health.active) == ("ready", 0)


def test_an_engine_that_is_killed_in_the_middle_is_told_and_the_next_answer_comes() -> None:
    answer = Answer(local(), LONG)
    assert next(text for text in answer if text.text)
    os.kill(record().pid, signal.SIGKILL)
    with pytest.raises(EngineCrashed) as caught:
        collections.deque(answer, maxlen=0)
    assert caught.value.result
    assert caught.value.result.text
    assert caught.value.result.finish_reason == "error"
    assert "SIGKILL" in str(caught.value)
    assert str(runtime.log_path(EMBEDDED)) in str(caught.value)
    assert "ready after" in str(caught.value)
    assert list(answer) == []
    assert "Paris" in text_of(list(local().stream(SHORT)))


def test_an_engine_that_is_killed_while_it_loads_is_told() -> None:
    stop(load_settings(), force=True)
    stream = local().stream(SHORT)
    until(stream, "Loading the model")
    os.kill(record().pid, signal.SIGKILL)
    with pytest.raises(EngineStartError, match="SIGKILL"):
        list(stream)


def test_a_record_whose_port_somebody_else_took_is_replaced_and_the_user_sees_what_goes_on() -> None:
    stop(load_settings(), force=True)
    other = Peer(scripts=[[head("401 Unauthorized", "application/json") + b"{}"]])
    stale = EngineRecord(os.getpid(), other.port, "old", EMBEDDED, __version__, runtime.PROTOCOL, "old.log", 0.0)
    runtime.write_record(stale)
    chunks = list(local().stream(SHORT))
    shown = [chunk.status or "text" for chunk in chunks[:-1]]
    assert shown[:2] == ["Starting the engine", "Loading the model"]
    assert all(status.startswith("Loading the model  ") and "%" in status for status in shown[2 : shown.index("text")])
    assert set(shown[shown.index("text") :]) == {"text"}
    assert "Paris" in text_of(chunks)
    assert record().port != other.port
    assert [chunk.status for chunk in local().stream(SHORT) if chunk.status] == []
    other.close()


def test_an_engine_that_ends_after_it_was_found_is_started_again() -> None:
    stop(load_settings(), force=True)
    going = Peer()
    health = {"protocol": runtime.PROTOCOL, "version": __version__, "state": "ready", "model": EMBEDDED}
    answer = head("200 OK", "application/json") + json.dumps(health).encode()
    going.scripts = [[answer], [going.stop_listening, answer]]
    found = EngineRecord(os.getpid(), going.port, "t", EMBEDDED, __version__, runtime.PROTOCOL, "x.log", 0.0)
    runtime.write_record(found)
    stream = local().stream(SHORT)
    until(stream, "Loading the model")
    stream.close()
    assert [seen.line.split()[1] for seen in going.seen] == ["/engine/health", "/engine/health"]
    assert record().pid != os.getpid()
    going.close()


@pytest.mark.parametrize("how", ["it says that it is stopping", "reset", "close"])
def test_an_engine_that_ends_before_the_first_text_is_started_again(how: str) -> None:
    """Found while it was still there, it was idle too long when the question came."""
    stop(load_settings(), force=True)
    going = Peer()
    ready = {"protocol": runtime.PROTOCOL, "version": __version__, "state": "ready", "model": EMBEDDED}
    healthy = head("200 OK", "application/json") + json.dumps(ready).encode()
    stopping = head("200 OK", "application/json") + json.dumps({**ready, "state": "stopping"}).encode()
    errors = {"errors": [{"message": "the engine was stopped", "code": 3043}], "success": False}
    refusal = head("503 Unavailable", "application/json") + json.dumps(errors).encode()
    ends: dict[str, list[Any]] = {
        "it says that it is stopping": [[refusal], [going.stop_listening, stopping]],
        "reset": [[going.stop_listening, "reset"]],
        "close": [[going.stop_listening, head()]],
    }
    going.scripts = [[healthy], [healthy], *ends[how]]
    runtime.write_record(replace(record_of(os.getpid()), port=going.port))
    chunks = list(local().stream(SHORT))
    assert [seen.line.split()[0] for seen in going.seen][:3] == ["GET", "GET", "POST"]
    assert "Paris" in text_of(chunks)
    assert record().pid != os.getpid()
    going.close()


def test_an_answer_that_breaks_off_while_the_engine_lives_is_cut_short_and_tells_what_it_cost() -> None:
    stop(load_settings(), force=True)
    ready = {"protocol": runtime.PROTOCOL, "version": __version__, "state": "ready", "model": EMBEDDED}
    healthy = head("200 OK", "application/json") + json.dumps(ready).encode()
    said = {"response": "Hel", "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    living = Peer(scripts=[[healthy], [healthy], [head(), frame(said)]])
    found = replace(record_of(os.getpid()), port=living.port)
    runtime.write_record(found)
    answer = Answer(local(), SHORT)
    with pytest.raises(StreamTruncated):
        collections.deque(answer, maxlen=0)
    result = answer.result
    assert (result.text, result.finish_reason, result.usage) == ("Hel", "truncated", Usage(3, 1))
    runtime.remove_record(found)
    living.close()


OLD_VERSION = """
import sys
import mistral_nb
mistral_nb.__version__ = "0.0.1"
from mistral_nb.cli import main
sys.exit(main(["serve", "--managed", "--model", "embedded"]))
"""


@pytest.fixture
def old_engine(alone: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of an engine that says it is of another version."""
    path = os.pathsep.join(str(root) for root in (ROOT, ROOT / "kernels"))
    runtime.log_path(EMBEDDED)
    process = subprocess.Popen([sys.executable, "-c", OLD_VERSION], env={**os.environ, "PYTHONPATH": path})
    try:
        assert eventually(lambda: runtime.read_record(EMBEDDED) is not None)
        yield process
    finally:
        process.kill()
        process.wait()


def test_an_idle_engine_of_another_version_is_replaced(old_engine: subprocess.Popen[bytes]) -> None:
    assert record().version == "0.0.1"
    stream = local().stream(SHORT)
    until(stream, "Replacing the engine")
    until(stream, "Loading the model")
    stream.close()
    assert record().version == __version__
    assert old_engine.wait(PATIENCE) == 0


def test_a_busy_engine_of_another_version_is_left_alone(old_engine: subprocess.Popen[bytes]) -> None:
    asker = threading.Thread(target=ask_over_the_wire, args=(record(),))
    asker.start()
    assert eventually(lambda: bool((health := check(record(), 5)) and health.active))
    with pytest.raises(EngineBusy, match=r"0\.0\.1") as caught:
        list(local().stream(SHORT))
    assert "--force" in str(caught.value)
    assert old_engine.poll() is None
    with pytest.raises(EngineBusy):
        stop(load_settings())
    assert stop(load_settings(), "embedded", force=True) == [EMBEDDED]
    assert is_gone(record_of(old_engine.pid))
    asker.join(PATIENCE)


def record_of(pid: int) -> EngineRecord:
    return EngineRecord(pid, 1, "t", EMBEDDED, __version__, runtime.PROTOCOL, "x.log", 0.0)


def ask_over_the_wire(engine: EngineRecord) -> None:
    """A request that another client has under way; how it ends is not this one's business."""
    connection = http.client.HTTPConnection(engine.host, engine.port, timeout=300)
    body = json.dumps({"prompt": "Write a very long story.", "max_tokens": 4000, "temperature": 0, "stream": True})
    connection.request(
        "POST", f"/client/v4/accounts/a/ai/run/{EMBEDDED}", body, {"Authorization": f"Bearer {engine.token}"}
    )
    connection.getresponse().read()
    connection.close()


NAME = "@hf/mistral/mistral-7b-instruct-v0.2"


def test_a_running_engine_answers_for_the_names_that_it_was_given(alone: Path) -> None:
    """And says what it is. Without it nobody does."""
    engines = Engines(alone)
    try:
        engines.start("--managed", "--serve-as", NAME)
        backend = Local(load_settings(), NAME.upper())
        result = mistral_nb.ask("What is the capital of France?", backend="local", model=NAME, max_tokens=8)
        assert (result.model, result.served_by.stand_in_for) == ("SmolLM2 135M Instruct", NAME)
        assert f"SmolLM2 135M Instruct (stand-in for {NAME})" in result.footer
        by_its_own = mistral_nb.ask("What is the capital of France?", backend="local", max_tokens=2)
        assert by_its_own.served_by.stand_in_for == "Mistral-7B-Instruct"
        assert len(backend.tokenize(SHORT).tokens) > 5
    finally:
        engines.end()
    with pytest.raises(UnknownModel):
        mistral_nb.ask("Hi", backend="local", model=NAME)
    with pytest.raises(UnknownModel, match=f"serve --model embedded --serve-as {NAME.upper()}"):
        list(backend.stream(SHORT))
    assert runtime.read_record(EMBEDDED) is None or is_gone(record())


def test_nothing_is_started_for_one_who_hung_up_while_waiting_for_the_lock(alone: Path) -> None:
    before = set(children(os.getpid()))
    with runtime.start_lock(EMBEDDED):
        stream = local().stream(SHORT)
        until(stream, "Starting the engine")
        stream.close()
    assert eventually(lambda: "mistral-nb" not in {thread.name for thread in threading.enumerate()})
    assert set(children(os.getpid())) <= before
    assert runtime.read_record(EMBEDDED) is None


def broken_python(folder: Path) -> str:
    """A folder for PYTHONPATH that makes every Python process end as it starts."""
    (folder / "sitecustomize.py").write_text("raise SystemExit('this environment is broken')\n")
    return str(folder)


def test_a_process_that_ends_before_it_listens_is_told_with_its_log(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", broken_python(alone))
    with pytest.raises(EngineStartError) as caught:
        list(local().stream(SHORT))
    assert "exit status 1" in str(caught.value)
    assert "this environment is broken" in str(caught.value)
    assert str(alone / "log") in str(caught.value)


def test_a_model_that_cannot_be_loaded_is_told_with_its_log(alone: Path) -> None:
    folder = alone / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text('{"model_type": "llama"}')
    with pytest.raises(EngineStartError, match=rf"could not load {folder}: {folder}.* Its log: {alone}/log") as caught:
        list(Local(load_settings(), str(folder)).stream(SHORT))
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_told_with_what_would(alone: Path, embedded: Path) -> None:
    folder = sparse_checkpoint(alone / "model", embedded, layers=memory_to_exceed() // BYTES_A_LAYER + 1)
    with pytest.raises(EngineStartError, match="what fits: --precision int8 --context") as caught:
        list(Local(load_settings({"precision": "bf16"}), str(folder)).stream(SHORT))
    assert "the settings precision and context" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_of_serve_that_would_fit_are_told_as_settings() -> None:
    told = engine_process._load_failure("model", "what fits: --device cpu --precision int8 --context 512 (1 GB)", "log")
    assert ". In a notebook these are the settings device, precision and context. Its log" in told
    assert "In a notebook" not in engine_process._load_failure("model", "it is broken", "log")


@pytest.mark.skipif(nvidia_gpus() > 0, reason="asks for a GPU where there is none")
def test_the_device_is_the_engines(alone: Path) -> None:
    with pytest.raises(EngineStartError, match="device cuda was asked for, and torch sees no NVIDIA GPU; use cpu or"):
        list(local(device="cuda").stream(SHORT))


def test_precision_context_and_rank_are_the_engines(alone: Path) -> None:
    """An engine that runs already keeps its own."""
    list(local(precision="fp32", context=512, lora_rank=16).stream(SHORT))
    shapes = matrices(rank=17, layers=30, features=EMBEDDED_FEATURES)
    wide = SHORT.with_(lora=str(write_adapter(alone / "wide", {"r": 17}, shapes)))
    with pytest.raises(InvalidRequest, match="has rank 17, and slots hold up to 16"):
        list(local(lora_rank=64).stream(wide))
    list(local(precision="int8", context=1024).stream(SHORT))
    [engine] = status(load_settings())
    assert engine.health
    assert (engine.health.precision, engine.health.context) == ("fp32", 512)


def test_a_log_folder_that_cannot_be_written_stops_everything_before(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = alone / "file"
    taken.write_text("")
    monkeypatch.setenv("MISTRAL_NB_HOME", str(alone / "store"))
    with monkeypatch.context() as patch:
        patch.setenv("MISTRAL_NB_LOG_DIR", str(taken))
        with pytest.raises(ConfigurationError, match="MISTRAL_NB_LOG_DIR") as caught:
            list(local().stream(SHORT))
    assert str(taken) in str(caught.value)
    assert runtime.read_record(EMBEDDED) is None
    assert not (alone / "store").exists()


def test_without_torch_the_command_to_install_it_is_told(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python takes for a module that is not there
    with pytest.raises(MissingDependency) as caught:
        list(local().stream(SHORT))
    assert 'pip install "mistral-nb[local]"' in str(caught.value)


def test_only_the_embedded_model_is_pulled_on_its_own(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(alone))
    with pytest.raises(ModelError, match="not in the store"):
        list(Local(load_settings(), "mistral-7b-instruct-v0.2").stream(SHORT))


def test_closing_while_the_model_is_pulled_leaves_nothing(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = Peer()
    monkeypatch.setenv("MISTRAL_NB_HOME", str(alone / "home"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.port}/simple")
    monkeypatch.setenv("PIP_TIMEOUT", "600")  # it gives up by itself later than a test does
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", "t0ken-for-nobody-else")
    stream = local().stream(SHORT)
    until(stream, "Pulling the embedded model: Downloading")
    assert index.asked.wait(PATIENCE)
    seen = [Path(f"/proc/{pid}/environ").read_bytes() for pid in children(os.getpid())]
    assert any(b"PIP_INDEX_URL" in environment for environment in seen)
    assert not any(b"t0ken-for-nobody-else" in environment for environment in seen)
    close_while_blocked(stream)
    assert index.gone.wait(PATIENCE)
    assert eventually(lambda: list((alone / "home" / "models").glob(".staging*")) == [])
    assert runtime.read_record(EMBEDDED) is None
    index.close()


def python(script: str, **options: Any) -> subprocess.Popen[str]:
    path = os.pathsep.join(str(root) for root in (ROOT, ROOT / "kernels"))
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}, **options
    )


def test_two_notebooks_that_start_at_once_share_one_engine(alone: Path) -> None:
    script = """
        import mistral_nb
        from mistral_nb import runtime
        question = "What is the capital of France? Answer in one sentence."
        answer = mistral_nb.ask(question, backend="local", temperature=0)
        print(runtime.read_record("smollm2-135m-instruct").pid, "Paris" in answer.text)
    """
    both = [python(script) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in both]
    assert said[0] == said[1] == [str(record().pid), "True"]
    log = runtime.log_path(EMBEDDED).read_text()
    assert log.count("loading from") == 1


INTERRUPTED = """
    import mistral_nb
    answer = mistral_nb.stream("Write a very long story.", backend="local", max_tokens=4000, temperature=0)
    try:
        for chunk in answer:
            print(chunk.status or "text", flush=True)
    except KeyboardInterrupt:
        answer.close()
    print(answer.result.finish_reason)
    if answer.text:
        after = mistral_nb.ask("What is the capital of France? Answer in one sentence.", backend="local", temperature=0)
        print("Paris" in after.text)
"""


@pytest.mark.parametrize("moment", ["Starting the engine", "Loading the model", "text"])
def test_the_engine_survives_an_interrupt_of_the_notebooks_process_group(alone: Path, moment: str) -> None:
    notebook = python(INTERRUPTED, start_new_session=True)
    assert notebook.stdout
    while notebook.stdout.readline().strip() != moment:
        assert notebook.poll() is None
    assert eventually(lambda: bool(children(notebook.pid)))
    [engine] = children(notebook.pid)
    os.killpg(notebook.pid, signal.SIGINT)
    said = [line.strip() for line in notebook.stdout]
    notebook.stdout.close()
    assert notebook.wait(PATIENCE) == 0
    assert said[said.index("cancelled") :] == ["cancelled", *(["True"] if moment == "text" else [])]
    assert eventually(lambda: runtime.read_record(EMBEDDED) is not None)
    assert record().pid == engine
    assert not is_gone(record())


def children(parent: int) -> list[int]:
    """The processes that `parent` started, by number."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state = stat.read_text().rpartition(")")[2].split()
            if int(state[1]) == parent:
                found.append(int(stat.parent.name))
    return found
