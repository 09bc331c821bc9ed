"""The adapters on this machine: a folder of them, each with its record and the two files that PEFT writes.

Several processes may use it at once. A record appears whole, an asset appears whole and stays as it is; what is hidden
is work under way, or what a process that died has left of it.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.errors import AdapterError
from mistral_nb.finetunes.adapter import (
    ASSETS,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    adapter_from_wire,
    check_name,
    is_adapter_id,
)
from mistral_nb.locks import StartLock
from mistral_nb.models import find_known, installed, store_path
from mistral_nb.models.staging import PIECE, flush

__all__ = ["ASSET_LIMITS", "AdapterStore", "adapters_path"]

ASSET_LIMITS = {CONFIG_FILE: 1_000_000, WEIGHTS_FILE: 2_000_000_000}
"""Bytes of each file. All modules of Mistral-7B at rank 128 in 16 bits are 0.7 GB."""

_RECORD = "adapter.json"
_RECORD_LIMIT = 64_000
_LONGEST = 1024
_NEW = ".new-"
_REMOVED = ".removed-"

Adapters = list[Adapter]
Folders = list[Path]


def adapters_path() -> Path:
    """The folder of the store, which need not exist: beside that of the models, see `MISTRAL_NB_HOME`."""
    return store_path().parent / "adapters"


class AdapterStore:
    """The adapters in `folder`, which is made when the first one comes. All that fails is an `AdapterError`."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = adapters_path() if folder is None else folder

    def list(self) -> Adapters:
        """Every adapter, the oldest first, those that still lack files too."""
        found = [adapter for folder in self._folders() if (adapter := _read_record(folder))]
        return sorted(found, key=lambda adapter: (adapter.created_at, adapter.name))

    def damaged(self) -> Folders:
        """The folders of adapters whose record cannot be read: `list` leaves them out."""
        return [folder for folder in self._folders() if _read_record(folder) is None]

    def find(self, id_or_name: str) -> Adapter | None:
        return next((adapter for adapter in self.list() if id_or_name in (adapter.id, adapter.name)), None)

    def create(self, name: str, model: str, description: str = "") -> Adapter:
        """A new adapter, without files yet. `AdapterError` when the name is taken or is none."""
        check_name(name)
        if find_known(name) or name.lower() in {model.name.lower() for model in installed()}:
            raise AdapterError(f"name = '{name}': that is a model's name, which requests may give too; choose another")
        for what, text in (("model", model), ("description", description)):
            if len(text) > _LONGEST or not text.isprintable():
                raise AdapterError(f"{what} = '{quoted(text)}': at most {_LONGEST} characters of printable text")
        now = _now()
        adapter = Adapter(str(uuid.uuid4()), name, model, now, now, description)
        with self._changing():
            if self.find(name):
                raise AdapterError(f"there is an adapter {name} already; choose another name, or remove that one first")
            self._clear_leftovers()
            made = self.folder / f"{_NEW}{adapter.id}"
            made.mkdir()
            _write_record(made, adapter)
            made.rename(self.path(adapter))
            flush(self.folder)
        return adapter

    def put_asset(self, adapter: Adapter, file_name: str, chunks: Iterable[bytes]) -> None:
        """Store one of the two files. It appears when all of `chunks` have come, and is not written again."""
        if file_name not in ASSETS:
            raise AdapterError(f"file_name = '{quoted(file_name)}': must be {' or '.join(ASSETS)}")
        folder = self.path(adapter)
        with self._uploading(adapter, file_name) as part:
            _write(part, chunks, ASSET_LIMITS[file_name])
            with self._changing(), _failures(folder):
                part.rename(folder / file_name)
                _write_record(folder, replace(adapter, modified_at=_now()))
                flush(folder)

    def missing_files(self, adapter: Adapter) -> tuple[str, ...]:
        """Those of the two files that are not there yet."""
        return tuple(name for name in ASSETS if not (self.path(adapter) / name).is_file())

    def path(self, adapter: Adapter) -> Path:
        """The adapter's folder."""
        if not is_adapter_id(adapter.id):
            raise AdapterError(f"id = '{quoted(adapter.id)}': an adapter here has a UUID for its id; list them")
        return self.folder / adapter.id

    def add(self, folder: Path, name: str, model: str, description: str = "") -> Adapter:
        """A new adapter with copies of the two files in `folder`. Nothing of it stays behind when that fails."""
        adapter = self.create(name, model, description)
        try:
            for file_name in ASSETS:
                self.put_asset(adapter, file_name, _pieces(folder / file_name))
        except BaseException:
            self.remove(adapter.id)
            raise
        return adapter

    def remove(self, id_or_name: str) -> Adapter:
        """Remove an adapter with its files, and return what it was. An upload to it that is under way fails."""
        with self._changing():
            adapter = self.find(id_or_name)
            if adapter is None:
                names = ", ".join(each.name for each in self.list()) or "none"
                raise AdapterError(f"no adapter '{quoted(id_or_name)}' in {self.folder}; there are: {names}")
            self.path(adapter).rename(self.folder / f"{_REMOVED}{adapter.id}")
            self._clear_leftovers()
        return adapter

    def _folders(self) -> Folders:
        try:
            return [self.folder / name for name in sorted(os.listdir(self.folder)) if is_adapter_id(name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _unusable(self.folder, error) from error

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the store's lock: names stay unique, and records are not written over each other."""
        with _failures(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with StartLock(self.folder / ".lock"):
                yield

    @contextmanager
    def _uploading(self, adapter: Adapter, file_name: str) -> Iterator[Path]:
        """Where to write an asset: locked against another upload of the same one, and gone if it was not moved."""
        folder = self.path(adapter)
        lock = StartLock(folder / f".{file_name}.lock")
        if not folder.is_dir():
            raise AdapterError(f"no adapter {adapter.id} in {self.folder}; create it first")
        with _failures(folder):
            taken = lock.try_acquire()
        if not taken:
            raise AdapterError(f"{file_name} of {adapter.name} is being uploaded already; wait until that has ended")
        part = folder / f".{file_name}.part"
        try:
            if (folder / file_name).exists():
                raise AdapterError(
                    f"{adapter.name} has its {file_name}, which cannot be replaced; create another adapter"
                )
            yield part
        finally:
            part.unlink(missing_ok=True)
            lock.release()

    def _clear_leftovers(self) -> None:
        """Remove what was being made or removed when a process died; the store's lock is held."""
        for entry in os.listdir(self.folder):
            if entry.startswith((_NEW, _REMOVED)):
                shutil.rmtree(self.folder / entry, ignore_errors=True)


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                yield piece
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({error.strerror}); check the file and its permissions") from error


def _write(path: Path, chunks: Iterable[bytes], limit: int) -> None:
    """All of `chunks` into a file, safe against a power cut; `AdapterError` when they are more than `limit` bytes."""
    size = 0
    with _failures(path.parent):
        file = path.open("wb")
    with file:
        for chunk in chunks:
            size += len(chunk)
            if size > limit:
                raise AdapterError(f"{path.name[1:-5]} may have {limit} bytes here, and more came; make it smaller")
            with _failures(path.parent):
                file.write(chunk)
        with _failures(path.parent):
            file.flush()
            os.fsync(file.fileno())


def _write_record(folder: Path, adapter: Adapter) -> None:
    made = folder / f".{_RECORD}.part"
    made.write_text(json.dumps(adapter.to_wire(), indent=1), encoding="utf-8")
    flush(made)
    made.replace(folder / _RECORD)


def _read_record(folder: Path) -> Adapter | None:
    """The adapter in a folder; None where its record cannot be read or is another's."""
    with suppress(OSError, ValueError):
        with (folder / _RECORD).open("rb") as file:
            record = json.loads(file.read(_RECORD_LIMIT))
        adapter = adapter_from_wire(record if isinstance(record, dict) else {})
        if adapter.id == folder.name:
            return adapter
    return None


@contextmanager
def _failures(folder: Path) -> Iterator[None]:
    """What the system refuses in the block is an `AdapterError`."""
    try:
        yield
    except FileNotFoundError as error:
        if folder.exists():
            raise _unusable(folder, error) from error
        raise AdapterError(f"{folder} was removed meanwhile; create the adapter again") from None
    except OSError as error:
        raise _unusable(folder, error) from error


def _unusable(folder: Path, error: OSError) -> AdapterError:
    return AdapterError(
        f"the adapters in {folder} cannot be used ({error.strerror or error}); "
        "mend that, or set MISTRAL_NB_HOME to another folder"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
