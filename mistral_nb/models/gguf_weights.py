"""The tensors of a GGUF file of the Llama family, as one safetensors file with Hugging Face's names.

F32, F16 and BF16 stay what they are, bit for bit; other types become F32 exactly as the `gguf` package decodes them.
GGUF has the rows of q and k in interleaved RoPE order; they are put back into the half-split order of Hugging Face
checkpoints. Everything is written in blocks of rows, so the peak memory does not grow with the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.errors import ModelError
from mistral_nb.models.gguf_header import GgufHeader, GgufTensor

__all__ = ["Weight", "Weights", "plan_weights", "write_weights"]

# GGUF's name, Hugging Face's, and the sizes by their names in `_sizes`.
_TOP = {
    "token_embd": ("model.embed_tokens", "vocab dim"),
    "output_norm": ("model.norm", "dim"),
    "output": ("lm_head", "vocab dim"),
}
_LAYER = {
    "attn_norm": ("input_layernorm", "dim"),
    "attn_q": ("self_attn.q_proj", "q dim"),
    "attn_k": ("self_attn.k_proj", "kv dim"),
    "attn_v": ("self_attn.v_proj", "kv dim"),
    "attn_output": ("self_attn.o_proj", "dim q"),
    "ffn_norm": ("post_attention_layernorm", "dim"),
    "ffn_gate": ("mlp.gate_proj", "hidden dim"),
    "ffn_up": ("mlp.up_proj", "hidden dim"),
    "ffn_down": ("mlp.down_proj", "dim hidden"),
}
_ROTATED = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
_KEPT: dict[int, tuple[str, str]] = {0: ("F32", "<u4"), 1: ("F16", "<u2"), 30: ("BF16", "<u2")}
"""ggml's types that stay: the name in safetensors, and the integers that carry the bits."""
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_BLOCK = 1 << 24
"""About the bytes of fp32 that are read, decoded and written at once."""
_TOGETHER = 8192
"""Values in what `dequantize` takes for a row: 16 of these fit the cache, and it is up to twice as fast as by 576."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor: what it is written as, and where it lies in the GGUF file, in bytes.

    `rows_of_head` is the number of rows that are reordered among themselves, 1 where none are.
    """

    name: str
    dtype: str
    kind: int
    shape: tuple[int, ...]
    start: int
    row_bytes: int
    rows_of_head: int

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Weights:
    """What `write_weights` writes: the header of the safetensors file, then the tensors in the GGUF file's order."""

    source: Path
    header: bytes
    tensors: tuple[Weight, ...]
    total: int

    @property
    def file_bytes(self) -> int:
        return len(self.header) + self.total

    @property
    def dtype(self) -> str:
        """The type of most of the weights."""
        elements = dict.fromkeys(_BYTES, 0)
        for tensor in self.tensors:
            elements[tensor.dtype] += math.prod(tensor.shape)
        return max(elements, key=lambda dtype: elements[dtype])


def plan_weights(header: GgufHeader, args: ModelArgs) -> Weights:
    """Checks every tensor: name, shape, type, place. `ModelError` names the first that is wrong or missing."""
    expected = _expected(header, args)
    tensors: list[Weight] = []
    end = header.data_start
    for tensor in header.tensors:
        if tensor.name not in expected:
            raise ModelError(_unknown(header, tensor.name))
        name, shape = expected.pop(tensor.name)
        if tensor.shape != shape:
            raise _damaged(header, tensor, f"has the shape {tensor.shape}, where its metadata tell {shape}")
        row_bytes = _row_bytes(header, tensor)
        start = header.data_start + -(-(end - header.data_start) // header.alignment) * header.alignment
        if header.data_start + tensor.offset != start:
            raise _damaged(header, tensor, f"lies at {tensor.offset}, not at {start - header.data_start}")
        end = start + math.prod(shape[:-1]) * row_bytes
        if end > header.size:
            raise _damaged(header, tensor, f"ends at {end} bytes, and the file at {header.size}")
        dtype = _KEPT[tensor.kind][0] if tensor.kind in _KEPT else "F32"
        rows_of_head = args.head_dim if name.endswith(_ROTATED) else 1
        tensors.append(Weight(name, dtype, tensor.kind, shape, start, row_bytes, rows_of_head))
    if expected:
        raise ModelError(f"{header.path.name} lacks the tensor {next(iter(expected))}; choose another file")
    return _weights(header.path, tuple(tensors))


def write_weights(weights: Weights, path: Path, report: Callable[[int, int], None]) -> None:
    """`report(done, total)` is called after each block, in bytes of weights; an exception from it ends the writing."""
    done = 0
    with weights.source.open("rb") as source, path.open("wb") as file:
        file.write(weights.header)
        for tensor in weights.tensors:
            for block in _blocks(source, tensor):
                done += file.write(np.ascontiguousarray(block).data)
                report(done, weights.total)


def _weights(source: Path, tensors: tuple[Weight, ...]) -> Weights:
    """8 bytes of header length and the JSON header, padded to 8 bytes, as safetensors has them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return Weights(source, len(encoded).to_bytes(8, "little") + encoded, tensors, end)


def _expected(header: GgufHeader, args: ModelArgs) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each tensor's name in the GGUF file, with its name and shape in the checkpoint."""
    if args.n_layers > len(header.tensors):
        raise ModelError(
            f"{header.path.name} tells of {args.n_layers} layers and has {len(header.tensors)} tensors; "
            "fetch the file again"
        )
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    sizes = {"dim": args.dim, "hidden": args.hidden_dim, "q": q, "kv": kv, "vocab": args.vocab_size}
    tables: Mapping[str, tuple[str, str]] = {
        **{f"{old}.weight": (f"{new}.weight", shape) for old, (new, shape) in _TOP.items()},
        **{
            f"blk.{layer}.{old}.weight": (f"model.layers.{layer}.{new}.weight", shape)
            for layer in range(args.n_layers)
            for old, (new, shape) in _LAYER.items()
        },
    }
    expected = {old: (new, tuple(sizes[size] for size in shape.split())) for old, (new, shape) in tables.items()}
    if args.tied_embeddings:
        del expected["output.weight"]
    return expected


def _unknown(header: GgufHeader, name: str) -> str:
    if name == "rope_freqs.weight":
        why = "a rope scaling, which this engine does not apply"
    else:
        why = "which models of the llama family lack or have once only"
    return f"{header.path.name} holds a tensor {quoted(name)}, {why}; choose another file"


def _damaged(header: GgufHeader, tensor: GgufTensor, problem: str) -> ModelError:
    return ModelError(f"{header.path.name} is damaged: its tensor {tensor.name} {problem}; fetch the file again")


def _row_bytes(header: GgufHeader, tensor: GgufTensor) -> int:
    """The bytes of a row; `ModelError` by name where the `gguf` package cannot decode the type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(tensor.kind)
    except ValueError as error:
        raise ModelError(
            f"{header.path.name} has the tensor {tensor.name} in the type {tensor.kind}, which the gguf package here "
            "does not know; fetch the file again, or run: pip install --upgrade gguf"
        ) from error
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError as error:
        raise ModelError(
            f"{header.path.name} has the tensor {tensor.name} in the type {kind.name}, which the gguf package cannot "
            "decode; choose a file in another type, such as Q8_0"
        ) from error
    if tensor.shape[-1] % per_block:
        packed = f"{kind.name} packs {per_block} at once"
        raise _damaged(header, tensor, f"has {tensor.shape[-1]} values in a row, and {packed}")
    return tensor.shape[-1] // per_block * block_bytes


def _blocks(source: BinaryIO, weight: Weight) -> Iterator[npt.NDArray[Any]]:
    """The tensor's values in order, [rows, columns], as integers where the bits are kept."""
    columns = weight.shape[-1]
    unit = math.lcm(weight.rows_of_head, _TOGETHER // math.gcd(_TOGETHER, columns))
    step = max(_BLOCK // (4 * columns * unit), 1) * unit
    source.seek(weight.start)
    for first in range(0, weight.rows, step):
        rows = min(step, weight.rows - first)
        data = source.read(rows * weight.row_bytes)
        if len(data) < rows * weight.row_bytes:
            raise ModelError(f"{source.name} became shorter while it was read; fetch the file again")
        values = _decoded(data, weight.kind).reshape(rows, columns)
        yield values if weight.rows_of_head == 1 else _half_split(values, weight.rows_of_head)


def _decoded(data: bytes, kind: int) -> npt.NDArray[Any]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    if kind in _KEPT:
        return np.frombuffer(data, _KEPT[kind][1])
    ggml_type = GGMLQuantizationType(kind)
    per_block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    width = math.gcd(len(data) // block_bytes, _TOGETHER // per_block) * block_bytes
    with np.errstate(all="ignore"):
        return dequantize(np.frombuffer(data, np.uint8).reshape(-1, width), ggml_type).astype("<f4", copy=False)


def _half_split(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """[heads * head_dim, dim], each head's rows from interleaved (0, d/2, 1, d/2+1, ...) to half-split order."""
    return rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
