"""Models that are on this machine already: a checkpoint folder is copied into the store, a GGUF file is converted."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.untrusted import quoted, stay_inside
from mistral_nb.errors import ModelError, PullError
from mistral_nb.models.manifest import MANIFEST, Manifest, read_manifest
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
        """Goes on inside a file. `ModelError`, before anything is copied, for a folder that the engine cannot run.

        A folder that a pull has made is copied with what its manifest tells of where it came from, and by its sums.
        """
        from mistral_nb.checkpoints import describe

        licence = describe(self._path).licence
        manifest = self._manifest()
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
            sums[file.name] = digest.hexdigest()
            listed = manifest.files.get(file.name) if manifest else None
            if listed and listed.sha256 != sums[file.name]:
                staging.remove()
                raise ModelError(
                    f"{file} has the SHA-256 {sums[file.name]}, not {quoted(listed.sha256)} as its {MANIFEST} says; "
                    f"copy it again from where it came, or, if you changed it yourself, remove that {MANIFEST}"
                )
            staging.put(part, file.name)
        return Fetched({**(manifest.source if manifest else {}), "path": str(self._path)}, licence, sums)

    def check(self, report: Report) -> None:
        from mistral_nb.checkpoints import describe

        describe(self._path)

    def _manifest(self) -> Manifest | None:
        """What an earlier pull wrote into the folder, if it can be read."""
        with suppress(ValueError):
            return read_manifest(self._path)
        return None

    @cached_property
    def _files(self) -> dict[Path, list[int]]:
        """The files to copy, the small ones first, with the stamps that they have when this is first asked for."""
        from mistral_nb.checkpoints import find_files
        from mistral_nb.checkpoints.layout import SIDE_FILES

        found = find_files(self._path)
        files = {found.config, found.tokenizer, *found.weights, *(self._path / name for name in SIDE_FILES)}
        files |= {file for pattern in _ABOUT for file in self._path.glob(pattern) if _is_inside(file)}
        files |= {found.index} if found.index else set()
        files = {file for file in files if file.is_file()}
        stamps = {file: _stamp(file) for file in files}
        return dict(sorted(stamps.items(), key=lambda item: (item[1][0], item[0])))


class GgufSource:
    """A GGUF file, converted to a checkpoint folder."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path

    def identity(self) -> dict[str, Any]:
        return {"path": str(self._path), "file": _stamp(self._path)}

    def check(self, report: Report) -> None:
        from mistral_nb.models.gguf_import import needed_bytes

        with _reading(self._path):
            needed_bytes(self._path)

    def fetch(self, staging: Staging, report: Report) -> Fetched:
        """A whole conversion is not made again, a part of one is.

        `ModelError` for a file that cannot be decoded exactly, `MissingDependency` without `gguf`.
        """
        from mistral_nb.models.gguf_header import read_header
        from mistral_nb.models.gguf_import import convert, needed_bytes

        begun = self.identity()
        with _reading(self._path):
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


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Around what reads `file` and writes into the store: `PullError` where it is the file that cannot be read."""
    try:
        yield
    except OSError as error:
        if str(error.filename) == str(file):
            raise _unreadable(file, error) from error
        raise


def _is_inside(file: Path) -> bool:
    try:
        stay_inside(file)
    except ModelError:
        return False
    return True


def _unreadable(file: Path, error: OSError) -> PullError:
    return PullError(f"{file} cannot be read ({error.strerror}); check that it is there, then pull again")
