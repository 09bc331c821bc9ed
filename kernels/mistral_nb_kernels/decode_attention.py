"""Attention of one query a sequence over paged keys and values, by splits of fixed size, in one launch.

    out[b, h] = softmax(q[b, h] K[b, h // group]^T / sqrt(d)) V[b, h // group]      over lengths[b] tokens

A program takes one KV head's query heads together over `split` tokens, so the KV is read once; partial sums and their
base-2 log-sum-exps go to fp32 buffers. The last program of a KV head of a sequence to arrive, by a counter, adds them
up, always in the same order. There are about as many programs as the GPU holds, each with every so many-th split: those
that a sequence's length or window leaves none end at once, so one CUDA graph serves every length. The split is a size
and not a count: what a sequence gets depends neither on the batch, nor on the capacity of its page table, nor on the
number of programs. A sequence of length 0 is an empty place in the batch and gets zeros; a length past the capacity, of
a step that ran ahead of the host, counts as the capacity, and nothing is written for it.

`rope_decode_attention` takes un-rotated q, k, v: programs turn the queries as they load them, and the one whose split
holds the newest token turns and writes it first. That saves a launch and a round trip of q, k and v.

16-bit types use the matrix unit, query heads padded to 16 rows; fp32, and everything on sm_75, sums on the ordinary
units. Bytes: 2 t hkv d an element of the KV; FLOPs: 4 t hq d. Source: Dao et al., 2023 (Flash-Decoding).
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV
from mistral_nb_kernels.tiles import page_start, scores, softmax_step, weigh

__all__ = ["decode_attention", "programs", "rope_decode_attention", "split_kernel"]

COMBINED = 4096
"""Partial sums that the combining step adds at a time, at most: 32 registers of 4 warps. On the matrix unit as many as
have the bytes of a tile of keys, so that what is in flight takes no more shared memory than keys and values did.
"""
RESIDENT = 4
"""Programs for each multiprocessor: a little more than it holds, by registers or shared memory, of any config."""
FEWEST = 8
"""Programs for a KV head of a sequence at least, so that a long sequence among many short ones has enough."""


@triton.jit
def _turned(own, other, cos, sin, feature, inside):
    """own [m, d], with `other` the same half a head away, rotated by the angles at cos, sin + feature [1, d]; rounded.

    Angles are loaded for each row, in its layout: one row handed around would stop all warps at barriers.
    """
    at = tl.broadcast_to(feature, own.shape)
    half: tl.constexpr = own.shape[1] // 2
    c, s = tl.load(cos + at, mask=inside, other=0.0), tl.load(sin + at, mask=inside, other=0.0)
    sign = tl.where(feature < half, -1.0, 1.0)
    return (own.to(tl.float32) * c + other.to(tl.float32) * sign * s).to(own.dtype)


@triton.jit
def _combine(
    partial,
    lse,
    out,
    first,
    last,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [GROUP, D]: the splits from `first` to `last` of partial [splits, GROUP, D], weighed by lse [splits, GROUP].

    Heads lie beside features, so that warps share them out and a thread adds its splits by itself. Loads that feed no
    `tl.dot` run ahead of a loop only where the loop itself says so.
    """
    member = tl.arange(0, HEADS)
    feature = tl.arange(0, D)
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, D), tl.float32)
    for at in tl.range(first, last, BLOCK, num_stages=STAGES):
        split = at + tl.arange(0, BLOCK)
        row = split[:, None] * GROUP + member[None, :]
        inside = (split < last)[:, None] & (member < GROUP)[None, :]
        weight = tl.load(lse + row, mask=inside, other=float("-inf"))
        part = tl.load(partial + row[:, :, None] * D + feature[None, None, :], mask=inside[:, :, None], other=0.0)
        p, highest, decay = softmax_step(tl.trans(weight), highest, 1.0)
        total = total * decay + tl.sum(p, axis=1)
        acc = acc * decay[:, None] + tl.sum(tl.trans(p)[:, :, None] * part, axis=0)
    total = tl.where(total == 0.0, 1.0, total)
    out += member[:, None] * D + feature[None, :]
    tl.store(out, (acc / total[:, None]).to(out.dtype.element_ty), mask=(member < GROUP)[:, None])


@triton.jit(do_not_specialize=["window", "capacity", "stride_table"])
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
    arrived,
    partial,
    lse,
    out,
    scale,
    window,
    capacity,
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
    HEADS: tl.constexpr,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Grid: (KV heads, sequences, programs). k_new, v_new, cos, sin are read with ROPE only.

    partial [sequences, KV heads, splits, GROUP, D], lse the same without D; arrived [sequences, KV heads], zeros before
    and after.
    """
    kv_head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    program, programs = tl.program_id(2), tl.num_programs(2)
    feature = tl.arange(0, D)[None, :]
    member = tl.arange(0, PADDED)
    inside = (member < GROUP)[:, None]
    q += sequence * stride_q + (kv_head * GROUP + member)[:, None] * stride_q_head
    table += sequence * stride_table
    k += kv_head * stride_page_head
    v += kv_head * stride_page_head
    if not ROPE:
        query = tl.load(q + feature, mask=inside, other=0.0)
    asked = tl.load(lengths + sequence)
    length = tl.minimum(asked, capacity)
    lowest = 0
    if WINDOWED:
        lowest = tl.maximum(length - window, 0)
    first, last = lowest // SPLIT, tl.cdiv(length, SPLIT)
    # an empty place has one program, for its zeros
    arriving = tl.minimum(tl.maximum(last - first, 1), programs)
    if program >= arriving:
        return
    # looked up before the angles are waited for
    lowest_tile = lowest // BLOCK_N * BLOCK_N
    begin = tl.maximum((first + program) * SPLIT, lowest_tile)
    opening = page_start(table, begin, length - 1, stride_page, stride_token, PAGE)
    if ROPE:
        angle = tl.maximum(length - 1, 0).to(tl.int64) * stride_angle
        cos += angle
        sin += angle
        partner = (feature + D // 2) % D
        if (program == (last - 1 - first) % programs) & (length > 0):
            k_new += sequence * stride_k_new + kv_head * stride_k_new_head
            v_new += sequence * stride_v_new + kv_head * stride_v_new_head
            place = page_start(table, length - 1, length - 1, stride_page, stride_token, PAGE) + feature
            every = feature < D
            within = feature < tl.where(asked <= capacity, D, 0)
            turned = _turned(tl.load(k_new + feature), tl.load(k_new + partner), cos, sin, feature, every)
            tl.store(k + place, turned, mask=within)
            tl.store(v + place, tl.load(v_new + feature), mask=within)
            tl.debug_barrier()  # this program alone reads them, in its last tile
        own, other = tl.load(q + feature, mask=inside, other=0.0), tl.load(q + partner, mask=inside, other=0.0)
        query = _turned(own, other, cos, sin, feature, inside)

    head = sequence * tl.num_programs(0) + kv_head
    rows = head * tl.cdiv(capacity, SPLIT) * GROUP
    lse += rows
    partial += rows * D
    column = tl.arange(0, BLOCK_N)
    tile = column[:, None] * stride_token + feature
    for split in tl.range(first + program, last, programs):
        begin = tl.maximum(split * SPLIT, lowest_tile)
        following = opening
        highest = tl.full((PADDED,), float("-inf"), tl.float32)
        total = tl.zeros((PADDED,), tl.float32)
        acc = tl.zeros((PADDED, D), tl.float32)
        for at in tl.range(begin, tl.minimum(split * SPLIT + SPLIT, length), BLOCK_N):
            start = following
            following = page_start(table, at + BLOCK_N, length - 1, stride_page, stride_token, PAGE)
            visible = at + column < length
            if WINDOWED:
                visible = visible & (at + column >= lowest)
            keys = tl.load(k + start + tile, mask=visible[:, None], other=0.0)
            scored = tl.where(visible[None, :], scores(query, keys, DOT), float("-inf"))
            p, highest, decay = softmax_step(scored, highest, scale)
            values = tl.load(v + start + tile, mask=visible[:, None], other=0.0)
            total = total * decay + tl.sum(p, axis=1)
            acc = weigh(p, values, acc * decay[:, None], DOT)
        row = split * GROUP + member
        tl.store(lse + row, highest + tl.log2(total), mask=member < GROUP)
        tl.store(partial + row[:, None] * D + feature, acc / total[:, None], mask=inside)
        opening = page_start(table, (split + programs) * SPLIT, length - 1, stride_page, stride_token, PAGE)

    tl.debug_barrier()  # every warp has stored its sums before one thread says so
    if tl.atomic_add(arrived + head, 1, sem="acq_rel", scope="gpu") == arriving - 1:
        tl.store(arrived + head, 0)
        _combine(partial, lse, out + head * GROUP * D, first, last, GROUP, HEADS, D, BLOCK, STAGES)


def programs(splits: int, heads: int, device: torch.device) -> int:
    """Programs for each of `heads` KV heads, over all sequences: about what the GPU holds, never more than splits."""
    held: int = triton.cdiv(RESIDENT * _multiprocessors(device), heads)
    return min(splits, max(FEWEST, held))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def decode_attention(
    q: Tensor, lengths: Tensor, kv: PagedKV, window: int | None = None, *, config: Config, dot: bool = True
) -> Tensor:
    """q [batch, hq, d], the newest token of each sequence; lengths [batch] int32 with it -> [batch, hq, d]."""
    return _attend(q, None, lengths, kv, window, config, dot)


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
    """The same of un-rotated q [batch, hq, d], and k, v [batch, hkv, d] of the newest token, which are written.

    cos, sin [positions, d] by `rope_table`: a row for each position below the longest of the lengths, of which what is
    past the capacity does not count.
    """
    assert k.shape == v.shape == (len(q), kv.n_kv_heads, q.shape[-1])
    assert cos.stride() == sin.stride()
    assert k.stride(-1) == v.stride(-1) == cos.stride(-1) == 1
    return _attend(q, (k, v, cos, sin), lengths, kv, window, config, dot)


def _attend(
    q: Tensor,
    newest: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    lengths: Tensor,
    kv: PagedKV,
    window: int | None,
    config: Config,
    dot: bool,
) -> Tensor:
    """`newest`: k, v, cos, sin."""
    batch, hq, d = q.shape
    assert q.stride(-1) == 1
    assert batch <= len(kv.table)
    assert len(lengths) == batch
    assert hq % kv.n_kv_heads == 0
    capacity = kv.table.shape[1] * kv.page
    splits = triton.cdiv(capacity, config.split)
    partial = torch.empty((batch, hq, splits, d), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, hq, splits), dtype=torch.float32, device=q.device)
    out = torch.empty((batch, hq, d), dtype=q.dtype, device=q.device)
    given: tuple[Tensor | None, ...] = (None,) * 4
    strides: tuple[int, ...] = (0,) * 5
    if newest is not None:
        given, strides = newest, (*newest[0].stride()[:2], *newest[1].stride()[:2], newest[2].stride(0))
    split_kernel[(kv.n_kv_heads, batch, programs(splits, kv.n_kv_heads * batch, q.device))](
        *(q, *given, kv.k, kv.v, kv.table, lengths, kv.arrived, partial, lse, out),
        d**-0.5 * math.log2(math.e),
        window or 0,
        capacity,
        *(*q.stride()[:2], *strides, *kv.k.stride()[:3], kv.table.stride(0)),
        **_sizes(hq // kv.n_kv_heads, d, kv.page, config, dot and q.dtype != torch.float32),
        WINDOWED=window is not None,
        ROPE=newest is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _sizes(group: int, d: int, page: int, config: Config, dot: bool) -> dict[str, int]:
    """What the kernel is compiled for. The matrix unit takes 16 rows at least."""
    heads = triton.next_power_of_2(group)
    padded = max(16, heads) if dot else heads
    block_n = min(_keys(config, padded, dot), page)
    combined = min(COMBINED, block_n * d // 2) if dot else COMBINED
    return {
        "GROUP": group,
        "PADDED": padded,
        "HEADS": heads,
        "D": d,
        "SPLIT": config.split,
        "BLOCK_N": block_n,
        "BLOCK": max(1, combined // (heads * d)),
        "STAGES": config.stages,
        "PAGE": page,
        "DOT": dot,
    }


def _keys(config: Config, padded: int, dot: bool) -> int:
    """Keys of a tile. The products that are summed on the ordinary units are all in registers: of more than 4 query
    heads there are fewer keys at a time.
    """
    return config.block_n if dot or padded <= 4 else max(1, 4 * config.block_n // padded)
