"""One safetensors file's header, read and checked: which tensors the file holds, and where. No tensor is read.

The format: a little-endian u64 with the length of the header, the header as a JSON object, the data. The header maps a
tensor's name to its dtype, shape and the half-open range of its bytes in the data; the ranges cover the data exactly.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.untrusted import AGAIN, open_file, parse_object, quoted
from mistral_nb.errors import ModelError

__all__ = ["FRESH_S", "RawTensor", "read_header", "read_metadata"]

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_PARSED = 8_000_000
"""Bytes of a header that are parsed here, and values in it: 20,000 tensors; a model of 100 layers has 900."""
_VALUES = 200_000
_LARGEST = 1 << 53
_DIMENSIONS = 8
FRESH_S = 60
"""Seconds after its last change in which a file is taken for one that is still being written."""
_OTHER_FORMATS = (
    (
        b"PK\x03\x04",
        "a zip archive, as torch.save writes its pickles; it was not opened. Fetch the safetensors version",
    ),
    (b"GGUF", "a GGUF file by another name; rename it to end in .gguf and run: mistral-nb pull FILE"),
    (b"version https://git-lfs", "a git-lfs pointer, not the weights; run `git lfs pull` in the folder"),
    (b"<!doctype", "an HTML page, not weights: a login or an error was saved in their place; fetch the file again"),
    (b"<html", "an HTML page, not weights: a login or an error was saved in their place; fetch the file again"),
)


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as its file describes it: dtype in the format's names, its bytes from `start` to `end` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path, *, most: int = _PARSED, values: int = _VALUES) -> dict[str, RawTensor]:
    """The tensors of a file by name. `ModelError` says how the file is broken, or what it is instead.

    A header of over `most` bytes or of over `values` values is not read.
    """
    entries, base, size, fresh = _read_entries(path, most, values)
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, base) for name, entry in entries.items()}
    _check_ranges(path, tensors, base, size, fresh)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """What a file tells of itself beside its tensors; errors as of `read_header`, the tensors' own aside."""
    metadata = _read_entries(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ModelError(f"{path} has metadata that are no object; {AGAIN}")
    return {str(name): str(value) for name, value in metadata.items()}


def _read_entries(path: Path, most: int = _PARSED, values: int = _VALUES) -> tuple[dict[str, Any], int, int, bool]:
    """The header as it is, where the data begins, the file's size, and whether it may be one that is still growing."""
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        fresh = 0 <= time.time() - status.st_mtime < FRESH_S
        begin = file.read(512)
        if size == 0:
            raise _short(path, fresh, size, None) or ModelError(f"{path} is empty; {AGAIN}")
        length = int.from_bytes(begin[:8], "little")
        if len(begin) < 9 or length > size - 8 or begin[8:9] != b"{":
            raise _no_header(path, begin, length, size, fresh)
        if length > most:
            raise ModelError(f"{path} has a header of {length} bytes, far more than a model needs; {AGAIN}")
        file.seek(8)
        entries = parse_object(file.read(length), f"the header of {path}", values=values, unique=True)
    return entries, 8 + length, size, fresh


def _no_header(path: Path, begin: bytes, length: int, size: int, fresh: bool) -> ModelError:
    """Why a file does not begin as the format does."""
    text = begin.lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    for sign, what in _OTHER_FORMATS:
        if begin.startswith(sign) or text.startswith(sign):
            return ModelError(f"{path} is {what}")
    if len(begin) > 2 and begin[0] == 0x80 and 2 <= begin[1] <= 5:
        return ModelError(f"{path} is a pickle by another name; it was not opened. Fetch the safetensors version")
    if size < 9:
        return _short(path, fresh, size, None) or ModelError(f"{path} has {size} bytes, too few for a header; {AGAIN}")
    if length > size - 8:
        plausible = length <= _PARSED and begin[8:9] == b"{"
        return (plausible and _short(path, fresh, size, 8 + length)) or ModelError(
            f"{path} claims a header of {length} bytes, and has {size} in all; {AGAIN}"
        )
    return ModelError(f"{path} does not begin with a safetensors header; {AGAIN}")


def _short(path: Path, fresh: bool, size: int, needed: int | None) -> ModelError | None:
    """What is said of a `fresh` file, which may be one that is still growing."""
    if not fresh:
        return None
    of = f" of {needed}" if needed else ""
    return ModelError(f"{path} is still being written: {size}{of} bytes; wait until that has ended")


def _tensor(path: Path, name: str, entry: Any, base: int) -> RawTensor:
    """One entry of the header, checked by itself."""
    where = f"{path}: the tensor {quoted(name)}"
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where} has a malformed entry in the header; {AGAIN}") from error
    if not isinstance(shape, list) or len(shape) > _DIMENSIONS or not all(map(_is_size, (*shape, start, end))):
        raise ModelError(f"{where} has a shape or offsets that are no sizes; {AGAIN}")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ModelError(f"{where} has the dtype {quoted(dtype)}, which the format does not know; {AGAIN}")
    if (end - start) * 8 != math.prod(shape) * bits:
        raise ModelError(f"{where} takes {end - start} bytes, and {shape} in {dtype} would not; {AGAIN}")
    return RawTensor(dtype, tuple(shape), base + start, base + end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _check_ranges(path: Path, tensors: dict[str, RawTensor], base: int, size: int, fresh: bool) -> None:
    """The tensors must lie one behind another, from the header's end to the file's."""
    end, before = base, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < end:
            raise ModelError(f"{path}: the tensor {quoted(name)} overlaps {before}; {AGAIN}")
        if tensor.start > end:
            raise ModelError(
                f"{path} has a hole of {tensor.start - end} bytes before the tensor {quoted(name)}; {AGAIN}"
            )
        end, before = tensor.end, quoted(name)
    if end > size:
        raise _short(path, fresh, size, end) or ModelError(
            f"{path} is truncated: it has {size} of {end} bytes, and {before} is not whole; {AGAIN}"
        )
    if end < size:
        raise ModelError(f"{path} has {size - end} bytes behind its last tensor; {AGAIN}")
