"""Talking to engine processes about themselves: who runs, how it is, what a prompt becomes, and stopping.

Plain `http.client` on loopback: no proxy, and nothing heavy to import.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mistral_nb import __version__, runtime
from mistral_nb.config import Settings
from mistral_nb.errors import EngineBusy, EngineError
from mistral_nb.models import canonical
from mistral_nb.runtime import PROTOCOL, EngineRecord

__all__ = [
    "Child",
    "EngineStatus",
    "Health",
    "call",
    "check",
    "ended",
    "is_gone",
    "log_tail",
    "retire",
    "status",
    "stop",
]

_STOP_LIMIT = 20.0
_POLL = 0.05
_TAIL_LINES = 12
_children: dict[int, Child] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What an engine says of itself. `active` requests are under way; `context` is in tokens, None while it loads."""

    protocol: int
    version: str
    state: str
    model: str
    error: str = ""
    serve_as: tuple[str, ...] = ()
    device: str = ""
    precision: str = ""
    context: int | None = None
    kernels: str = ""
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
    return [EngineStatus(record, health) for record, health in found if health or not is_gone(record)]


def stop(settings: Settings, model: str | None = None, force: bool = False) -> list[str]:
    """End `model`'s engine, or all; the names of the models whose engines ended. Returns once they are gone.

    Raises `EngineBusy` for those that are answering, after the others have ended, unless `force`.
    """
    records = runtime.all_records()
    wanted = model if model is None or model in {record.model for record in records} else canonical(model)
    stopped, busy = [], []
    for record in records:
        if wanted not in (None, record.model):
            continue
        health = check(record, settings.connect_timeout)
        if health is None:
            runtime.remove_record(record)
            continue
        try:
            retire(record, force=force, timeout=settings.connect_timeout)
        except EngineBusy as error:
            busy.append(error)
        else:
            stopped.append(record.model)
    if busy:
        raise busy[0]
    return stopped


def check(record: EngineRecord, timeout: float) -> Health | None:
    """The engine's health; None when nobody is there who takes the record's token and speaks as an engine does."""
    if _reap(record.pid) or not runtime.process_alive(record.pid):
        return None
    try:
        code, data = call(record, "GET", "/engine/health", timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError):
        return None
    names = {field.name for field in fields(Health)}
    known = {name: value for name, value in data.items() if name in names and value is not None}
    try:
        return Health(**{**known, "serve_as": tuple(known.get("serve_as", ()))}) if code == 200 else None
    except TypeError:
        return None


def retire(record: EngineRecord, *, force: bool, timeout: float) -> None:
    """End a process that took the token, and wait until it is gone. `EngineBusy` when it answers others."""
    try:
        code, data = call(record, "POST", "/engine/stop", {"force": force}, timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError):
        code, data = 0, {}
    if code == 409:
        raise EngineBusy(
            f"the engine of {record.model} is answering {data.get('active', 'other')} request(s); "
            "wait for them, or end it with: %mistral stop --force (in a terminal: mistral-nb stop --force)"
        )
    deadline = time.monotonic() + _STOP_LIMIT
    while not is_gone(record):
        if time.monotonic() > deadline:
            raise EngineError(f"the engine process {record.pid} does not end; end it yourself. Its log: {record.log}")
        time.sleep(_POLL)
    runtime.remove_record(record)


def call(
    record: EngineRecord, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout: float
) -> tuple[int, dict[str, Any]]:
    """One exchange of JSON: status and body. Raises `OSError`, `HTTPException`, and `ValueError` for other answers."""
    connection = http.client.HTTPConnection(record.host, record.port, timeout=timeout)
    try:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {record.token}", "Content-Type": "application/json"}
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        data = json.loads(response.read())
    finally:
        connection.close()
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return response.status, data


def is_gone(record: EngineRecord) -> bool:
    """Whether the process has ended, or at least listens no more. Knows a dead child that nobody has waited for."""
    return _reap(record.pid) or not runtime.is_running(record)


class Child(subprocess.Popen[bytes]):
    """A process that outlives this one on purpose, which the base class would warn of. Remembered to see its end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _children[self.pid] = self

    def __del__(self) -> None: ...


def ended(pid: int) -> str:
    """How a process that was started here ended, in words; empty when that is not known."""
    child = _children.get(pid)
    code = None if child is None else child.poll()
    if code is None:
        return ""
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


def _reap(pid: int) -> bool:
    """True when `pid` is a child of ours that has ended."""
    child = _children.get(pid)
    return child is not None and child.poll() is not None
