"""What `linear`'s kernel multiplies by: a tile of outputs with a few rows, by mma or by sums.

Both go over k once, add up the squares of x beside the products for a norm, and take weights in 16 or 32 bits, int8
without its scale, or int4 (`packed` has the order of its codes). `units` are k's places in a row of weights: bytes for
int4, else elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["affine_of", "by_dots", "by_sums"]


@triton.jit
def affine_of(words):
    """A group's scale and minimum in fp32, of the two fp16 of a word."""
    scale = words.to(tl.int16).to(tl.float16, bitcast=True)
    minimum = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def _add_product(acc, tile, words, x, HALF: tl.constexpr, BITS: tl.constexpr):
    """acc [s, outputs, n] + weights [s, outputs, k] x [s, k, n] on the matrix unit; of int4 one half of the codes.

    The ones are made of the tile, though they do not depend on it: so both products take x in one layout.
    """
    if BITS == 4:
        scale, minimum = affine_of(words)
        if HALF == 0:
            code = tile & 15
        else:
            code = (tile & 0xF0) ^ 0x80
            minimum += 8 * scale
            scale = scale / 16
        one = ((tile & 15) & 0xF0) | 1
        product = tl.dot(code.to(tl.int8, bitcast=True).to(x.dtype), x)
        total = tl.dot(one.to(tl.int8, bitcast=True).to(x.dtype), x)
        return acc + scale[:, :, None] * product + minimum[:, :, None] * total
    else:
        return tl.dot(tile.to(x.dtype), x, acc)


@triton.jit
def by_dots(
    x,
    norm,
    weight,
    affine,
    row,
    rows,
    output,
    outputs,
    units,
    stride_x,
    stride_weight,
    stride_group,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums [BLOCK_N, N] of `output` and, GATED, of `outputs` further, and of squares [N]. Warps take slices of k."""
    slice_ = tl.arange(0, SLICES)
    place = tl.arange(0, TILE)
    existing = (output < outputs)[None, :, None]
    read = (row < rows)[None, :, None]
    acc = tl.zeros((SLICES, BLOCK_N, N), tl.float32)
    up = tl.zeros((SLICES, BLOCK_N, N), tl.float32)
    squares = tl.zeros((SLICES, N, TILE), tl.float32)
    up_weight = weight + (output.to(tl.int64) + outputs)[None, :, None] * stride_weight + place[None, None, :]
    weight += output.to(tl.int64)[None, :, None] * stride_weight + place[None, None, :]
    x += row.to(tl.int64)[None, :, None] * stride_x + place[None, None, :]
    for at in tl.range(0, units, SLICES * TILE, num_stages=STAGES):
        first = at + slice_ * TILE
        inside = (first[:, None, None] + place[None, None, :]) < units
        tile = tl.load(weight + first[:, None, None], mask=existing & inside, other=0)
        up_tile = tile
        if GATED:
            up_tile = tl.load(up_weight + first[:, None, None], mask=existing & inside, other=0)
        for half in tl.static_range(2 if BITS == 4 else 1):
            words, up_words = 0, 0
            feature = first
            if BITS == 4:
                feature = first // GROUP * (2 * GROUP) + first % GROUP + half * GROUP
                group = (first // GROUP * 2 + half).to(tl.int64)[:, None] * stride_group + output[None, :]
                known = (first < units)[:, None] & (output < outputs)[None, :]
                words = tl.load(affine + group, mask=known, other=0)
                if GATED:
                    up_words = tl.load(affine + group + outputs, mask=known, other=0)
            value = tl.load(x + feature[:, None, None], mask=read & inside, other=0.0)
            if NORM:
                wide = value.to(tl.float32)
                squares += wide * wide
                factor = norm + feature[:, None, None] + place[None, None, :]
                value = (wide * tl.load(factor, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
            value = tl.trans(value, (0, 2, 1))
            acc = _add_product(acc, tile, words, value, half, BITS)
            if GATED:
                up = _add_product(up, up_tile, up_words, value, half, BITS)
    return tl.sum(acc, axis=0), tl.sum(up, axis=0), tl.sum(tl.sum(squares, axis=2), axis=0)


@triton.jit
def _wide(tile, words, HALF: tl.constexpr, BITS: tl.constexpr):
    """Weights [outputs, chunks, CHUNK] in fp32, int8 without its scale."""
    if BITS == 4:
        scale, minimum = affine_of(words)
        return ((tile >> 4 * HALF) & 15).to(tl.float32) * scale[:, :, None] + minimum[:, :, None]
    else:
        return tile.to(tl.float32)


@triton.jit
def by_sums(
    x,
    norm,
    weight,
    affine,
    row,
    rows,
    output,
    outputs,
    units,
    stride_x,
    stride_weight,
    stride_group,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
):
    """The same of one row, on the ordinary units: row [1] -> [BLOCK_N, 1] twice, [1]. CHUNK weights are 16 bytes."""
    chunk = tl.arange(0, BLOCK_K // CHUNK) * CHUNK
    place = chunk[:, None] + tl.arange(0, CHUNK)[None, :]
    existing = (output < outputs)[:, None, None]
    acc = tl.zeros((BLOCK_N, BLOCK_K // CHUNK), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K // CHUNK), tl.float32)
    squares = tl.zeros((BLOCK_K // CHUNK, CHUNK), tl.float32)
    up_weight = weight + (output.to(tl.int64) + outputs)[:, None, None] * stride_weight + place[None, :, :]
    weight += output.to(tl.int64)[:, None, None] * stride_weight + place[None, :, :]
    x += tl.sum(row, axis=0).to(tl.int64) * stride_x
    for at in tl.range(0, units, BLOCK_K):
        inside = at + place < units
        tile = tl.load(weight + at, mask=existing & inside[None, :, :], other=0)
        up_tile = tile
        if GATED:
            up_tile = tl.load(up_weight + at, mask=existing & inside[None, :, :], other=0)
        for half in tl.static_range(2 if BITS == 4 else 1):
            words, up_words = 0, 0
            feature = at + place
            if BITS == 4:
                feature = feature // GROUP * (2 * GROUP) + feature % GROUP + half * GROUP
                group = ((at + chunk) // GROUP * 2 + half).to(tl.int64)[None, :] * stride_group + output[:, None]
                known = (output < outputs)[:, None] & (at + chunk < units)[None, :]
                words = tl.load(affine + group, mask=known, other=0)
                if GATED:
                    up_words = tl.load(affine + group + outputs, mask=known, other=0)
            value = tl.load(x + feature, mask=inside, other=0.0).to(tl.float32)
            if NORM:
                squares += value * value
                value *= tl.load(norm + feature, mask=inside, other=0.0).to(tl.float32)
            acc += tl.sum(_wide(tile, words, half, BITS) * value[None, :, :], axis=2)
            if GATED:
                up += tl.sum(_wide(up_tile, up_words, half, BITS) * value[None, :, :], axis=2)
    squares = tl.sum(tl.sum(squares, axis=1), axis=0)
    return tl.sum(acc, axis=1)[:, None], tl.sum(up, axis=1)[:, None], tl.zeros((1,), tl.float32) + squares
