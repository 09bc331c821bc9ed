"""Where a notebook and an engine process meet: the record, the start lock and the log of each model's engine.

One engine process per model. In the runtime folder, which nobody else may write to, lie, for each,
`engine-<slug>.json` (0600: how to reach it, its bearer token among that), `engine-<slug>.lock` (held by whoever is
starting it), and in the log folder `engine-<slug>.log`. Nothing here needs torch or an HTTP package.
"""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import json
import os
import re
import shlex
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mistral_nb.errors import ConfigurationError
from mistral_nb.locks import StartLock

__all__ = [
    "PROOF_HEADER",
    "PROTOCOL",
    "EngineRecord",
    "StartLock",
    "all_records",
    "is_engine",
    "is_loopback",
    "is_lost",
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

PROOF_HEADER = "x-mistral-nb-proof"
"""Of a request from one who has read the engine's record, whose `proof` it holds: they may name folders here."""

_CONNECT_TIMEOUT = 1.0
_SCRIPTS = ("mistral_nb", "mistral-nb")


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """How to reach one engine process, and which names besides `model` it answers for (`serve_as`).

    `started` is in Unix seconds; `host` is the address that a client connects to. `proof` is known to none but those
    who have read the record, as the token may be; it is empty where an engine has none.
    """

    pid: int
    port: int
    token: str = field(repr=False)
    model: str
    version: str
    protocol: int
    log: str
    started: float
    host: str = "127.0.0.1"
    serve_as: tuple[str, ...] = ()
    proof: str = field(default="", repr=False)

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def runtime_dir() -> Path:
    """The folder of the records; made, with the mode 0700, where it is not there.

    `ConfigurationError` when it cannot be made, is another user's, or others may write to it. The mode of a folder that
    was there is left as it is: it may be anything that the user named.
    """
    folder = _setting("MISTRAL_NB_RUNTIME_DIR") or _platform_runtime_dir()
    with _in_runtime_dir(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _unsafe(folder) if sys.platform != "win32" else ""
    if problem:
        raise ConfigurationError(
            f"the runtime folder {folder} is not safe: {problem}set MISTRAL_NB_RUNTIME_DIR to a folder of your own"
        )
    return folder


@contextmanager
def _in_runtime_dir(folder: Path) -> Iterator[None]:
    """Turns an `OSError` of the block into a `ConfigurationError` that names the folder and its variable."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"the runtime folder {folder} cannot be used ({error.strerror or error}); "
            "set MISTRAL_NB_RUNTIME_DIR to a folder that you can write to"
        ) from error


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
    with _in_runtime_dir(path.parent):
        handle, staged = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(asdict(record), file)
            os.replace(staged, path)
        except OSError:
            Path(staged).unlink(missing_ok=True)
            raise


def is_lost(record: EngineRecord) -> bool:
    """Whether the runtime folder holds `record` no more: no file of it, or another one's.

    False where that cannot be told now, as in a process that may open no more files.
    """
    try:
        return _decode(record_path(record.model).read_bytes()) != record
    except FileNotFoundError:
        return True
    except (OSError, ConfigurationError):
        return False


def remove_record(record: EngineRecord) -> bool:
    """Remove `record` from the runtime folder unless another process has replaced it. True when it was there."""
    current = read_record(record.model)
    if current is None or (current.pid, current.token) != (record.pid, record.token):
        return False
    path = record_path(record.model)
    with _in_runtime_dir(path.parent):
        path.unlink(missing_ok=True)
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
    """Whether a process of this number lives, one of another user's included. A zombie, where seen, does not."""
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
    return not (sys.platform == "linux" and _is_zombie(pid))


def is_engine(record: EngineRecord) -> bool:
    """Whether the process with the record's number lives and is an engine, as far as the system tells.

    Linux shows its command line. Elsewhere the record must be the one that lies in the runtime folder.
    """
    if not process_alive(record.pid):
        return False
    if sys.platform != "linux":
        return read_record(record.model) == record
    try:
        words = Path(f"/proc/{record.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    names = [os.fsdecode(word) for word in words]
    return any(Path(one).name in _SCRIPTS and two == "serve" for one, two in itertools.pairwise(names))


def is_loopback(host: str) -> bool:
    """Whether a host's name or address can only be this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def start_lock(model: str) -> StartLock:
    """The lock under which an engine of `model` is looked for and started. Not yet taken.

    `ConfigurationError` when its file cannot be written.
    """
    path = runtime_dir() / f"{_stem(model)}.lock"
    with _in_runtime_dir(path.parent):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return StartLock(path)


def _stem(model: str) -> str:
    """A file name for a model name or path: readable, and different for different models on any file system."""
    slug = re.sub(r"[^a-z0-9._]+", "-", model.lower()).strip("-.")
    if slug != model or len(slug) > 60:
        slug = f"{slug[-50:].lstrip('-.')}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"
    return f"engine-{slug}"


def _parse(path: Path) -> EngineRecord | None:
    """The record in a file; None where there is no file or no record in it."""
    try:
        return _decode(path.read_bytes())
    except OSError:
        return None


def _decode(text: bytes) -> EngineRecord | None:
    """The record in a file's text; None where it holds none. Keys of later versions are left out."""
    try:
        data: Any = json.loads(text.decode())
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    known = {f.name: data[f.name] for f in fields(EngineRecord) if f.name in data}
    try:
        return EngineRecord(**{**known, "serve_as": tuple(known.get("serve_as", ()))})
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


if sys.platform == "win32":
    import ctypes

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

    def _unsafe(folder: Path) -> str:
        """Why others could put files of theirs into the folder, and what to do; empty where they cannot."""
        status = folder.stat()
        if status.st_uid != os.getuid():
            return "it belongs to another user; "
        if not status.st_mode & 0o022:
            return ""
        return f"others may write to it; run `chmod 700 {shlex.quote(str(folder))}` if it is yours alone, or "

    def _is_zombie(pid: int) -> bool:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] in "ZX"
