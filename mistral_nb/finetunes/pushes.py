"""What was pushed from this machine: the name of each adapter, and the SHA-256 of those of its files that are known.

The service tells nothing about an adapter's files, and takes each one once: only this tells whether a push that goes on
has the files that are there, or for which the adapter was created.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.untrusted import readable
from mistral_nb.errors import AdapterError
from mistral_nb.finetunes.adapter import ASSETS, Adapter, is_wire_id
from mistral_nb.finetunes.store import adapters_path
from mistral_nb.locks import StartLock
from mistral_nb.models.staging import file_sha256, flush
from mistral_nb.progress import Report

__all__ = ["Sums", "note", "pushed_names", "pushes_path", "pushing", "recall", "sums_of"]

Sums = dict[str, str]
"""The SHA-256 in hex of files of an adapter, by their names."""

_LIMIT = 4_000


def pushes_path() -> Path:
    """The folder of the notes, which need not exist: beside that of the adapters."""
    return adapters_path().parent / "pushes"


def sums_of(folder: Path, report: Report = lambda step, done, total: None) -> Sums:
    """Of the two files in a folder. `ModelError` where they cannot be read."""
    with readable(folder):
        return {name: file_sha256(folder / name, report) for name in ASSETS}


@contextmanager
def pushing(name: str) -> Iterator[None]:
    """Around a push: one of a name at a time on this machine, so that no two put their files into one adapter.

    `AdapterError` where another is under way, or where no notes can be kept.
    """
    folder = pushes_path()
    lock = StartLock(folder / f".{name}.lock")
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        taken = lock.try_acquire()
    if not taken:
        raise AdapterError(f"{name} is being pushed from this machine already; wait until that has ended")
    try:
        yield
    finally:
        lock.release()


def note(adapter: Adapter, sums: Sums) -> None:
    """Keep what is known of an adapter's files; its push holds its name. `AdapterError` where that fails."""
    folder = pushes_path()
    part = folder / f".{adapter.id}.part"
    with _writing(folder):
        part.write_text(json.dumps({"name": adapter.name, **sums}), encoding="utf-8")
        flush(part)
        part.replace(_path(adapter.id))
        flush(folder)


def recall(adapter_id: str) -> Sums:
    """The sums of those files of an adapter that are known; none where no readable note tells."""
    noted = _read(_path(adapter_id))
    return {name: noted[name] for name in ASSETS if isinstance(noted.get(name), str)}


def pushed_names() -> list[str]:
    """What the adapters are called that were pushed from here."""
    names = (_read(path).get("name") for path in pushes_path().glob("*.json"))
    return [name for name in names if isinstance(name, str)]


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            noted = json.loads(file.read(_LIMIT))
    except (OSError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _path(adapter_id: str) -> Path:
    assert is_wire_id(adapter_id)
    return pushes_path() / f"{adapter_id}.json"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(
            f"what is pushed cannot be noted in {folder} ({error.strerror or error}); "
            "mend that, or set MISTRAL_NB_HOME to another folder"
        ) from error
