"""Weights of int8 or int4 in 16 or 32 bits, some outputs at a time, for products that cuBLAS makes.

    int8: w[o, k] = values[o, k] * scale[o]        int4: w[o, k] = scale[o, g] * code[o, k] + minimum[o, g]

In fp32, rounded once to the buffer's type. A program takes a piece of one output's weights, 16 bytes of them a thread;
a byte of int4 gives two weights, a group apart (`packed`). Bytes: in (b / 8 + e) an output, b bits to e bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.packed import Int4, Int8
from mistral_nb_kernels.products import affine_of

__all__ = ["dequantize_kernel", "dequantize_rows"]


@triton.jit
def dequantize_kernel(
    weight,
    affine,
    out,
    units,
    stride_weight,
    stride_group,
    stride_out,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Grid: (outputs, pieces of a row). GROUP 0 is int8; `affine` has a scale, or a word, for each output."""
    output = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = unit < units
    tile = tl.load(weight + output * stride_weight + unit, mask=inside, other=0)
    out += output * stride_out
    if GROUP == 0:
        value = tile.to(tl.float32) * tl.load(affine + output)
        tl.store(out + unit, value.to(out.dtype.element_ty), mask=inside)
    else:
        for half in tl.static_range(2):
            group = unit // GROUP * 2 + half
            words = tl.load(affine + group.to(tl.int64) * stride_group + output, mask=inside, other=0)
            scale, minimum = affine_of(words)
            value = ((tile >> 4 * half) & 15).to(tl.float32) * scale + minimum
            tl.store(out + group * GROUP + unit % GROUP, value.to(out.dtype.element_ty), mask=inside)


def dequantize_rows(weight: Int8 | Int4, first: int, out: Tensor, *, config: Config) -> None:
    """Writes the weights of len(out) outputs from `first` on to out [outputs, in]."""
    rows = slice(first, first + len(out))
    if isinstance(weight, Int8):
        values, affine, stride_group, group = weight.values[rows], weight.scale[rows], 0, 0
    else:
        values, affine = weight.packed[rows], weight.affine[:, rows].view(torch.int32)
        stride_group, group = affine.stride(0), weight.group
    assert values.stride(-1) == out.stride(-1) == 1
    dequantize_kernel[(len(out), triton.cdiv(values.shape[1], config.block_n))](
        values,
        affine,
        out,
        values.shape[1],
        values.stride(0),
        stride_group,
        out.stride(0),
        BLOCK=config.block_n,
        GROUP=group,
        num_warps=config.warps,
    )
