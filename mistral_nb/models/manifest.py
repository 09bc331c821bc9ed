"""The manifest of a folder in the store: where it came from, and the size and SHA-256 of each of its files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mistral_nb.checkpoints.untrusted import quoted, read_object
from mistral_nb.errors import ModelError

__all__ = [
    "MANIFEST",
    "PACKED",
    "FileEntry",
    "Manifest",
    "damage",
    "is_newer",
    "read_manifest",
    "strangers",
    "write_manifest",
]

MANIFEST = "mistral_nb.json"
PACKED = "mistral_nb_packed"
"""The folder in a model's own where the engine keeps what it has converted."""
FORMAT = 2


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file's `size` in bytes and its `sha256` in hex."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was pulled. `source` says from where, such as `{"hub": "org/name", "commit": ...}`; files by their names."""

    name: str
    source: Mapping[str, str]
    licence: str | None
    files: Mapping[str, FileEntry]


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None where there is none. `ValueError`, in words, for one that cannot be read."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    try:
        data = read_object(folder / MANIFEST)
    except ModelError as error:
        raise ValueError("unreadable manifest") from error
    if data.get("format") != FORMAT:
        raise ValueError(f"store format {quoted(data.get('format'))}, this version reads {FORMAT}")
    try:
        listed = data["files"].items()
        files = {_inside(name): FileEntry(_size(entry["size"]), str(entry["sha256"])) for name, entry in listed}
        source = {str(key): str(value) for key, value in data["source"].items()}
        licence = data.get("licence")
        return Manifest(str(data["name"]), source, None if licence is None else str(licence), files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError("unreadable manifest") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    data: dict[str, Any] = {"format": FORMAT, **asdict(manifest)}
    (folder / MANIFEST).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def damage(folder: Path) -> str:
    """What is wrong with a folder by the sizes in its manifest; empty for a whole one and without a manifest."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, entry in manifest.files.items() if manifest else ():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry.size:
            return f"{quoted(name)} is not {entry.size} bytes"
    return ""


def is_newer(folder: Path) -> bool:
    """Whether a later version wrote the manifest in `folder`."""
    version = _content(folder).get("format")
    return isinstance(version, int) and version > FORMAT


def strangers(folder: Path) -> list[str]:
    """The files in a folder that its manifest, of whatever format, does not name, sorted: no pull brought those, nor
    did the engine.
    """
    named = _content(folder).get("files")
    known = {MANIFEST, *(named if isinstance(named, dict) else ())}
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}
    return sorted(name for name in here - known if not name.startswith(f"{PACKED}/"))


def _content(folder: Path) -> dict[str, Any]:
    """The manifest as it is; empty where it cannot be read."""
    with suppress(ModelError):
        return read_object(folder / MANIFEST)
    return {}


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a size of {quoted(value)}")
    return value


def _inside(name: str) -> str:
    """The name of a file in the folder or below; `ValueError` for one that leads out of it."""
    if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive:
        raise ValueError(name)
    return name
