"""Talking to engine processes about themselves: who runs, how it is, what a prompt becomes, and stopping.

Plain `http.client` on loopback: no proxy, and nothing heavy to import.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mistral_nb import __version__, runtime
from mistral_nb.config import Settings
from mistral_nb.errors import EngineBusy, EngineError
from mistral_nb.models import canonical
from mistral_nb.runtime import PROOF_HEADER, PROTOCOL, EngineRecord

__all__ = [
    "Child",
    "EngineStatus",
    "Health",
    "call",
    "check",
    "encode_json",
    "ended",
    "exit_words",
    "is_gone",
    "is_hung",
    "kill",
    "log_tail",
    "remember",
    "retire",
    "status",
    "stop",
]

_STOP_LIMIT = 20.0
_TERM_LIMIT = 3.0
_REAP_LIMIT = 1.0
_POLL = 0.05
_TAIL_LINES = 12
_children: dict[tuple[int, float], Child] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What an engine says of itself. `active` requests are under way; `context` is in tokens, None while it loads.

    `loaded` of `to_load` are bytes of weights, None where nobody knows yet; `why`: why that precision. `memory` in
    bytes; `kv_used` of `kv_tokens` are handed out in the KV pages; the speed is that of its latest steps. Answers
    that are under way ask for `adapters`.
    """

    protocol: int
    version: str
    state: str
    model: str
    error: str = ""
    loaded: int = 0
    to_load: int | None = None
    serve_as: tuple[str, ...] = ()
    device: str = ""
    precision: str = ""
    why: str = ""
    context: int | None = None
    kernels: str = ""
    memory: int | None = None
    kv_used: int = 0
    kv_tokens: int = 0
    tokens_per_second: float | None = None
    adapters: tuple[str, ...] = ()
    pid: int = 0
    active: int = 0
    served: int = 0
    uptime_s: float = 0.0
    log: str = ""

    @property
    def compatible(self) -> bool:
        """Whether this version of the client may use it."""
        return (self.protocol, self.version) == (PROTOCOL, __version__)

    @property
    def where(self) -> str:
        """Device and precision in words, such as `CPU, 2 threads, int8`; empty while the model loads."""
        return ", ".join(part for part in (self.device, self.precision) if part)


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A running engine; `health` is None when it does not answer."""

    record: EngineRecord
    health: Health | None


def status(settings: Settings) -> list[EngineStatus]:
    """The engines that run, by model. Each gets `connect_timeout` to answer."""
    found = ((record, check(record, settings.connect_timeout)) for record in runtime.all_records())
    return [EngineStatus(record, health) for record, health in found if health or is_hung(record)]


def stop(settings: Settings, model: str | None = None, force: bool = False) -> list[str]:
    """End `model`'s engine, or all. Returns once they are gone: the names of the models, with a remark for a process
    that had to be killed.

    Unless `force`, those that are answering (`EngineBusy`) and those that do not respond (`EngineError`) are left
    alone; that is raised after the others have ended.
    """
    records = runtime.all_records()
    wanted = model if model is None or model in {record.model for record in records} else canonical(model)
    stopped: list[str] = []
    left: list[EngineError] = []
    for record in records:
        if wanted in (None, record.model):
            try:
                stopped += _stop(record, force, settings.connect_timeout)
            except EngineError as error:
                left.append(error)
    if left:
        raise left[0]
    return stopped


def _stop(record: EngineRecord, force: bool, timeout: float) -> list[str]:
    """The model's name once its engine has ended; nothing where none was."""
    if check(record, timeout):
        killed = retire(record, force=force, timeout=timeout)
    elif not is_hung(record):
        runtime.remove_record(record)
        return []
    elif not force:
        raise EngineError(
            f"the engine of {record.model} (process {record.pid}) does not respond; "
            f"end it with: %mistral stop --force (in a terminal: mistral-nb stop --force). Its log: {record.log}"
        )
    else:
        kill(record)
        killed = True
    return [f"{record.model} (process {record.pid} did not respond and was killed)" if killed else record.model]


def check(record: EngineRecord, timeout: float) -> Health | None:
    """The engine's health; None when nobody is there who takes the record's token and speaks as an engine does."""
    if is_gone(record):
        return None
    try:
        code, data = call(record, "GET", "/engine/health", timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError):
        return None
    names = {field.name for field in fields(Health)}
    known = {name: value for name, value in data.items() if name in names and value is not None}
    try:
        lists = {name: tuple(known.get(name, ())) for name in ("serve_as", "adapters")}
        return Health(**{**known, **lists}) if code == 200 else None
    except TypeError:
        return None


def retire(record: EngineRecord, *, force: bool, timeout: float) -> bool:
    """End a process that took the token, and wait until it is gone. True when it did not heed and was killed.

    Raises `EngineBusy` when it answers others, `EngineError` when it cannot be ended.
    """
    try:
        code, data = call(record, "POST", "/engine/stop", {"force": force}, timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError):
        code, data = 0, {}
    if code == 409:
        raise EngineBusy(
            f"the engine of {record.model} is answering {data.get('active', 'other')} request(s); "
            "wait for them, or end it with: %mistral stop --force (in a terminal: mistral-nb stop --force)"
        )
    killed = not _gone_within(record, _STOP_LIMIT if code == 200 else _TERM_LIMIT)
    if killed:
        kill(record)
    runtime.remove_record(record)
    return killed


def is_hung(record: EngineRecord) -> bool:
    """Whether the engine process lives: for one that has not answered."""
    return not is_gone(record) and runtime.is_engine(record)


def kill(record: EngineRecord) -> None:
    """End a process that does not respond, by SIGTERM and then by SIGKILL; its record goes too.

    Raises `EngineError` when it is another user's, does not end, or is no engine.
    """
    for number, limit in ((signal.SIGTERM, _TERM_LIMIT), (getattr(signal, "SIGKILL", signal.SIGTERM), _STOP_LIMIT)):
        if is_gone(record):
            break
        if not runtime.is_engine(record):
            raise EngineError(f"process {record.pid} is no engine and was left alone. The engine's log: {record.log}")
        try:
            os.kill(record.pid, number)
        except ProcessLookupError:
            break
        except PermissionError:
            raise EngineError(f"process {record.pid} is another user's; let them end it. Log: {record.log}") from None
        if _gone_within(record, limit):
            break
    else:
        raise EngineError(f"the engine process {record.pid} does not end; end it yourself. Its log: {record.log}")
    runtime.remove_record(record)


def _gone_within(record: EngineRecord, limit: float) -> bool:
    deadline = time.monotonic() + limit
    while not is_gone(record):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def call(
    record: EngineRecord,
    method: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    timeout: float,
    attach: Callable[[socket.socket], None] = lambda peer: None,
) -> tuple[int, dict[str, Any]]:
    """One exchange of JSON: status and body. `attach` is given the connected socket, to shut it down from elsewhere.

    Raises `OSError`, `HTTPException`, and `ValueError` for other answers and for a record that is not on loopback.
    """
    if not runtime.is_loopback(record.host):
        raise ValueError(f"{record.host} is not on this machine")
    connection = http.client.HTTPConnection(record.host, record.port, timeout=timeout)
    try:
        connection.connect()
        attach(connection.sock)
        content = None if body is None else encode_json(body)
        headers = {"Authorization": f"Bearer {record.token}", "Content-Type": "application/json"}
        headers |= {PROOF_HEADER: record.proof} if record.proof else {}
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        data = json.loads(response.read())
    finally:
        connection.close()
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return response.status, data


def encode_json(data: Any) -> bytes:
    """JSON in UTF-8: an emoji takes 4 bytes, and 12 in ASCII. Requests hold no lone surrogates."""
    return json.dumps(data, ensure_ascii=False).encode()


def is_gone(record: EngineRecord) -> bool:
    """Whether the process has ended. Off Linux, where a zombie looks alive, one that listens no more counts too."""
    if _exit_code(record) is not None or not runtime.process_alive(record.pid):
        return True
    return sys.platform != "linux" and not runtime.is_running(record)


class Child(subprocess.Popen[bytes]):
    """A process that outlives this one on purpose, which the base class would warn of."""

    def __del__(self) -> None: ...


def remember(child: Child, record: EngineRecord) -> None:
    """Keep `child` to see how it ends. Those that have ended make room: their numbers may be given out again."""
    for key, known in list(_children.items()):
        if known.poll() is not None:
            _children.pop(key, None)
    _children[record.pid, record.started] = child


def ended(record: EngineRecord) -> str:
    """How a process that was started here ended, in words; empty when that is not known.

    One that has been killed looks ended for a moment before its status is there: its threads end one by one.
    """
    child = _children.get((record.pid, record.started))
    if child is None:
        return ""
    try:
        return exit_words(child.wait(_REAP_LIMIT))
    except subprocess.TimeoutExpired:
        return ""


def exit_words(code: int) -> str:
    """An exit status as `subprocess` gives it, in words."""
    if code >= 0:
        return f"exit status {code}"
    return f"killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"killed by signal {-code}"


def log_tail(path: str | Path, start: int = 0) -> str:
    """The last lines of a log, from byte `start` on, indented; a remark where there are none."""
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(start if start <= size else 0)  # a log that grew too long was begun anew
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError as error:
        return f"  (not readable: {error.strerror or error})"
    return "\n".join(f"  {line}" for line in lines[-_TAIL_LINES:]) or "  (nothing)"


def _exit_code(record: EngineRecord) -> int | None:
    """The exit status of a child of ours that has ended."""
    child = _children.get((record.pid, record.started))
    return None if child is None else child.poll()
