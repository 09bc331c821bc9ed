"""A checkpoint opened: its shape and where each of its tensors lies, every one checked, none read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.header import RawTensor, read_header
from mistral_nb.checkpoints.layout import Layout, WeightFiles, find_weights
from mistral_nb.checkpoints.names import expected_tensors, hugging_face_name
from mistral_nb.checkpoints.untrusted import AGAIN, quoted, readable
from mistral_nb.errors import ModelError

__all__ = ["Checkpoint", "DType", "StoredDType", "TensorInfo", "open_checkpoint"]

DType = Literal["F32", "F16", "BF16"]
StoredDType = Literal[DType, "I8", "U8"]
"""Checkpoints have the first three; the engine's own packed copies the others too."""
_QUANTISED_DTYPES = ("I", "U", "F4", "F6_", "F8_")
_QUANTISED_NAMES = (".qweight", ".qzeros", ".scales", ".g_idx", "weight_scale", "weight_packed", ".absmax", "scale_inv")
_TENSORS = 20_000
_IGNORED = "rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor [rows, columns] or [size] in `file`, whose bytes are from `start` to `end` of the file."""

    dtype: StoredDType
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder whose every tensor is there, once, in its shape. `tensors` go by Mistral's names in either layout.

    `interleaved`: the rows of wq and wk are in interleaved RoPE order, else half-split. `tensors` lacks output.weight
    where the embeddings are tied, which they are not, whatever the config says, where the files hold one. `files` are
    the config, the index if any, and the weight files.
    """

    folder: Path
    layout: Layout
    args: ModelArgs
    tensors: Mapping[str, TensorInfo]
    interleaved: bool
    files: tuple[Path, ...]
    _stamps: Mapping[Path, tuple[int, int]] = field(repr=False, compare=False)

    @property
    def bytes(self) -> int:
        """Of all tensors, as they lie in the files."""
        return sum(tensor.end - tensor.start for tensor in self.tensors.values())

    def check_unchanged(self) -> None:
        """`ModelError` when a weight file is not the one that was opened, by its size and time of change."""
        for path, stamp in self._stamps.items():
            with readable(path):
                unchanged = _stamp(path) == stamp
            if not unchanged:
                raise ModelError(
                    f"{path} was changed while it was being read; wait until that has ended, and try again"
                )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and every header of a folder. `ModelError` for whatever keeps the engine from running it.

    The tokenizer is not looked at: `describe` does that.
    """
    files = find_weights(folder)
    args = ModelArgs.from_file(files.config)
    with readable(folder):
        stamps = {path: _stamp(path) for path in files.weights}
        raw = _read_headers(files)
    _refuse_quantised(raw)
    if args.tied_embeddings and _own_name("output.weight", files) in raw:
        args = replace(args, tied_embeddings=False)
    tensors = dict(_select(raw, args, files))
    others = (files.config, *([files.index] if files.index else []))
    return Checkpoint(folder, files.layout, args, tensors, files.layout == "mistral", (*others, *files.weights), stamps)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


_Found = dict[str, tuple[Path, RawTensor]]


def _read_headers(files: WeightFiles) -> _Found:
    """Every tensor by its name in the files, which must be the ones that the index names."""
    found: _Found = {}
    for path in files.weights:
        for name, tensor in read_header(path).items():
            if name in found:
                raise ModelError(f"the tensor {quoted(name)} is in both {found[name][0]} and {path}; {AGAIN}")
            found[name] = (path, tensor)
        if len(found) > _TENSORS:
            raise ModelError(f"{path.parent} holds more than {_TENSORS} tensors, which no model here has; {AGAIN}")
    for name, shard in files.shards.items():
        if name not in found or found[name][0] != shard:
            raise ModelError(
                f"{files.index} says that {quoted(name)} is in {quoted(shard.name)}, which does not hold it; {AGAIN}"
            )
    return found


def _refuse_quantised(found: _Found) -> None:
    for name, (path, tensor) in found.items():
        if name.endswith(_QUANTISED_NAMES) or tensor.dtype.startswith(_QUANTISED_DTYPES):
            raise ModelError(
                f"{path}: the tensor {quoted(name)} is {tensor.dtype}, of a quantised checkpoint; "
                "fetch the unquantised version, which can be loaded in int8"
            )


def _own_name(name: str, files: WeightFiles) -> str:
    return name if files.layout == "mistral" else hugging_face_name(name)


def _select(found: _Found, args: ModelArgs, files: WeightFiles) -> list[tuple[str, TensorInfo]]:
    """The model's tensors out of those in the files, of which none may be left but what is known to be of no use."""
    selected = []
    for name, shape in expected_tensors(args):
        own = _own_name(name, files)
        if own not in found:
            raise ModelError(f"{files.index or files.weights[0]}: the tensor {own} is missing; {AGAIN}")
        selected.append((name, _checked(own, shape, *found.pop(own))))
    extra = [name for name in found if not name.endswith(_IGNORED)]
    if extra:
        shown = ", ".join(quoted(name) for name in islice(extra, 3))
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        path = found[extra[0]][0]
        raise ModelError(
            f"{path} holds tensors that such a model does not have ({shown}{more}); "
            "choose a plain Mistral or Llama model"
        )
    return selected


def _checked(name: str, shape: tuple[int, ...], path: Path, tensor: RawTensor) -> TensorInfo:
    if tensor.shape != shape:
        raise ModelError(
            f"{path}: the tensor {name} is {list(tensor.shape)}, and the config asks for {list(shape)}; {AGAIN}"
        )
    for dtype in get_args(DType):
        if tensor.dtype == dtype:
            return TensorInfo(dtype, shape, path, tensor.start, tensor.end)
    raise ModelError(
        f"{path}: the tensor {name} is {tensor.dtype}; supported are F32, F16 and BF16: convert it, or fetch another"
    )
