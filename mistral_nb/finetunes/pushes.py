"""What was pushed from this machine: the SHA-256 of both files of each adapter that it has created on an account.

The service tells nothing about an adapter's files, and takes each one once: only this tells whether a push that goes on
has the files that the adapter was created for.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mistral_nb.checkpoints.untrusted import quoted, readable
from mistral_nb.errors import AdapterError
from mistral_nb.finetunes.adapter import ASSETS, is_wire_id
from mistral_nb.finetunes.store import adapters_path
from mistral_nb.models.staging import file_sha256, flush

__all__ = ["Sums", "noting", "pushes_path", "recall", "sums_of"]

Sums = dict[str, str]
"""The SHA-256 in hex of each of the two files, by its name."""

_LIMIT = 4_000


def pushes_path() -> Path:
    """The folder of the notes, which need not exist: beside that of the adapters."""
    return adapters_path().parent / "pushes"


def sums_of(folder: Path) -> Sums:
    """Of the two files in a folder. `ModelError` where they cannot be read."""
    with readable(folder):
        return {name: file_sha256(folder / name, lambda step, done, total: None) for name in ASSETS}


@contextmanager
def noting(sums: Sums) -> Iterator[Callable[[str], None]]:
    """Around the creating of an adapter: what is yielded keeps `sums` under its id.

    They are written first: `AdapterError` where they cannot be, before anything is created.
    """
    folder = pushes_path()
    part = folder / f".{uuid.uuid4()}.part"

    def keep(adapter_id: str) -> None:
        with _writing(folder):
            part.replace(_path(adapter_id))
            flush(folder)

    try:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(sums), encoding="utf-8")
            flush(part)
        yield keep
    finally:
        with suppress(OSError):
            part.unlink()


def recall(adapter_id: str) -> Sums | None:
    """What an adapter was created for; None where no readable note tells."""
    try:
        with _path(adapter_id).open("rb") as file:
            sums = json.loads(file.read(_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(sums, dict) or not all(isinstance(sums.get(name), str) for name in ASSETS):
        return None
    return {name: sums[name] for name in ASSETS}


def _path(adapter_id: str) -> Path:
    if not is_wire_id(adapter_id):
        raise AdapterError(f"id = '{quoted(adapter_id)}': not how ids look; try again in a moment")
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
