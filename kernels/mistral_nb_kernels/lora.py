"""LoRA adapters of many requests in one batch: every row by the slot of its own adapter, read on the device.

    shrunk[i, j] = scale[i] * sum_k norm(x)[i, k] a[s, j, k]                    s = slots[i]; 0 where s is -1
    y[i, o]     += sum_r shrunk[i, part(o) R + r] b[s, o, r]                    nothing where s is -1

x [n, in], y [n, out]; a [slots, parts * R, in] and b [slots, out, R] in their type, strided by slots and rows; shrunk
[n, parts * R] and scale [n] fp32: one slot serves every scale. Up to three projections that share an input (q, k, v;
gate, up) are parts of one launch. Grids depend on shapes alone, so one CUDA graph serves every mix of adapters; of a
slot that no row names nothing is read.

Up to `FEW` rows, and everywhere on sm_75: sums. To shrink, a program takes one output of one row, all of a's row in
flight at once: for rank 16 on q, k, v 48 programs of 8 KB each, the longest 28 KB, so one wave and no split of the sum.
To expand, a program takes a tile of outputs of one row; `linear` does it in its own epilogue. More rows go to the
matrix unit in tiles of rows, once for each slot among a tile's rows: tiles of one sequence have one. There a program
shrinks `SPLIT` inputs, else 65 rows would keep 5 multiprocessors busy; the last one of a tile to arrive, by a counter,
adds the parts up, always in the same order. In both forms a row's bits depend on nothing but the row; the two round
differently: the second rounds `shrunk` and a norm to x's type, in fp16 as multiples of a power of two of each row.

Bytes, at least: n in e + s parts R in e + 4 n parts R to shrink, 4 n parts R + s out R e + 2 n out e to expand, for s
slots in use; FLOPs 2 n R (parts in + out). The parts of a split sum are 8 n parts R in / SPLIT more, in L2. A rank that
is a multiple of 16 gives loads of 16 bytes.
Sources: Hu et al., 2021 (LoRA); Chen et al., 2023 (Punica); Sheng et al., 2023 (S-LoRA).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.packed import Lora, Norm
from mistral_nb_kernels.rms_norm import rms_norm

__all__ = [
    "FEW",
    "lora_expand",
    "lora_expand_kernel",
    "lora_expand_rows_kernel",
    "lora_shrink",
    "lora_shrink_kernel",
    "lora_shrink_rows_kernel",
    "tile_of",
]

FEW = 64
"""The most rows that are summed one by one: steps that decode."""
PER_THREAD = 16
"""Inputs that a thread of `lora_shrink_kernel` takes at a time."""
RANKS = 64
"""Of a rank, what a program of `lora_expand_kernel` takes at a time."""
SPLIT = 512
"""Inputs that a program of `lora_shrink_rows_kernel` takes: a size and not a count, as a row's bits depend on it. Four
steps of 128, all of them in flight."""
NORMED = Config(warps=32)
"""`rms_norm`'s in the table, before the matrix unit."""
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def lora_shrink_kernel(
    x,
    a,
    scale,
    slots,
    norm,
    out,
    eps,
    stride_x,
    stride_slot,
    stride_output,
    IN: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
):
    """Grid: (rows, outputs). The sum of squares is made beside the product, and the norm's factor comes at the end;
    the warps add both at once, behind one barrier.
    """
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1)
    slot = tl.load(slots + row).to(tl.int64)
    out += row * tl.num_programs(1) + output
    if slot < 0:
        tl.store(out, 0.0)
        return
    factor = tl.load(scale + row)
    a += slot * stride_slot + output * stride_output
    total = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for at in tl.static_range(0, IN, BLOCK):
        feature = at + tl.arange(0, BLOCK)
        inside = feature < IN
        weight = tl.load(a + feature, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            weight *= tl.load(norm + feature, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + row * stride_x + feature, mask=inside, other=0.0).to(tl.float32)
        total += value * weight
        if NORM:
            squares += value * value
    if NORM:
        result, square = tl.split(tl.sum(tl.join(total, squares), axis=0))
        factor *= tl.rsqrt(square / IN + eps)
    else:
        result = tl.sum(total, axis=0)
    tl.store(out, result * factor)


@triton.jit
def _following(slot, current):
    """The least of `slot` above `current`; NONE after the last."""
    return tl.min(tl.where(slot > current, slot, NONE), axis=0)


@triton.jit(do_not_specialize=["rows"])
def lora_shrink_rows_kernel(
    x,
    a,
    scale,
    slots,
    partial,
    arrived,
    out,
    rows,
    outputs,
    stride_x,
    stride_slot,
    stride_output,
    IN: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (tiles of rows, tiles of outputs, splits of `in`). partial [splits, rows, outputs]; arrived, a number for
    each tile, zeros before.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, BLOCK_K)
    begin = tl.program_id(2) * SPLIT
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    there = (output < outputs)[None, :]
    place = row[:, None] * outputs + output[None, :]
    parts = tl.cast(outputs, tl.int64) * rows
    written = partial + tl.program_id(2) * parts + place
    x += row[:, None] * stride_x
    a += output[:, None] * stride_output
    current = _following(slot, -1)
    while current < NONE:
        mine = (slot == current)[:, None]
        matrix = a + current.to(tl.int64) * stride_slot
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in tl.range(begin, tl.minimum(begin + SPLIT, IN), BLOCK_K):
            inside = (at + feature < IN)[None, :]
            value = tl.load(x + (at + feature)[None, :], mask=mine & inside, other=0.0)
            weight = tl.load(matrix + (at + feature)[None, :], mask=(output < outputs)[:, None] & inside, other=0.0)
            acc = tl.dot(value, tl.trans(weight), acc, input_precision="ieee")
        tl.store(written, acc, mask=mine & there)
        current = _following(slot, current)

    tl.debug_barrier()  # every warp has stored its sums before one thread says so
    arrived += tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(2) - 1:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for split in tl.range(0, tl.num_programs(2), loop_unroll_factor=8):
            total += tl.load(partial + split * parts + place, mask=(slot >= 0)[:, None] & there, other=0.0)
        factor = tl.load(scale + row, mask=slot >= 0, other=0.0)
        tl.store(out + place, total * factor[:, None], mask=(row < rows)[:, None] & there)


@triton.jit
def tile_of(index, end_0, end_1, end_2, BLOCK: tl.constexpr):
    """The part that a tile of outputs lies in, its first output, and the part's end: no tile crosses parts."""
    tiles_0 = tl.cdiv(end_0, BLOCK)
    tiles_1 = tl.cdiv(end_1 - end_0, BLOCK)
    second, third = index >= tiles_0, index >= tiles_0 + tiles_1
    begin = tl.where(third, end_1, tl.where(second, end_0, 0))
    end = tl.where(third, end_2, tl.where(second, end_1, end_0))
    before = tl.where(third, tiles_0 + tiles_1, tl.where(second, tiles_0, 0))
    return second.to(tl.int32) + third.to(tl.int32), begin + (index - before) * BLOCK, end


@triton.jit
def lora_expand_kernel(
    shrunk,
    b,
    slots,
    y,
    end_0,
    end_1,
    end_2,
    stride_shrunk,
    stride_slot,
    stride_output,
    stride_y,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, tiles of outputs)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    part, first, end = tile_of(tl.program_id(1), end_0, end_1, end_2, BLOCK)
    output = first + tl.arange(0, BLOCK)
    inside = output < end
    shrunk += row * stride_shrunk + part * RANK
    b += slot * stride_slot + output[:, None] * stride_output
    y += row * stride_y + output
    old = tl.load(y, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK, STEP), tl.float32)
    for at in tl.range(0, RANK, STEP):
        rank = at + tl.arange(0, STEP)
        value = tl.load(shrunk + rank, mask=rank < RANK, other=0.0)
        weight = tl.load(b + rank[None, :], mask=inside[:, None] & (rank < RANK)[None, :], other=0.0)
        total += weight.to(tl.float32) * value[None, :]
    tl.store(y, (old + tl.sum(total, axis=1)).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unit(values):
    """Of each row of fp32 `values` a power of two by which none is 2 or more, and its inverse: below 2^96, or 1."""
    largest = tl.max(tl.abs(values), axis=1)
    bits = largest.to(tl.int32, bitcast=True) & 0x7F800000
    bits = tl.where(bits == 0, 127 << 23, tl.minimum(tl.maximum(bits, 31 << 23), 223 << 23))
    return bits.to(tl.float32, bitcast=True)[:, None], ((254 << 23) - bits).to(tl.float32, bitcast=True)[:, None]


@triton.jit(do_not_specialize=["rows"])
def lora_expand_rows_kernel(
    shrunk,
    b,
    slots,
    y,
    rows,
    end_0,
    end_1,
    end_2,
    stride_shrunk,
    stride_slot,
    stride_output,
    stride_y,
    RANK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (tiles of outputs, tiles of rows). `shrunk` may leave fp16's range where y does not: see `_unit`."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, first, end = tile_of(tl.program_id(0), end_0, end_1, end_2, BLOCK_N)
    output = first + tl.arange(0, BLOCK_N)
    inside = output < end
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    shrunk += row[:, None] * stride_shrunk + part * RANK
    b += output[:, None] * stride_output
    y += row[:, None] * stride_y + output[None, :]
    unit, inverse = 1.0, 1.0
    if b.dtype.element_ty == tl.float16:
        largest = tl.zeros((BLOCK_M, STEP), tl.float32)
        for at in tl.range(0, RANK, STEP):
            rank = (at + tl.arange(0, STEP))[None, :]
            value = tl.load(shrunk + rank, mask=(slot >= 0)[:, None] & (rank < RANK), other=0.0)
            largest = tl.maximum(largest, tl.abs(value))
        unit, inverse = _unit(largest)
    current = _following(slot, -1)
    while current < NONE:
        mine = (slot == current)[:, None]
        old = tl.load(y, mask=mine & inside[None, :], other=0.0)
        matrix = b + current.to(tl.int64) * stride_slot
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for at in tl.range(0, RANK, STEP):
            rank = (at + tl.arange(0, STEP))[None, :]
            value = tl.load(shrunk + rank, mask=mine & (rank < RANK), other=0.0)
            weight = tl.load(matrix + rank, mask=inside[:, None] & (rank < RANK), other=0.0)
            value = (value * inverse).to(weight.dtype)
            acc = tl.dot(value, tl.trans(weight), acc, input_precision="ieee")
        tl.store(y, (old.to(tl.float32) + acc * unit).to(y.dtype.element_ty), mask=mine & inside[None, :])
        current = _following(slot, current)


def lora_shrink(
    x: Tensor, lora: Lora, slots: Tensor, scale: Tensor, *, norm: Norm | None = None, config: Config
) -> Tensor:
    """x [n, in], slots [n] int32, scale [n] fp32 -> [n, parts * R] fp32, of RMSNorm(x) with a `norm`."""
    n, inputs = x.shape
    assert x.dtype == lora.a.dtype
    assert inputs == lora.a.shape[2]
    assert slots.shape == scale.shape == (n,)
    assert scale.dtype == torch.float32
    assert x.stride(-1) == lora.a.stride(-1) == 1
    assert slots.is_contiguous()
    assert scale.is_contiguous()
    assert norm is None or (norm.weight.shape == (inputs,) and norm.weight.is_contiguous())
    out = torch.empty((n, lora.a.shape[1]), dtype=torch.float32, device=x.device)
    if n == 0:
        return out
    if n <= FEW or not config.block_m:
        _shrink_few(x, lora, slots, scale, norm, out, config)
    else:
        x = x if norm is None else rms_norm(x, norm.weight, norm.eps, config=NORMED)
        _shrink_many(x, lora, slots, scale, out, config)
    return out


def _shrink_few(
    x: Tensor, lora: Lora, slots: Tensor, scale: Tensor, norm: Norm | None, out: Tensor, config: Config
) -> None:
    lora_shrink_kernel[out.shape](
        x,
        lora.a,
        scale,
        slots,
        norm.weight if norm is not None else None,
        out,
        norm.eps if norm is not None else 0.0,
        x.stride(0),
        *lora.a.stride()[:2],
        IN=x.shape[1],
        BLOCK=min(PER_THREAD * 32 * config.warps, triton.next_power_of_2(x.shape[1])),
        NORM=norm is not None,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )


def _shrink_many(x: Tensor, lora: Lora, slots: Tensor, scale: Tensor, out: Tensor, config: Config) -> None:
    """No wider tiles than the outputs; a warp for 16 rows by 8 outputs, but 4 at least for the copies."""
    assert SPLIT % config.block_k == 0
    (n, inputs), outputs = x.shape, out.shape[1]
    block_n = max(16, min(config.block_n, triton.next_power_of_2(outputs)))
    tiles, splits = (triton.cdiv(n, config.block_m), triton.cdiv(outputs, block_n)), triton.cdiv(inputs, SPLIT)
    lora_shrink_rows_kernel[(*tiles, splits)](
        x,
        lora.a,
        scale,
        slots,
        torch.empty((splits, n, outputs), dtype=torch.float32, device=x.device),
        torch.zeros(tiles, dtype=torch.int32, device=x.device),
        out,
        n,
        outputs,
        x.stride(0),
        *lora.a.stride()[:2],
        IN=inputs,
        SPLIT=SPLIT,
        BLOCK_M=config.block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        num_warps=min(config.warps, max(4, config.block_m // 16 * block_n // 8)),
        num_stages=config.stages,
    )


def lora_expand(shrunk: Tensor, lora: Lora, slots: Tensor, y: Tensor, *, config: Config) -> Tensor:
    """shrunk [n, parts * R] fp32, slots [n] int32; y [n, out] is added to in place, and comes back."""
    n, rank = len(y), lora.rank
    assert y.dtype == lora.b.dtype
    assert shrunk.dtype == torch.float32
    assert len(lora.ends) <= 3
    assert y.shape[1] == lora.b.shape[1] == lora.ends[-1]
    assert shrunk.shape == (n, len(lora.ends) * rank)
    assert slots.shape == (n,)
    assert shrunk.stride(-1) == lora.b.stride(-1) == y.stride(-1) == 1
    assert slots.is_contiguous()
    if n == 0:
        return y
    tiles = sum(
        triton.cdiv(end - begin, config.block_n) for begin, end in zip((0, *lora.ends), lora.ends, strict=False)
    )
    ends = (*lora.ends, lora.ends[-1], lora.ends[-1])[:3]
    strides = shrunk.stride(0), *lora.b.stride()[:2], y.stride(0)
    if n <= FEW or not config.block_m:
        lora_expand_kernel[(n, tiles)](
            *(shrunk, lora.b, slots, y, *ends, *strides),
            RANK=rank,
            STEP=min(RANKS, triton.next_power_of_2(rank)),
            BLOCK=config.block_n,
            num_warps=config.warps,
            enable_fp_fusion=True,
        )
        return y
    lora_expand_rows_kernel[(tiles, triton.cdiv(n, config.block_m))](
        *(shrunk, lora.b, slots, y, n, *ends, *strides),
        RANK=rank,
        STEP=min(config.block_k, max(16, triton.next_power_of_2(rank))),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return y
