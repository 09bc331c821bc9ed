"""Models that are on this machine already: a checkpoint folder is copied into the store, a GGUF file is converted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.untrusted import stay_inside
from mistral_nb.errors import PullError
from mistral_nb.models.staging import PIECE, Fetched, Staging, file_sha256
from mistral_nb.progress import Report

__all__ = ["FolderSource", "GgufSource"]

_ABOUT = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")


class FolderSource:
    """A checkpoint folder. Of its files those are copied that the engine reads, and those that tell of the model."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path

    def identity(self) -> dict[str, Any]:
        """With the size and time of change of each file: one that has changed is not mixed with those copied before."""
        return {"path": str(self._path), "files": {file.name: stamp for file, stamp in self._files.items()}}

    def fetch(self, staging: Staging, report: Report) -> Fetched:
        """Goes on inside a file. `ModelError`, before anything is copied, for a folder that the engine cannot run."""
        from mistral_nb.checkpoints import describe

        licence = describe(self._path).licence
        left = {file: staging.work / f"{file.name}.part" for file in self._files}
        left = {file: part for file, part in left.items() if not (staging.checkpoint / file.name).is_file()}
        for part in left.values():
            part.touch()
        staging.need(sum(max(0, self._files[file][0] - part.stat().st_size) for file, part in left.items()))
        total = sum(size for size, _ in self._files.values())
        done = total - sum(self._files[file][0] for file in left)
        sums: dict[str, str] = {}
        for file, part in left.items():
            digest = hashlib.sha256()
            for piece, was_there in _copy(file, part):
                digest.update(piece)
                done += len(piece)
                report("Checking" if was_there else "Copying", done, total)
            if _stamp(file) != self._files[file]:
                part.unlink()
                raise PullError(f"{file} was changed while it was copied; pull {self._path} again once that has ended")
            staging.put(part, file.name)
            sums[file.name] = digest.hexdigest()
        return Fetched({"path": str(self._path)}, licence, sums)

    @cached_property
    def _files(self) -> dict[Path, list[int]]:
        """The files to copy, the small ones first, with the stamps that they have when this is first asked for."""
        from mistral_nb.checkpoints import find_files
        from mistral_nb.checkpoints.layout import SIDE_FILES

        found = find_files(self._path)
        files = {found.config, found.tokenizer, *found.weights, *(self._path / name for name in SIDE_FILES)}
        files |= {file for pattern in _ABOUT for file in self._path.glob(pattern)}
        files |= {found.index} if found.index else set()
        files = {file for file in files if file.is_file()}
        for file in files:
            stay_inside(file)
        stamps = {file: _stamp(file) for file in files}
        return dict(sorted(stamps.items(), key=lambda item: (item[1][0], item[0])))


class GgufSource:
    """A GGUF file, converted to a checkpoint folder."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path

    def identity(self) -> dict[str, Any]:
        return {"path": str(self._path), "file": _stamp(self._path)}

    def fetch(self, staging: Staging, report: Report) -> Fetched:
        """A whole conversion is not made again, a part of one is.

        `ModelError` for a file that cannot be decoded exactly, `MissingDependency` without `gguf`.
        """
        from mistral_nb.models.gguf_header import read_header
        from mistral_nb.models.gguf_import import convert, needed_bytes

        begun = self.identity()
        licence = read_header(self._path).optional("general.license", str)
        if not staging.files():
            staging.need(needed_bytes(self._path))
            made = staging.work / "converted"
            made.mkdir()
            convert(self._path, made, lambda done, total: report("Converting", done, total))
            staging.adopt(made, report)
        source = {"path": str(self._path), "gguf_sha256": file_sha256(self._path, report)}
        if self.identity() != begun:
            raise PullError(f"{self._path} was changed while it was converted; pull it again once that has ended")
        return Fetched(source, licence)


def _stamp(file: Path) -> list[int]:
    try:
        status = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return [status.st_size, status.st_mtime_ns]


def _copy(file: Path, part: Path) -> Iterator[tuple[bytes, bool]]:
    """Make `part`, which may have the beginning, a copy of `file`: its pieces, and whether each was there already."""
    with part.open("r+b") as copy:
        for piece in _read(file):
            there = copy.read(len(piece))
            if there != piece:
                copy.seek(-len(there), os.SEEK_CUR)
                copy.write(piece)
                copy.flush()
            yield piece, there == piece
        copy.truncate()


def _read(file: Path) -> Iterator[bytes]:
    """A file in pieces; `PullError` where it cannot be read, so that the store is not blamed for it."""
    try:
        with file.open("rb") as opened:
            while piece := opened.read(PIECE):
                yield piece
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> PullError:
    return PullError(f"{file} cannot be read ({error.strerror}); check that it is there, then pull again")
