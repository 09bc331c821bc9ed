"""Weights to int8 and int4, by blocks of rows, straight into their places; and what is in 4-bit blocks already."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mistral_nb.checkpoints.checkpoint import Checkpoint, TensorInfo
from mistral_nb.checkpoints.memory import OUTPUTS
from mistral_nb.checkpoints.untrusted import open_file, readable
from mistral_nb.engine.arena import pages
from mistral_nb.engine.reading import DTYPES
from mistral_nb_kernels import reference as ops
from mistral_nb_kernels.packed import Dense, Int4, Int4Cpu, Int8, Int8Cpu, Weight, quantize_int4

__all__ = ["Put", "Quantiser", "four_bit_blocks", "rows_into"]

Put = Callable[[int, Tensor], None]
"""Takes rows of a matrix, the first of which is the matrix's so many-th."""

CODES, LEVELS = 15, 8
"""The largest code of 4 bits, and the one that stands for the zero point in torch's op on the CPU."""

WEIGHTS = 1 << 18
"""Weights that are made int4 for the CPU at a time."""

SAMPLED = 8
"""Rows of a matrix by which its blocks are judged."""

EXACT = 1e-3
"""Share of a step between two levels that a weight in a block may be off."""


class Quantiser:
    """Makes rows fit for `place`s. Its scratch memory is each thread's own."""

    def __init__(self) -> None:
        self._fp32 = _Scratch(torch.float32)
        self._codes = _Scratch(torch.int32)

    def into(self, place: Weight) -> Put:
        match place:
            case Dense():
                return rows_into(place.weight)
            case Int8():
                return lambda first, rows: self._int8(place, first, rows)
            case Int4Cpu():
                return lambda first, rows: self._int4_cpu(place, first, rows)
            case Int4():
                return lambda first, rows: _int4(place, first, rows)
            case Int8Cpu():
                raise AssertionError("made of a whole Int8")

    def _int8(self, place: Int8, first: int, rows: Tensor) -> None:
        quotients = self._fp32.copy(rows).view(-1, rows.shape[-1])
        block = slice(first, first + len(quotients))
        ops.quantize_int8(quotients, out=(place.values[block], place.scale[block]))

    def _int4_cpu(self, place: Int4Cpu, first: int, rows: Tensor) -> None:
        """A part at a time, so that what is made on the way stays small and in the cache."""
        weights = self._fp32.copy(rows).view(-1, rows.shape[-1])
        together = max(1, WEIGHTS // (weights.shape[1] * OUTPUTS)) * OUTPUTS
        for start in range(0, len(weights), together):
            self._pack(place, first + start, weights[start : start + together])

    def _pack(self, place: Int4Cpu, first: int, weights: Tensor) -> None:
        """Codes are those nearest by the scale and the zero point as they are kept, in bf16.

        So a weight is off by half a step at most, but where its group's range is cut by the rounding of the two: then
        by 1/128 more of the group's largest weight.
        """
        block = slice(first, first + len(weights))
        groups = weights.view(len(weights), -1, place.group)
        smallest, largest = groups.amin(dim=-1), groups.amax(dim=-1)
        scale = largest.sub_(smallest).div_(CODES).to(torch.bfloat16)
        zero = smallest.add_(scale, alpha=LEVELS).to(torch.bfloat16)
        step = torch.where(scale > 0, scale, 1).float()
        groups.sub_(zero.float()[..., None]).div_(step[..., None]).add_(LEVELS).round_().clamp_(0, CODES)
        place.affine[:, block, 0] = scale.t()
        place.affine[:, block, 1] = zero.t()
        place.packed[block] = torch._convert_weight_to_int4pack_for_cpu(self._codes.copy(weights), 1)


def rows_into(place: Tensor) -> Put:
    """Rows as they are, in the place's type."""

    def put(first: int, rows: Tensor) -> None:
        block = place[first : first + rows.numel() // rows.shape[-1]]
        block.view(rows.shape).copy_(rows)

    return put


def _int4(place: Int4, first: int, rows: Tensor) -> None:
    made = quantize_int4(rows.reshape(-1, rows.shape[-1]), place.group)
    block = slice(first, first + len(made.packed))
    place.packed[block] = made.packed
    place.affine[:, block] = made.affine


def four_bit_blocks(checkpoint: Checkpoint) -> bool:
    """Whether the matrices, the head aside, are blocks of 32 weights on 16 even levels, as Q4_1 of GGUF has them.

    Then int4 says all that is in them. A few rows of the first, the middle and the last layer are looked at. Without
    files they are not.
    """
    if not checkpoint.files:
        return False
    layers = {0, checkpoint.args.n_layers // 2, checkpoint.args.n_layers - 1}
    names = [
        name
        for name, info in checkpoint.tensors.items()
        if name.startswith("layers.") and int(name.split(".")[1]) in layers and len(info.shape) == 2
    ]
    return all(_is_on_levels(_first_rows(checkpoint.tensors[name])) for name in names)


def _first_rows(info: TensorInfo) -> Tensor:
    columns = info.shape[1]
    size = min(SAMPLED, info.shape[0]) * columns * DTYPES[info.dtype].itemsize
    with open_file(info.file) as file, readable(info.file):
        file.seek(info.start)
        data = bytearray(file.read(size))
    if len(data) < size:
        return torch.empty(0)
    return torch.frombuffer(data, dtype=DTYPES[info.dtype]).float().view(-1, columns)


def _is_on_levels(rows: Tensor) -> bool:
    """In numpy: torch's threads may wait 10 ms for each other to round 18 kB."""
    if rows.numel() == 0 or rows.shape[1] % 32:
        return False
    groups = rows.view(-1, 32).numpy()
    with np.errstate(all="ignore"):
        smallest = groups.min(axis=1, keepdims=True)
        step = (groups.max(axis=1, keepdims=True) - smallest) / CODES
        codes = (groups - smallest) / step.clip(min=torch.finfo(torch.float32).tiny)
        varied = (step > 0).sum() * 2 >= len(groups)
        return bool(varied and (abs(codes - codes.round()) < EXACT).all())


class _Scratch(threading.local):
    """Memory of each thread, used again for every block: given back, what malloc takes in a thread stays there.

    A GPU's goes back to torch, which hands it out again.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._memory = torch.empty(0, dtype=dtype)

    def copy(self, rows: Tensor) -> Tensor:
        """`rows` in the scratch's type, until the next call in this thread."""
        if rows.device.type != "cpu":
            return rows.to(self._dtype, copy=True, memory_format=torch.contiguous_format)
        if len(self._memory) < rows.numel():
            self._memory = pages(self._dtype.itemsize * rows.numel()).view(self._dtype)
        return self._memory[: rows.numel()].view(rows.shape).copy_(rows)
