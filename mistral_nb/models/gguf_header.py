"""The header of a GGUF file: metadata and where each tensor lies, read within bounds and without the weights.

Little-endian: magic, u32 version, u64 tensor count, u64 metadata count, the metadata (key, type, value), and for each
tensor its name, u32 dimensions, u64 sizes with the rows last, u32 type and u64 offset. The data begin at the next
multiple of `general.alignment`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from mistral_nb.errors import ModelError

__all__ = ["GgufHeader", "GgufTensor", "UnreadList", "read_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LONGEST = 1 << 25
"""Bytes of header that are read at most; a vocabulary of 256 Ki tokens with its merges takes half of it."""
_LONGEST_LIST = 1 << 20
_ENTRIES, _TENSORS = 10_000, 20_000
"""Far more metadata and tensors than any model has."""
_READ = {f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")}
"""The keys of lists whose values are of use."""
_LEAST_ENTRY, _LEAST_TENSOR = 13, 32
"""Bytes of the smallest metadata entry and of the smallest tensor entry."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_AGAIN = "fetch the file again"

T = TypeVar("T", int, float, str, bool)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`kind` is ggml's number of the type, `shape` has the rows first, `offset` counts from the start of the data."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class UnreadList:
    """A list of `count` values that are of no use here."""

    count: int

    def __repr__(self) -> str:
        return f"a list of {self.count}"


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`data_start` and `size` are in bytes from the file's start, `alignment` that of the tensors."""

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int
    alignment: int

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of `key`, None where the file has none; `ModelError` if it is not of that type."""
        found = self.metadata.get(key)
        if found is None:
            return None
        if type(found) is not kind:
            raise ModelError(f"{self.path.name} has {_short(found)} for {key}, which must be {_WORDS[kind]}; {_AGAIN}")
        return found

    def value(self, key: str, kind: type[T]) -> T:
        """The same; `ModelError` also where the file has none."""
        found = self.optional(key, kind)
        if found is None:
            raise ModelError(f"{self.path.name} lacks {key}, without which it is no chat model; choose another file")
        return found

    def values(self, key: str, kind: type[T]) -> list[T]:
        """A list; `ModelError` where the file has none of that type."""
        found = self.metadata.get(key)
        if found is None:
            raise ModelError(f"{self.path.name} lacks {key}, without which it is no chat model; choose another file")
        if not isinstance(found, list) or not all(type(item) is kind for item in found):
            raise ModelError(f"{self.path.name} has {_short(found)} for {key}, which must be a list; {_AGAIN}")
        return found


def read_header(path: Path) -> GgufHeader:
    """Reads at most 32 MiB. `ModelError` for what is no GGUF file of version 2 or 3, a part of one, or damaged."""
    try:
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); give a GGUF file") from error


def _read(path: Path, file: BinaryIO) -> GgufHeader:
    size = os.fstat(file.fileno()).st_size
    reader = _Reader(path, file, size)
    _check_kind(path, reader)
    tensors, entries = reader.scalar("Q"), reader.scalar("Q")
    for count, least, most, what in (
        (entries, _LEAST_ENTRY, _ENTRIES, "metadata entries"),
        (tensors, _LEAST_TENSOR, _TENSORS, "tensors"),
    ):
        if count * least > size:
            raise ModelError(f"{path.name} claims {count} {what}, more than its {size} bytes can hold; {_AGAIN}")
        if count > most:
            raise ModelError(f"{path.name} claims {count} {what}, and at most {most} make sense; {_AGAIN}")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = reader.text()
        if key in metadata:
            raise reader.damaged(f"it has {_short(key)} twice")
        metadata[key] = reader.value(reader.scalar("I"), keep=key in _READ)
    _refuse_part(path, metadata.get("split.count"))
    found = tuple(reader.tensor() for _ in range(tensors))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise reader.damaged(f"its general.alignment is {_short(alignment)}, which is no power of two")
    start = -(-reader.position // alignment) * alignment
    return GgufHeader(path, size, metadata, found, start, alignment)


def _check_kind(path: Path, reader: _Reader) -> None:
    magic = reader.magic()
    if magic != _MAGIC:
        begins = f"begins with {magic!r}" if magic else "is empty"
        raise ModelError(f"{path.name} is no GGUF file (it {begins}); {_AGAIN}")
    version = reader.scalar("I")
    if version and version & 0xFFFF == 0:
        raise ModelError(f"{path.name} is a GGUF file for big-endian machines; choose the little-endian one")
    if version not in _VERSIONS:
        raise ModelError(
            f"{path.name} is of GGUF version {version}, and 2 and 3 are what is read; convert the model again"
        )


def _refuse_part(path: Path, count: Any) -> None:
    """A model that was split into several files: only the first has the metadata, and none all tensors."""
    if type(count) is not int or count < 2:
        return
    name = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.gguf", path.name)
    first = f"{name[1]}-00001-of-{count:05}.gguf" if name else "the first part"
    parts = f" ({first} to {name[1]}-{count:05}-of-{count:05}.gguf)" if name else ""
    raise ModelError(
        f"{path.name} is one of {count} parts{parts}; put them together with "
        f"`llama-gguf-split --merge {first if name else 'FIRST_PART'} whole.gguf` and pull that file"
    )


class _Reader:
    """Reads values one after another and never beyond the file or the longest header."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self._path = path
        self._data = file.read(_LONGEST)
        self._whole = size <= _LONGEST
        self.position = 0

    def magic(self) -> bytes:
        """The file's first bytes, fewer where it has no more."""
        self.position = len(_MAGIC)
        return self._data[: len(_MAGIC)]

    def damaged(self, problem: str) -> ModelError:
        return ModelError(f"{self._path.name} is damaged: {problem}; {_AGAIN}")

    def take(self, size: int) -> bytes:
        start, end = self.position, self.position + size
        if end > len(self._data):
            raise self._cut()
        self.position = end
        return self._data[start:end]

    def _cut(self) -> ModelError:
        return self.damaged(f"its header goes on {'at its end' if self._whole else f'after {_LONGEST >> 20} MiB'}")

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        (text,) = self._texts(1)
        return self._decoded(text)

    def value(self, kind: int, *, keep: bool) -> Any:
        """Of a list only the count, unless it is to be kept."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise self.damaged(f"its metadata have a value of the unknown type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if count > _LONGEST_LIST:
            raise self.damaged(f"its metadata have a list of {count} values")
        if item in _SCALARS:
            data = self.take(count * struct.calcsize(_SCALARS[item]))
            return list(struct.unpack(f"<{count}{_SCALARS[item]}", data)) if keep else UnreadList(count)
        if item != _TEXT:
            raise self.damaged(f"its metadata have a list of the unknown type {item}")
        texts = self._texts(count)
        return [self._decoded(text) for text in texts] if keep else UnreadList(sum(1 for _ in texts))

    def _texts(self, count: int) -> Iterator[bytes]:
        """`count` texts, of which each has its length before it."""
        data, at, end = self._data, self.position, len(self._data)
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            if start > end or (at := start + length(data, at)[0]) > end:
                raise self._cut()
            yield data[start:at]
        self.position = at

    def _decoded(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self.damaged("its header holds a text that is not UTF-8") from error

    def tensor(self) -> GgufTensor:
        name = self.text()
        dimensions = self.scalar("I")
        if not 1 <= dimensions <= 4:
            raise self.damaged(f"its tensor {_short(name)} has {dimensions} dimensions")
        sizes = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions))
        if min(sizes) < 1:
            raise self.damaged(f"its tensor {_short(name)} has the sizes {sizes}")
        return GgufTensor(name, self.scalar("I"), sizes[::-1], self.scalar("Q"))


def _short(value: Any) -> str:
    shown = repr(value[:60] if isinstance(value, str | list) else value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
