"""Linear layers of few rows, weights in 16 bits, int8 or int4, with what stands before and after them in one launch.

    y[i, o] = sum_k norm(x)[i, k] w[o, k] + sum_r shrunk[i, part(o) R + r] b[slots[i], o, r] + residual[i, o]
    gated:    silu(of gate row o) * (of up row o), w [2 h, in] with the gates first; then the residual

x [n, in] in fp16, bf16 or fp32, w as `packed` says -> [n, out] in x's type. Sums are in fp32 and y is rounded once; a
norm's factor 1 / sqrt(mean(x^2) + eps) comes after the sum, its squares are added up beside it, and mma takes x times
the norm's weight in bf16. In fp16 that product leaves the type's range where the normed x does not: so there
`rms_norm` goes first, in a launch of its own. Bytes: out in b / 8 at b bits, and 4 out in / group for int4; FLOPs:
2 n out in. Rows past `FEW` go to cuBLAS, int8 and int4 dequantised by tiles of outputs into a buffer of bounded size.

Two forms, one for an architecture and a type and never one for a batch, so that a row gets the same bits among them:

* 16-bit x from sm_80 on: mma. Outputs are its rows, x in groups of 8 rows its columns. One machine code serves every
  n, and a column's sums know nothing of their neighbours. Warps split k, and are added in one order at the end.
* fp32, and sm_75: sums on the ordinary units, a program for each row; programs of one tile of outputs run side by side.

Why mma, where a batch of 1 uses one column of eight. An H100 reads 14.5 bytes a clock and multiprocessor at 3.35 TB/s,
which are 7.2, 14.5 or 29 weights of 16, 8 or 4 bits, and issues 128 lanes' instructions a clock: 17.7, 8.8 or 4.4 for
a weight. Sums take n FMA a weight besides the conversions, 2 for int8 and 1.9 for int4 in sm_90's machine code: with 8
rows neither type would keep up, and x would fill the registers. With mma the loop takes, all in all and at any n, 1.9
(with a norm 3.3) in 16 bits, 4.0 (4.6) in int8 and 4.6 (5.3) in int4. And 0.8 us at 3.35 TB/s are 20 KB on the way to
each multiprocessor: copies to shared memory hold 24 to 48 KB for each program, which sums would need as registers.

x is read anew by every program, from L2: at 8 rows 8 / block_n of the weights' bytes in 16 bits, a quarter for 32
outputs, and as much again as the weights for int4; at one row an eighth of that. Fewer outputs a program read more, and
more leave multiprocessors without a program at 4096 outputs: 32 make 128 programs.

int4: codes stay integers, exact in either type. A group's sum is scaled; its minimum multiplies the sum of the group's
x, which a product with ones leaves in the same registers. High codes are taken without a shift, as 16 (code - 8).
Sources: Frantar et al., 2024 (Marlin); Q4_1 of llama.cpp.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.dequantize import dequantize_rows
from mistral_nb_kernels.lora import lora_expand, tile_of
from mistral_nb_kernels.packed import Dense, Int4, Int4Cpu, Int8, Int8Cpu, LoraRows, Norm, Weight
from mistral_nb_kernels.products import by_dots, by_sums
from mistral_nb_kernels.rms_norm import rms_norm
from mistral_nb_kernels.swiglu import swiglu

__all__ = ["DEQUANTIZED", "FEW", "FEW_INT4", "FEW_INT8", "linear", "linear_kernel"]

FEW = 8
"""The most rows for the kernel: the columns of one mma."""
FEW_INT8, FEW_INT4 = 24, 32
"""The same by mma of int8 and int4, in groups of 8 side by side, so that all but the first read weights from L2.

By the model of an H100's traffic: to dequantise writes and reads 4 bytes a weight in L2 besides its own from memory,
1.0 and 0.9 ps; a group takes 0.3 of int8 and, as its instructions are in the way, 0.2 of int4. Nobody timed it.
"""
BUFFER = 1 << 23
"""Elements of dequantised weights at a time: 16 MB in 16 bits, which stay in the L2 of an A100 or an H100."""
RANKS = 16
"""Of a rank, what the epilogue adds at a time."""
DEQUANTIZED = Config(4, block_n=2048)
AROUND = {"rms_norm": Config(32), "swiglu": Config(4, block_n=1024), "lora_expand": Config(8, block_n=64)}
"""How the ops around cuBLAS are cut up where no table says so."""


@triton.jit
def _ranks(
    b, slot, output, existing, stride_slot, stride_output, AT: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr
):
    """b [outputs, n, STEP] of the ranks from AT on."""
    rank = AT + tl.arange(0, STEP)[None, :]
    mask = existing[:, None, None] & ((slot >= 0)[:, None] & (rank < RANK))[None, :, :]
    b += slot[None, :, None] * stride_slot + output.to(tl.int64)[:, None, None] * stride_output + rank[None, :, :]
    return tl.load(b, mask=mask, other=0.0)


@triton.jit
def _added(b, shrunk, slot, AT: tl.constexpr, RANK: tl.constexpr, STEP: tl.constexpr):
    """[outputs, n]: what those ranks add; `shrunk` [n] points at their part's columns."""
    rank = AT + tl.arange(0, STEP)[None, :]
    value = tl.load(shrunk[:, None] + rank, mask=(slot >= 0)[:, None] & (rank < RANK), other=0.0)
    return tl.sum(b.to(tl.float32) * value[None, :, :], axis=2)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,
    norm,
    weight,
    affine,
    residual,
    shrunk,
    b,
    slots,
    out,
    rows,
    outputs,
    units,
    inputs,
    eps,
    end_0,
    end_1,
    end_2,
    stride_x,
    stride_weight,
    stride_group,
    stride_residual,
    stride_shrunk,
    stride_slot,
    stride_output,
    stride_out,
    BLOCK_N: tl.constexpr,
    N: tl.constexpr,
    SLICES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: (rows / N, tiles of outputs, of one part each). `affine`: scales in fp32 for int8, words for int4.

    RANK 0: no adapters, and no parts. GATED: the gates are part 0, the others part 1.
    """
    row = tl.program_id(0) * N + tl.arange(0, N)
    part, begin, end = 0, tl.program_id(1) * BLOCK_N, outputs
    if RANK > 0 and not GATED:
        part, begin, end = tile_of(tl.program_id(1), end_0, end_1, end_2, BLOCK_N)
    output = begin + tl.arange(0, BLOCK_N)
    existing = output < end
    inside = existing[:, None] & (row < rows)[None, :]
    far = row.to(tl.int64)
    # what the end needs of memory is asked for before the products, whose copies hide the wait: not shrunk, which is in
    # L2, and not b beside int4, whose products leave no registers for it
    if BITS == 8:
        scale = tl.load(affine + output, mask=existing, other=0.0)[:, None]
        if GATED:
            up_scale = tl.load(affine + outputs + output, mask=existing, other=0.0)[:, None]
    if RANK > 0:
        slot = tl.load(slots + row, mask=row < rows, other=-1).to(tl.int64)
        shrunk += far * stride_shrunk + part * RANK
        adapters, further = (stride_slot, stride_output), output + outputs
        if BITS != 4:
            factor = _ranks(b, slot, output, existing, *adapters, 0, RANK, STEP)
            if GATED:
                up_factor = _ranks(b, slot, further, existing, *adapters, 0, RANK, STEP)
    if RESIDUAL:
        kept = tl.load(residual + far[None, :] * stride_residual + output[:, None], mask=inside, other=0.0)
    operands = (x, norm, weight, affine, row, rows, output, outputs, units, stride_x, stride_weight, stride_group)
    if DOT:
        y, up, squares = by_dots(*operands, SLICES, BLOCK_N, N, TILE, BITS, GROUP, NORM, GATED, STAGES)
    else:
        y, up, squares = by_sums(*operands, BLOCK_N, BLOCK_K, CHUNK, BITS, GROUP, NORM, GATED)
    # a fused product and sum of zero: what comes next must not be fused with it, or a row's bits depend on what that is
    if BITS == 8:
        y = tl.fma(y, scale, 0.0)
        if GATED:
            up = tl.fma(up, up_scale, 0.0)
    if NORM:
        inverse = tl.rsqrt(squares / inputs + eps)[None, :]
        y = tl.fma(y, inverse, 0.0)
        up = tl.fma(up, inverse, 0.0)
    for at in tl.static_range(0, RANK, STEP):
        if at > 0 or BITS == 4:
            factor = _ranks(b, slot, output, existing, *adapters, at, RANK, STEP)
            if GATED:
                up_factor = _ranks(b, slot, further, existing, *adapters, at, RANK, STEP)
        y += _added(factor, shrunk, slot, at, RANK, STEP)
        if GATED:
            up += _added(up_factor, shrunk + RANK, slot, at, RANK, STEP)
    if GATED:
        y = y / (1 + tl.exp(-y)) * up
    if RESIDUAL:
        y += kept.to(tl.float32)
    tl.store(out + far[None, :] * stride_out + output[:, None], y.to(out.dtype.element_ty), mask=inside)


def linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    lora: LoraRows | None = None,
    config: Config,
    dot: bool = True,
    around: Mapping[str, Config] = AROUND,
) -> Tensor:
    """x [n, in] -> [n, out], gated [n, out / 2]; `dot`: by mma, for 16-bit x on sm_80 or later."""
    n, outputs = len(x), weight.shape[0] // (1 + gated)
    assert not isinstance(weight, Int4Cpu | Int8Cpu)
    assert x.shape[1] == weight.shape[1]
    assert x.stride(-1) == 1
    assert outputs * (1 + gated) == weight.shape[0]
    assert norm is None or (norm.weight.shape == x.shape[1:] and norm.weight.stride(0) == 1)
    assert residual is None or (residual.shape == (n, outputs) and residual.stride(-1) == 1)
    assert lora is None or _fits(lora, x, weight, gated)
    dot = dot and x.dtype != torch.float32
    many = n > _few(weight, dot)
    if norm is not None and (many or (dot and x.dtype == torch.float16)):
        x, norm = rms_norm(x, norm.weight, norm.eps, config=around["rms_norm"]), None
    if many:
        return _many(x, weight, residual, gated, lora, around)
    out = torch.empty((n, outputs), dtype=x.dtype, device=x.device)
    if n:
        _launch(x, weight, norm, residual, gated, lora, out, config, dot)
    return out


def _few(weight: Dense | Int8 | Int4, dot: bool) -> int:
    if isinstance(weight, Dense) or not dot:
        return FEW
    return FEW_INT8 if isinstance(weight, Int8) else FEW_INT4


def _fits(rows: LoraRows, x: Tensor, weight: Weight, gated: bool) -> bool:
    """Whether adapters are of this layer's parts (gated: of two equal ones), and as the kernel reads them."""
    ends, b, (outputs, _) = rows.lora.ends, rows.lora.b, weight.shape
    return (
        len(ends) <= 3
        and ends[-1] == b.shape[1] == outputs
        and (not gated or ends == (outputs // 2, outputs))
        and len(rows.slots) == len(x)
        and rows.shrunk.shape == (len(x), len(ends) * rows.lora.rank)
        and b.stride(-1) == rows.shrunk.stride(-1) == rows.slots.stride(0) == 1
    )


def _launch(
    x: Tensor,
    weight: Dense | Int8 | Int4,
    norm: Norm | None,
    residual: Tensor | None,
    gated: bool,
    lora: LoraRows | None,
    out: Tensor,
    config: Config,
    dot: bool,
) -> None:
    values, affine, stride_group, bits, group = _parts(weight)
    assert values.stride(-1) == 1
    columns, block_n = FEW if dot else 1, config.block_n // (1 + gated)
    tile = min(config.block_k, group) if group else config.block_k
    parts = (out.shape[1],) if lora is None or gated else lora.lora.ends
    tiles = sum(triton.cdiv(end - begin, block_n) for begin, end in itertools.pairwise((0, *parts)))
    strides, adapter = _adapter(lora)
    linear_kernel[(triton.cdiv(len(x), columns), tiles)](
        *(x, norm.weight if norm is not None else None, values, affine, residual, *adapter, out),
        *(*out.shape, values.shape[1], x.shape[1], norm.eps if norm is not None else 0.0),
        *(*parts, *parts[-1:], *parts[-1:])[:3],
        *(x.stride(0), values.stride(0), stride_group, residual.stride(0) if residual is not None else 0),
        *(*strides, out.stride(0)),
        BLOCK_N=block_n,
        N=columns,
        SLICES=config.warps * config.block_k // tile,
        TILE=tile,
        BLOCK_K=config.block_k,
        CHUNK=min(16 // values.element_size(), config.block_k),
        BITS=bits,
        GROUP=group,
        NORM=norm is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        RANK=lora.lora.rank if lora is not None else 0,
        STEP=RANKS,
        STAGES=config.stages,
        DOT=dot,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )


def _parts(weight: Dense | Int8 | Int4) -> tuple[Tensor, Tensor | None, int, int, int]:
    """What the kernel reads: weights, their scales or words, the stride of these by groups, bits, group."""
    if isinstance(weight, Dense):
        return weight.weight, None, 0, 8 * weight.weight.element_size(), 0
    if isinstance(weight, Int8):
        assert weight.scale.stride(0) == 1
        return weight.values, weight.scale, 0, 8, 0
    words = weight.affine.view(torch.int32)
    return weight.packed, words, words.stride(0), 4, weight.group


def _adapter(rows: LoraRows | None) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """Strides of shrunk by rows, of b by slots and outputs; shrunk, b and slots."""
    if rows is None:
        return (0, 0, 0), (None, None, None)
    return (rows.shrunk.stride(0), *rows.lora.b.stride()[:2]), (rows.shrunk, rows.lora.b, rows.slots)


def _many(
    x: Tensor,
    weight: Dense | Int8 | Int4,
    residual: Tensor | None,
    gated: bool,
    lora: LoraRows | None,
    around: Mapping[str, Config],
) -> Tensor:
    """By cuBLAS; what the kernel has after the product is ops of their own, each rounding to x's type."""
    y = F.linear(x, weight.weight) if isinstance(weight, Dense) else _by_tiles(x, weight)
    if lora is not None:
        y = lora_expand(lora.shrunk, lora.lora, lora.slots, y, config=around["lora_expand"])
    if gated:
        y = swiglu(y, config=around["swiglu"])
    return y if residual is None else y.add_(residual)


def _by_tiles(x: Tensor, weight: Int8 | Int4) -> Tensor:
    """As many outputs at a time as the buffer holds."""
    outputs, inputs = weight.shape
    size = min(outputs, max(1, BUFFER // inputs))
    buffer = torch.empty((size, inputs), dtype=x.dtype, device=x.device)
    y = torch.empty((len(x), outputs), dtype=x.dtype, device=x.device)
    for first in range(0, outputs, size):
        part = buffer[: min(size, outputs - first)]
        dequantize_rows(weight, first, part, config=DEQUANTIZED)
        torch.matmul(x, part.t(), out=y[:, first : first + len(part)])
    return y
