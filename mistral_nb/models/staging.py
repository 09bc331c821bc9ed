"""Where a model is made before it appears in the store: a hidden folder, kept when a pull is cut short."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mistral_nb.errors import PullError
from mistral_nb.models.manifest import MANIFEST, Manifest, damage, read_manifest, write_manifest
from mistral_nb.progress import Report, amount

__all__ = ["PIECE", "Fetched", "Source", "Staging", "file_sha256", "flush", "staging_path"]

PIECE = 1 << 22
"""Bytes that are read, hashed and written between two reports."""

_BEGUN_FOR = "begun_for.json"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a source has put into `Staging.checkpoint`.

    `source` and `licence` go into the manifest; `sha256` has the sums of those files that were hashed on their way.
    """

    source: Mapping[str, str]
    licence: str | None
    sha256: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Where a model comes from. `name` is the one that it gets in the store."""

    name: str

    def identity(self) -> dict[str, Any]:
        """JSON that tells this source from others: a staging folder that was begun for another one is thrown away."""
        ...

    def check(self, report: Report) -> None:
        """Raise what `fetch` would refuse this source for, as far as that is known before anything is written.

        It is asked before what was begun for another source goes.
        """
        ...

    def fetch(self, staging: Staging, report: Report) -> Fetched:
        """Put the checkpoint's files into `staging.checkpoint`, going on where an earlier call was cut short.

        A file there is whole: it is written in `staging.work`, checked, and moved by `staging.put`, or all of them at
        once by `staging.adopt`. Only files that the next call goes on with lie in `staging.work` itself; what it would
        make again lies in folders there. Asks `staging.need` for room before it takes it. `PullError` says what failed
        and the next step.
        """
        ...


class Staging:
    """The staging folder of one model; its pull holds the store's lock of that name."""

    def __init__(self, store: Path, name: str) -> None:
        self.name = name
        self.folder = staging_path(store, name)
        self.checkpoint = self.folder / "checkpoint"
        self.work = self.folder / "work"
        self._replaced = self.folder / "replaced"

    def is_of(self, identity: Mapping[str, Any]) -> bool:
        """Whether what is here was begun for that source."""
        try:
            return bool(json.loads((self.folder / _BEGUN_FOR).read_text(encoding="utf-8")) == identity)
        except (OSError, ValueError):
            return False

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Make the folders. What was begun for another source goes, and what nobody goes on with."""
        same = self.is_of(identity)
        half_made = [path for path in self.work.glob("*") if path.is_dir()]
        for stale in (self._replaced, *half_made) if same else (self.folder,):
            if stale.exists():
                shutil.rmtree(stale)
        self.checkpoint.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(exist_ok=True)
        if not same:
            (self.folder / _BEGUN_FOR).write_text(json.dumps(identity), encoding="utf-8")

    def need(self, size: int) -> None:
        """`PullError` unless `size` more bytes have room here."""
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise PullError(
                f"pulling {self.name} needs {amount(size)} in {self.folder.parent}, where {amount(free)} are free; "
                "free some space or set MISTRAL_NB_HOME to a folder on another disk"
            )

    def kept(self) -> int:
        """Bytes that the next pull goes on with."""
        size = 0
        with suppress(OSError):
            for path in (*self.files(), *self.work.glob("*")):
                size += path.stat().st_size if path.is_file() else 0
        return size

    def told(self) -> str:
        """What a pull that was cut short has left, in words."""
        kept = self.kept()
        if not kept:
            return "nothing of it is kept: the next pull starts again"
        return (
            f"what was fetched is kept ({amount(kept)}): the next pull goes on from there, and "
            f"mistral-nb rm {self.name} drops it"
        )

    def files(self) -> list[Path]:
        """The files of the checkpoint so far."""
        return sorted(path for path in self.checkpoint.rglob("*") if path.is_file())

    def put(self, made: Path, name: str) -> None:
        """Move a whole file from `work` into the checkpoint, in one step and safe against a power cut."""
        flush(made)
        final = self.checkpoint / name
        final.parent.mkdir(parents=True, exist_ok=True)
        made.replace(final)
        flush(final.parent)

    def adopt(self, made: Path, report: Report) -> None:
        """Make a folder of files in `work` the checkpoint, in one step and safe against a power cut."""
        _flush_all(list(made.iterdir()), report)
        shutil.rmtree(self.checkpoint)
        made.rename(self.checkpoint)
        flush(self.folder)

    def seal(self, manifest: Manifest, report: Report) -> None:
        """Write the manifest, once all that it lists is safe against a power cut. Then only `finish` is left to do."""
        _flush_all(self.files(), report)
        write_manifest(self.work, manifest)
        self.put(self.work / MANIFEST, MANIFEST)

    def sealed(self) -> bool:
        """Whether an earlier pull came as far as that."""
        with suppress(ValueError):
            return read_manifest(self.checkpoint) is not None and not damage(self.checkpoint)
        return False

    def finish(self, final: Path, check: Callable[[], None]) -> Path:
        """Rename the checkpoint to `final`, in one step; what was there goes, unless `check` raises at the last."""
        check()
        shutil.rmtree(self.work)
        if final.exists():
            final.rename(self._replaced)
        self.checkpoint.rename(final)
        flush(final.parent)
        self.remove()
        return final

    def prune(self) -> None:
        """Remove the folder if nothing in it is worth keeping."""
        if not self.kept():
            self.remove()

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def staging_path(store: Path, name: str) -> Path:
    return store / f".staging-{name}"


def file_sha256(path: Path, report: Report, step: str = "Checking") -> str:
    """The SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    for piece in _pieces(path, report, step):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: Path, report: Report, step: str) -> Iterator[bytes]:
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece
            done += len(piece)
            report(step, done, size)


def _flush_all(files: list[Path], report: Report) -> None:
    total, done = sum(path.stat().st_size for path in files), 0
    for path in files:
        report("Saving", done, total)
        flush(path)
        done += path.stat().st_size
    report("Saving", done, total)


def flush(path: Path) -> None:
    """fsync of a file or folder, where the system has it for folders."""
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
