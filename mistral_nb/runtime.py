"""Where a notebook and an engine process meet: the record, the start lock and the log of each model's engine.

One engine process per model. In the runtime folder (0700) lie, for each, `engine-<slug>.json` (0600: how to reach it,
its bearer token among that), `engine-<slug>.lock` (held by whoever is starting it), and in the log folder
`engine-<slug>.log`. Nothing here needs torch or an HTTP package.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from mistral_nb.errors import ConfigurationError

__all__ = [
    "PROTOCOL",
    "EngineRecord",
    "StartLock",
    "all_records",
    "is_running",
    "log_path",
    "process_alive",
    "read_record",
    "record_path",
    "remove_record",
    "runtime_dir",
    "start_lock",
    "write_record",
]

PROTOCOL = 1
"""Version of the endpoints that a client and an engine process must agree on."""

_CONNECT_TIMEOUT = 1.0
_LOCK_POLL = 0.05


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """How to reach one engine process. `started` is in Unix seconds; `host` is an address that a client connects to."""

    pid: int
    port: int
    token: str = field(repr=False)
    model: str
    version: str
    protocol: int
    log: str
    started: float
    host: str = "127.0.0.1"

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def runtime_dir() -> Path:
    """The folder of the records, made 0700. `ConfigurationError` when it cannot be made or is another user's."""
    folder = _setting("MISTRAL_NB_RUNTIME_DIR") or _platform_runtime_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == "posix":
            _make_private(folder)
    except OSError as error:
        raise ConfigurationError(
            f"the runtime folder {folder} cannot be used ({error.strerror or error}); "
            "set MISTRAL_NB_RUNTIME_DIR to a folder of your own"
        ) from error
    return folder


def log_path(model: str) -> Path:
    """The log file of `model`'s engine, in a folder that can be written. `ConfigurationError` when it cannot."""
    folder = _setting("MISTRAL_NB_LOG_DIR") or _platform_log_dir()
    path = folder / f"{_stem(model)}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigurationError(
            f"the log folder {folder} cannot be written ({error.strerror or error}); "
            "set MISTRAL_NB_LOG_DIR to a folder that you can write to"
        ) from error
    return path


def record_path(model: str) -> Path:
    return runtime_dir() / f"{_stem(model)}.json"


def read_record(model: str) -> EngineRecord | None:
    """The record of `model`'s engine, or None. That a record exists does not mean that its process does."""
    return _parse(record_path(model))


def all_records() -> list[EngineRecord]:
    """Every record in the runtime folder, in the order of the models' names."""
    found = (_parse(path) for path in runtime_dir().glob("engine-*.json"))
    return sorted((record for record in found if record), key=lambda record: record.model)


def write_record(record: EngineRecord) -> None:
    """Replace the record of `record.model` at one stroke; readable by this user only (0600)."""
    path = record_path(record.model)
    handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(record), file)
        os.replace(staged, path)
    except OSError as error:
        Path(staged).unlink(missing_ok=True)
        raise ConfigurationError(
            f"the runtime folder {path.parent} cannot be written ({error.strerror or error}); "
            "set MISTRAL_NB_RUNTIME_DIR to a folder that you can write to"
        ) from error


def remove_record(record: EngineRecord) -> bool:
    """Remove `record` from the runtime folder unless another process has replaced it. True when it was there."""
    current = read_record(record.model)
    if current is None or (current.pid, current.token) != (record.pid, record.token):
        return False
    record_path(record.model).unlink(missing_ok=True)
    return True


def is_running(record: EngineRecord) -> bool:
    """Whether the record's process exists and accepts connections on its port."""
    if not process_alive(record.pid):
        return False
    try:
        socket.create_connection((record.host, record.port), timeout=_CONNECT_TIMEOUT).close()
    except OSError:
        return False
    return True


def process_alive(pid: int) -> bool:
    """Whether a process of this number exists, one of another user's included."""
    if pid <= 0:
        return False
    if sys.platform == "win32":
        return _process_alive_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class StartLock:
    """Held across processes by the one that starts `model`'s engine; the system frees it when its holder dies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if nobody holds it."""
        if self._handle is not None:
            return False
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        if not _lock(handle):
            os.close(handle)
            return False
        self._handle = handle
        return True

    def acquire(self, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the lock. False, without it, as soon as `cancelled()` is true."""
        while not self.try_acquire():
            if cancelled():
                return False
            time.sleep(_LOCK_POLL)
        return True

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> StartLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def start_lock(model: str) -> StartLock:
    """The lock under which an engine of `model` is looked for and started. Not yet taken."""
    return StartLock(runtime_dir() / f"{_stem(model)}.lock")


def _stem(model: str) -> str:
    """A file name for a model name or path: readable, and different for different models on any file system."""
    slug = re.sub(r"[^a-z0-9._]+", "-", model.lower()).strip("-.")
    if slug != model or len(slug) > 60:
        slug = f"{slug[-50:].lstrip('-.')}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
    return f"engine-{slug}"


def _parse(path: Path) -> EngineRecord | None:
    """The record in a file; None where there is no file or no record in it. Keys of later versions are left out."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict):
        return None
    try:
        return EngineRecord(**{f.name: data[f.name] for f in fields(EngineRecord) if f.name in data})
    except TypeError:
        return None


def _setting(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value).expanduser() if value else None


def _platform_runtime_dir() -> Path:
    import platformdirs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Path(platformdirs.user_runtime_path("mistral-nb", appauthor=False))
        except OSError as error:
            raise ConfigurationError(
                f"no runtime folder ({error}); set MISTRAL_NB_RUNTIME_DIR to a folder of your own"
            ) from error


def _platform_log_dir() -> Path:
    import platformdirs

    return Path(platformdirs.user_log_path("mistral-nb", appauthor=False))


def _make_private(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(1, "it belongs to another user")
    if status.st_mode & 0o077:
        folder.chmod(0o700)


if sys.platform == "win32":
    import ctypes
    import msvcrt

    def _lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _process_alive_windows(pid: int) -> bool:
        query_limited_information, still_active = 0x1000, 259
        kernel32 = ctypes.windll.kernel32
        handle = kernel32.OpenProcess(query_limited_information, False, pid)
        if not handle:
            return False
        code = ctypes.c_ulong()
        kernel32.GetExitCodeProcess(handle, ctypes.byref(code))
        kernel32.CloseHandle(handle)
        return code.value == still_active

else:
    import fcntl

    def _lock(handle: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False
