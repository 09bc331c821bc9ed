"""What the attention kernels share: where a page's tile lies, scores and sums of a tile, the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["page_start", "scores", "softmax_step", "weigh"]


@triton.jit
def page_start(table, at, last, stride_page, stride_token, PAGE: tl.constexpr):
    """Offset of the token at position `at` of the sequence whose row of the page table is `table`.

    Loops over tiles look a tile up while the one before is worked on: the loads of a tile that waited for its lookup
    would take a stage of their pipeline. So `at` may be past the position `last`, of which no more is looked up.
    """
    page = tl.load(table + tl.maximum(tl.minimum(at, last), 0) // PAGE)
    return page.to(tl.int64) * stride_page + at % PAGE * stride_token


@triton.jit
def scores(q, k, DOT: tl.constexpr):
    """q [m, d] @ k [n, d]^T in fp32; by sums where the hardware has no matrix unit for the type."""
    if DOT:
        return tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        return tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32)[None, :, :], axis=2)


@triton.jit
def weigh(p, v, acc, DOT: tl.constexpr):
    """acc + p [m, n] @ v [n, d] in fp32."""
    if DOT:
        return tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    else:
        return acc + tl.sum(p[:, :, None] * v.to(tl.float32)[None, :, :], axis=1)


@triton.jit
def softmax_step(s, m, scale):
    """One step of the online softmax over scores s [m, n], -inf where masked, with the running maximum m [m].

    Returns the tile's weights, the new maximum, and the factor for what was summed so far. `scale` is d^-1/2 * log2(e):
    powers are of 2. Rows that have seen nothing yet keep -inf. The fused product is written out:
    left to the compiler, two loops over the same tiles might round differently. Source: Milakov, Gimelshein, 2018.
    """
    highest = tl.maximum(m, tl.max(s, axis=1) * scale)
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    return tl.exp2(tl.fma(s, scale, -pivot[:, None])), highest, tl.exp2(m - pivot)
