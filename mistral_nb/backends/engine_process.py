"""Finding the engine process of a model, or starting it, so that two who ask at once get the same one."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from mistral_nb import __version__, runtime
from mistral_nb.backends.pump import HungUp, Line
from mistral_nb.config import MAX_REQUESTS, Settings, environment_with_packages
from mistral_nb.engine_control import (
    Child,
    Health,
    check,
    ended,
    exit_words,
    is_gone,
    is_hung,
    kill,
    log_tail,
    remember,
    retire,
)
from mistral_nb.errors import EngineBusy, EngineStartError, MissingDependency, UnknownModel
from mistral_nb.models import EMBEDDED, find_known, locate, pull
from mistral_nb.progress import Meter, Progress
from mistral_nb.runtime import EngineRecord

__all__ = ["LOCAL_PACKAGES", "Running", "ensure", "find_served", "require_local", "served"]

LOCAL_PACKAGES = ("torch", "tokenizers", "sentencepiece", "jinja2", "starlette", "uvicorn")
_LISTEN_LIMIT = 60.0
_POLL = 0.05


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that is ready: how to reach it, and what it said of itself."""

    record: EngineRecord
    health: Health


@dataclass(frozen=True, slots=True)
class _Search:
    """One search: for which model, how long to wait for an answer, whom to tell what happens, and how many requests at
    once an engine that it starts answers.
    """

    model: str
    settings: Settings
    line: Line
    say: Callable[[str], None]
    max_requests: int = MAX_REQUESTS

    def go_on(self) -> None:
        if self.line.hung_up:
            raise HungUp


def ensure(
    model: str, settings: Settings, line: Line, say: Callable[[str], None], max_requests: int = MAX_REQUESTS
) -> Running:
    """The engine of `model` (a store name or a path), ready; pulls the embedded model and starts a process if need be.

    `say` gets a line of status now and then; an engine that it starts answers `max_requests` at once. Blocks; ends with
    `HungUp` once `line` is hung up. Raises `MissingDependency`, `ModelError`, `ConfigurationError` (a folder),
    `EngineStartError` and `EngineBusy`.
    """
    search = _Search(model, settings, line, say, max_requests)
    record = _usable(search)
    if record is None:
        require_local()
        runtime.log_path(model)
        _have_weights(search)
        record = _start(search)
    return _when_ready(search, record)


def served(name: str, settings: Settings, line: Line, say: Callable[[str], None]) -> Running:
    """The engine that was told to answer for `name` too, ready. It is never started: `UnknownModel` without one.

    Otherwise as `ensure`.
    """
    record = find_served(name)
    if record is None:
        raise UnknownModel(
            f"no engine runs that answers for {name}; start one with: "
            f"mistral-nb serve --model embedded --serve-as {shlex.quote(name)}"
        )
    running = _when_ready(_Search(record.model, settings, line, say), record)
    if not running.health.compatible or not _answers_for(name, running.health.serve_as):
        raise UnknownModel(
            f"the engine of {record.model} (version {running.health.version}) cannot be used for {name}; "
            f"end it with: mistral-nb stop {shlex.quote(record.model)}"
        )
    return running


def find_served(name: str) -> EngineRecord | None:
    """The record of a live engine that was started with `--serve-as NAME`; an engine of that very model comes first."""
    records = [record for record in runtime.all_records() if not is_gone(record)]
    known = find_known(name)
    if known and known.name in {record.model for record in records}:
        return None
    return next((record for record in records if _answers_for(name, record.serve_as)), None)


def _answers_for(name: str, others: Collection[str]) -> bool:
    return name.lower() in {other.lower() for other in others}


def require_local() -> None:
    """`MissingDependency`, with the command to run, unless the packages of the engine are installed."""
    missing = [name for name in LOCAL_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"the local engine needs {', '.join(missing)}. Set CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN to let "
            'Cloudflare answer, or install the engine: pip install "mistral-nb[local]"'
        )


def _usable(search: _Search) -> EngineRecord | None:
    """The record of an engine that this version can talk to and that is not broken."""
    record = runtime.read_record(search.model)
    health = check(record, search.settings.connect_timeout) if record else None
    return record if health and health.compatible and health.state in ("loading", "ready") else None


def _have_weights(search: _Search) -> None:
    """Only the embedded model is pulled on its own."""

    meter = Meter()

    def progress(now: Progress) -> None:
        search.say(f"Pulling the embedded model: {meter.line(now)}")

    if search.model == EMBEDDED:
        pull(search.model, progress, lambda: search.line.hung_up)
    else:
        locate(search.model)


def _start(search: _Search) -> EngineRecord:
    """Start a process under the lock. Who had to wait for the lock finds the work done."""

    def hung_up() -> bool:
        search.say("Starting the engine")
        return search.line.hung_up

    lock = runtime.start_lock(search.model)
    if hung_up() or not lock.acquire(hung_up):
        raise HungUp
    try:
        found = _usable(search)
        if found:
            return found
        _clear(search)
        log = runtime.log_path(search.model)
        start = log.stat().st_size
        search.go_on()
        return _until_listening(search, _spawn(search, log), log, start)
    finally:
        lock.release()


def _clear(search: _Search) -> None:
    """Make room: end an engine of another version, one whose model failed and one that hangs; drop a dead record."""
    record = runtime.read_record(search.model)
    if record is None:
        return
    health = check(record, search.settings.connect_timeout)
    if health is None and not is_hung(record):
        runtime.remove_record(record)
        return
    search.go_on()
    search.say("Replacing the engine")
    if health is None:
        kill(record)
        return
    try:
        retire(record, force=health.state == "failed", timeout=search.settings.connect_timeout)
    except EngineBusy as error:
        raise EngineBusy(f"version {health.version} runs and this is {__version__}: {error}") from None


def _spawn(search: _Search, log: Path) -> Child:
    """The engine process in a session of its own: a signal to the notebook's process group does not reach it."""
    idle = f"{search.settings.idle_timeout:g}"
    command = [sys.executable, "-P", "-m", "mistral_nb", "serve", "--managed"]
    command += ["--model", search.model, "--idle-timeout", idle]
    command += ["--max-requests", str(search.max_requests)]
    command += ["--device", search.settings.device, "--precision", search.settings.precision]
    command += ["--context", str(search.settings.context)] if search.settings.context else []
    command += ["--lora-rank", str(search.settings.lora_rank)] if search.settings.lora_rank else []
    if sys.platform == "win32":
        apart = subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.DETACHED_PROCESS
    else:
        apart = 0
    with log.open("ab") as output:
        try:
            return Child(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=runtime.runtime_dir(),
                env=_environment(log),
                creationflags=apart,
                start_new_session=True,
            )
        except OSError as error:
            raise EngineStartError(f"{sys.executable} cannot be started: {error}. Check the environment") from None


def _environment(log: Path) -> dict[str, str]:
    """This process's environment without tokens, with folders that hold from any working directory."""
    env = environment_with_packages()
    env["MISTRAL_NB_RUNTIME_DIR"] = str(runtime.runtime_dir().resolve())
    env["MISTRAL_NB_LOG_DIR"] = str(log.parent.resolve())
    if env.get("MISTRAL_NB_HOME"):
        env["MISTRAL_NB_HOME"] = str(Path(env["MISTRAL_NB_HOME"]).expanduser().resolve())
    return env


def _until_listening(search: _Search, child: Child, log: Path, start: int) -> EngineRecord:
    """The record that the process writes once it listens.

    Waits for it even when the line is hung up, holding the lock: the process is on its way, and the next one who asks
    must find it rather than start another.
    """
    deadline = time.monotonic() + _LISTEN_LIMIT
    while True:
        record = runtime.read_record(search.model)
        if record and record.pid == child.pid:
            remember(child, record)
            return record
        code = child.poll()
        if code is not None:
            # It gives way to one that somebody started without our lock.
            other = _usable(search)
            if other:
                return other
            raise _not_started(f"ended while it started ({exit_words(code)})", log, start)
        if time.monotonic() > deadline:
            child.kill()
            raise _not_started(f"did not listen within {_LISTEN_LIMIT:g} s", log, start)
        time.sleep(_POLL)


def _when_ready(search: _Search, record: EngineRecord) -> Running:
    """Wait for the model to be loaded, however long that takes, while the process says that it is loading."""
    deadline = time.monotonic() + _LISTEN_LIMIT
    meter = Meter()
    while True:
        search.go_on()
        health = check(record, search.settings.connect_timeout)
        if health and health.state == "ready":
            return Running(record, health)
        if health and health.state == "failed":
            raise EngineStartError(_load_failure(search.model, health.error, record.log))
        if health and health.state != "stopping":
            search.say(_loading(meter, health))
            deadline = time.monotonic() + _LISTEN_LIMIT
        elif health or is_gone(record):
            other = _usable(search)
            if other is None or other == record:
                how = "was stopped" if health else f"ended ({ended(record) or 'no status'})"
                raise _not_started(f"{how} while it loaded the model", record.log)
            record = other  # two were started at once without the lock, and this one gave way
        elif time.monotonic() > deadline:
            raise _not_started(f"(process {record.pid}) does not respond", record.log)
        search.line.wait(_POLL)


def _loading(meter: Meter, health: Health) -> str:
    """`Loading the model`, with a bar once it is known how much there is to load."""
    step = "Loading the model"
    return meter.line(Progress(step, health.loaded, health.to_load)) if health.to_load else step


def _load_failure(model: str, error: str, log: str) -> str:
    """In the engine's own words, which name the next step. Options of `serve` are settings here."""
    *names, last = [name for name in ("device", "precision", "context") if f"--{name} " in error] or [""]
    settings = f". In a notebook these are the settings {', '.join(names)} and {last}" if names else ""
    return f"the engine could not load {model}: {error}{settings}. Its log: {log}"


def _not_started(what: str, log: str | Path, start: int = 0) -> EngineStartError:
    return EngineStartError(
        f"the engine process {what}. Its log {log} ends with\n{log_tail(log, start)}\nCorrect that, and ask again"
    )
