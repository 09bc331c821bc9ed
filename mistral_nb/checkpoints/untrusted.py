"""Reading files that may be hostile: regular files only, inside their folder, of a bounded size, never executed."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mistral_nb.errors import ModelError

__all__ = ["AGAIN", "open_file", "parse_object", "quoted", "read_bytes", "read_object", "readable", "stay_inside"]

AGAIN = "fetch the checkpoint again"
CONFIG_LIMIT = 4_000_000
"""Bytes of a JSON file, unless its reader says otherwise."""
TOKENIZER_LIMIT = 64_000_000
"""Bytes of a tokenizer.json."""
VALUES_LIMIT = 2_000_000
"""Values in a JSON text, unless its reader says otherwise: parsed, each may take 100 times the byte that it is."""


def quoted(name: object) -> str:
    """A name out of a file, for a message: short, and nothing in it that a terminal would obey."""
    text = str(name)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 120 else text[:117] + "..."


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Around the reading of a checkpoint: what the system refuses, or a file that goes meanwhile, is a `ModelError`."""
    try:
        yield
    except OSError as error:
        what = error.filename or folder
        raise ModelError(
            f"{quoted(what)} cannot be read ({error.strerror}); check its permissions and the disk"
        ) from error


def stay_inside(path: Path) -> None:
    """`ModelError` unless `path` is a regular file, and one in its own folder where it is a symlink.

    In a snapshot of the Hugging Face cache (`REPO/snapshots/REVISION`) a symlink may lead into `REPO/blobs` too.
    """
    if path.is_symlink():
        folder = path.parent.resolve()
        allowed = [folder]
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path} is a symlink to nothing; {AGAIN}") from error
        if not any(target.is_relative_to(place) for place in allowed):
            raise ModelError(
                f"{path} is a symlink out of its folder, to {quoted(target)}; put the file itself in its place"
            )
    if not path.is_file():
        raise ModelError(f"{path} is no regular file; {AGAIN}")


def open_file(path: Path) -> BinaryIO:
    """Open a regular file; a pipe or device that has taken its place does not make us wait. Errors: `ModelError`."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    with readable(path):
        handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ModelError(f"{path} is no regular file; {AGAIN}")
    return os.fdopen(handle, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a file of at most `limit` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ModelError(f"{path} has {size} bytes, and at most {limit} make sense there; {AGAIN}")
        with readable(path):
            return file.read(size)


def read_object(path: Path, limit: int = CONFIG_LIMIT) -> dict[str, Any]:
    """The JSON object in a file."""
    return parse_object(read_bytes(path, limit), str(path))


def parse_object(data: bytes, what: str, *, values: int = VALUES_LIMIT, unique: bool = False) -> dict[str, Any]:
    """A JSON object of about that many values at most; `what` names it in errors.

    With `unique`, a key that comes twice is an error.
    """
    if sum(data.count(sign) for sign in (b",", b"[", b"{")) > values:
        raise ModelError(f"{what} holds more than {values} values, which no checkpoint needs; {AGAIN}")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_no_duplicates if unique else None)
    except UnicodeDecodeError as error:
        raise ModelError(f"{what} is not UTF-8 text (byte {error.start}); {AGAIN}") from error
    except RecursionError as error:
        raise ModelError(f"{what} is JSON nested too deep to be read; {AGAIN}") from error
    except _Duplicate as error:
        raise ModelError(f"{what} names {quoted(error)} twice; {AGAIN}") from error
    except ValueError as error:
        raise ModelError(f"{what} is not valid JSON ({error}); {AGAIN}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what} holds no JSON object; {AGAIN}")
    return value


class _Duplicate(Exception):
    """The key that came twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _Duplicate(key)
        result[key] = value
    return result
