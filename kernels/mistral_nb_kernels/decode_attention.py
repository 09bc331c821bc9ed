"""Attention of one query a sequence over paged keys and values, by splits of fixed size and a combining step.

    out[b, h] = softmax(q[b, h] K[b, h // group]^T / sqrt(d)) V[b, h // group]      over lengths[b] tokens

A program takes one KV head's query heads together over `split` tokens, so the KV is read once; partial sums and their
base-2 log-sum-exps go to fp32 buffers, and one program a head adds them up, always in the same order. The split is a
size and not a count: what a sequence gets depends neither on the batch nor on the capacity of its page table. Programs
of splits past a sequence's length, or before its window, leave at once, so one CUDA graph serves every length; a
sequence of length 0 is an empty place in the batch and gets zeros.

`rope_decode_attention` takes un-rotated q, k, v: the first launch turns the queries as it loads them, and the program
whose split holds the newest token turns and writes it, and counts it from registers: nobody reads it from the pages.
That saves a launch and a round trip of q, k and v.

16-bit types use the matrix unit, query heads padded to 16 rows; fp32, and everything on sm_75, sums on the ordinary
units. Bytes: 2 t hkv d an element of the KV; FLOPs: 4 t hq d. Source: Dao et al., 2023 (Flash-Decoding).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV
from mistral_nb_kernels.tiles import page_start, scores, softmax_step, weigh

__all__ = ["combine_kernel", "decode_attention", "rope_decode_attention", "split_kernel"]

COMBINED = 64
"""Splits that the combining step adds at a time."""


@triton.jit
def _turned(x, offsets, cos, sin, feature, inside, D: tl.constexpr):
    """x at `offsets` [m, d] rotated by cos, sin [d]; rounded to x's type, as a separate launch would."""
    partner = tl.where(feature < D // 2, D // 2, -(D // 2))
    sign = tl.where(feature < D // 2, -1.0, 1.0)
    own = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + offsets + partner, mask=inside, other=0.0).to(tl.float32)
    return (own * cos + other * sign * sin).to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["window", "splits", "stride_table"])
def split_kernel(
    q,
    k_new,
    v_new,
    cos,
    sin,
    k,
    v,
    table,
    lengths,
    partial,
    lse,
    scale,
    window,
    splits,
    stride_q,
    stride_q_head,
    stride_k_new,
    stride_k_new_head,
    stride_v_new,
    stride_v_new_head,
    stride_angle,
    stride_page,
    stride_page_head,
    stride_token,
    stride_table,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: (KV heads, splits, sequences). k_new, v_new, cos, sin are read with ROPE only."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + sequence)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(length - window, 0)
    begin = split * SPLIT
    end = begin + SPLIT
    if (begin >= length) | (end <= lowest):
        return
    feature = tl.arange(0, D)
    member = tl.arange(0, PADDED)
    heads = kv_head * GROUP + member
    inside = (member < GROUP)[:, None]
    q_offsets = heads[:, None] * stride_q_head + feature[None, :]
    q += sequence * stride_q
    stored = length
    if ROPE:
        stored = length - 1
        angle = stored.to(tl.int64) * stride_angle + feature
        c, s = tl.load(cos + angle)[None, :], tl.load(sin + angle)[None, :]
        query = _turned(q, q_offsets, c, s, feature[None, :], inside, D)
    else:
        query = tl.load(q + q_offsets, mask=inside, other=0.0)
    table += sequence * stride_table
    k += kv_head * stride_page_head
    v += kv_head * stride_page_head

    highest = tl.full((PADDED,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    acc = tl.zeros((PADDED, D), tl.float32)
    column = tl.arange(0, BLOCK_N)
    tile = column[:, None] * stride_token + feature[None, :]
    begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)
    following = page_start(table, begin, stored - 1, stride_page, stride_token, PAGE)
    for at in tl.range(begin, tl.minimum(end, stored), BLOCK_N):
        start = following
        following = page_start(table, at + BLOCK_N, stored - 1, stride_page, stride_token, PAGE)
        visible = at + column < stored
        if WINDOWED:
            visible = visible & (at + column >= lowest)
        keys = tl.load(k + start + tile, mask=visible[:, None], other=0.0)
        scored = tl.where(visible[None, :], scores(query, keys, DOT), float("-inf"))
        p, highest, decay = softmax_step(scored, highest, scale)
        values = tl.load(v + start + tile, mask=visible[:, None], other=0.0)
        total = total * decay + tl.sum(p, axis=1)
        acc = weigh(p, values, acc * decay[:, None], DOT)

    if ROPE:  # noqa: SIM102 - of a condition with `and` Triton compiles both sides
        if stored < end:
            new = kv_head * stride_k_new_head + feature[None, :]
            key = _turned(k_new + sequence * stride_k_new, new, c, s, feature[None, :], feature[None, :] < D, D)
            value = tl.load(v_new + sequence * stride_v_new + kv_head * stride_v_new_head + feature)[None, :]
            place = page_start(table, stored, stored, stride_page, stride_token, PAGE) + feature[None, :]
            tl.store(k + place, key)
            tl.store(v + place, value)
            scored = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1)
            p, highest, decay = softmax_step(scored[:, None], highest, scale)
            total = total * decay + tl.sum(p, axis=1)
            acc = acc * decay[:, None] + p * value.to(tl.float32)

    row = (sequence * tl.num_programs(0) * GROUP + heads) * splits + split
    tl.store(lse + row, highest + tl.log2(total), mask=member < GROUP)
    tl.store(partial + row[:, None] * D + feature[None, :], acc / total[:, None], mask=inside)


@triton.jit(do_not_specialize=["window", "splits"])
def combine_kernel(
    partial,
    lse,
    lengths,
    out,
    window,
    splits,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Grid: (query heads, sequences). Adds the splits of one head, weighed by their log-sum-exps."""
    head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    length = tl.load(lengths + tl.program_id(1))
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(length - window, 0)
    last = tl.cdiv(length, SPLIT)
    feature = tl.arange(0, D)
    highest = tl.full((1,), float("-inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    acc = tl.zeros((D,), tl.float32)
    for at in tl.range(lowest // SPLIT, last, BLOCK):
        split = at + tl.arange(0, BLOCK)
        row = head * splits + split
        weight = tl.load(lse + row, mask=split < last, other=float("-inf"))
        part = tl.load(partial + row[:, None] * D + feature[None, :], mask=(split < last)[:, None], other=0.0)
        p, highest, decay = softmax_step(weight[None, :], highest, 1.0)
        total = total * decay + tl.sum(p, axis=1)
        acc = acc * decay + tl.sum(tl.trans(p) * part, axis=0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + head * D + feature, (acc / total).to(out.dtype.element_ty))


def decode_attention(
    q: Tensor, lengths: Tensor, kv: PagedKV, window: int | None = None, *, config: Config, dot: bool = True
) -> Tensor:
    """q [batch, hq, d], the newest token of each sequence; lengths [batch] int32 with it -> [batch, hq, d]."""
    return _attend(q, None, None, None, None, lengths, kv, window, config, dot)


def rope_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    kv: PagedKV,
    window: int | None = None,
    *,
    config: Config,
    dot: bool = True,
) -> Tensor:
    """The same of un-rotated q [batch, hq, d], and k, v [batch, hkv, d] of the newest token, which are written."""
    assert cos.stride() == sin.stride()
    assert k.stride(-1) == v.stride(-1) == cos.stride(-1) == 1
    return _attend(q, k, v, cos, sin, lengths, kv, window, config, dot)


def _attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor,
    kv: PagedKV,
    window: int | None,
    config: Config,
    dot: bool,
) -> Tensor:
    batch, hq, d = q.shape
    assert q.stride(-1) == 1
    group = hq // kv.n_kv_heads
    dot = dot and q.dtype != torch.float32
    splits = triton.cdiv(kv.table.shape[1] * kv.page, config.split)
    partial = torch.empty((batch, hq, splits, d), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, hq, splits), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, hq, d), dtype=q.dtype, device=q.device)
    split_kernel[(kv.n_kv_heads, splits, batch)](
        q,
        k,
        v,
        cos,
        sin,
        kv.k,
        kv.v,
        kv.table,
        lengths,
        partial,
        lse,
        d**-0.5 * math.log2(math.e),
        window or 0,
        splits,
        *q.stride()[:2],
        *(k.stride()[:2] if k is not None else (0, 0)),
        *(v.stride()[:2] if v is not None else (0, 0)),
        cos.stride(0) if cos is not None else 0,
        *kv.k.stride()[:3],
        kv.table.stride(0),
        GROUP=group,
        PADDED=max(16, triton.next_power_of_2(group)) if dot else triton.next_power_of_2(group),
        D=d,
        SPLIT=config.split,
        BLOCK_N=min(config.block_n, kv.page),
        PAGE=kv.page,
        WINDOWED=window is not None,
        ROPE=k is not None,
        DOT=dot,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    combine_kernel[(hq, batch)](
        partial,
        lse,
        lengths,
        out,
        window or 0,
        splits,
        D=d,
        SPLIT=config.split,
        BLOCK=COMBINED,
        WINDOWED=window is not None,
        num_warps=8,
    )
    return out
