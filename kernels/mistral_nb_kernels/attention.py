"""Causal attention of several sequences' newest rows over their paged keys and values (prefill).

    out[i, h] = softmax(q[i, h] K[h // group]^T / sqrt(d) + mask) V[h // group]

Row i of a sequence stands at position p = lengths[b] - rows + i, wherever its rows begin: the first chunk of a prompt,
a later one, or what follows a reused prefix. It sees the tokens 0 .. p, the last `window` of them where one is given.
The scores of a tile stay on the chip (online softmax); tiles start at absolute positions, so a row's result is the same
to the bit however a prompt is cut into chunks. Only tiles at the diagonal and at the window's edge are masked. Programs
of all heads at the latest rows, which have the most to do, come first; the heads of one KV head run side by side and
find its tiles in L2.

FLOPs: 4 hq d a visible pair. Bytes: q, out and the KV once, and the KV again from L2 for each tile of rows.
Source: Dao, 2023 (FlashAttention-2).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV, Rows
from mistral_nb_kernels.tiles import page_start, scores, softmax_step, weigh

__all__ = ["prefill_attention", "prefill_kernel"]


@triton.jit(do_not_specialize=["window", "stride_table"])
def prefill_kernel(
    q,
    k,
    v,
    out,
    table,
    starts,
    lengths,
    scale,
    window,
    stride_q,
    stride_q_head,
    stride_page,
    stride_page_head,
    stride_token,
    stride_table,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Grid: (query heads, tiles of rows, sequences)."""
    head = tl.program_id(0)
    sequence = tl.program_id(2)
    first_row = tl.load(starts + sequence)
    rows = tl.load(starts + sequence + 1) - first_row
    top = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    if top >= rows:
        return
    length = tl.load(lengths + sequence)
    row = top + tl.arange(0, BLOCK_M)
    feature = tl.arange(0, D)
    inside = (row < rows)[:, None]
    rows_before = (first_row + row).to(tl.int64)[:, None]
    query = tl.load(q + rows_before * stride_q + head * stride_q_head + feature[None, :], mask=inside, other=0.0)
    k += (head // GROUP) * stride_page_head
    v += (head // GROUP) * stride_page_head
    table += sequence.to(tl.int64) * stride_table
    first = length - rows + top
    position = first + tl.arange(0, BLOCK_M)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    column = tl.arange(0, BLOCK_N)
    tile = column[:, None] * stride_token + feature[None, :]
    # tiles that end before this hold no key past the first query's own
    diagonal = (first + 1) // BLOCK_N * BLOCK_N
    begin, clear = 0, 0
    if WINDOWED:
        # the first query's window begins in the tile `begin`; from the tile `clear` on every query sees every key
        begin = tl.maximum(first - window + 1, 0) // BLOCK_N * BLOCK_N
        clear = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
    # 0: the window's edge; 1: what every query sees; 2: the diagonal
    for part in tl.static_range(0 if WINDOWED else 1, 3):
        if part == 0:
            end = tl.minimum(clear, diagonal)
        elif part == 1:
            end = diagonal
        else:
            end = tl.minimum(first + BLOCK_M, length)
        following = page_start(table, begin, end - 1, stride_page, stride_token, PAGE)
        for at in tl.range(begin, end, BLOCK_N):
            start = following
            following = page_start(table, at + BLOCK_N, end - 1, stride_page, stride_token, PAGE)
            if part == 1:
                keys = tl.load(k + start + tile)
                values = tl.load(v + start + tile)
                scored = scores(query, keys, True)
            else:
                stored = (at + column < length)[:, None]
                keys = tl.load(k + start + tile, mask=stored, other=0.0)
                values = tl.load(v + start + tile, mask=stored, other=0.0)
                visible = (at + column)[None, :] <= position[:, None]
                if WINDOWED:
                    visible = visible & ((at + column)[None, :] > position[:, None] - window)
                scored = tl.where(visible, scores(query, keys, True), float("-inf"))
            p, highest, decay = softmax_step(scored, highest, scale)
            total = total * decay + tl.sum(p, axis=1)
            acc = weigh(p, values, acc * decay[:, None], True)
        begin = end
    # a padding row may have no key in its window
    total = tl.where(total == 0.0, 1.0, total)
    out += rows_before * tl.num_programs(0) * D + head * D + feature[None, :]
    tl.store(out, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def prefill_attention(q: Tensor, rows: Rows, kv: PagedKV, window: int | None = None, *, config: Config) -> Tensor:
    """q [n, hq, d], rotated, whose keys and values are in the pages already -> [n, hq, d]."""
    n, hq, d = q.shape
    assert q.stride(-1) == 1
    out = torch.empty((n, hq, d), dtype=q.dtype, device=q.device)
    if n == 0:
        return out
    prefill_kernel[(hq, triton.cdiv(rows.longest, config.block_m), len(rows.lengths))](
        q,
        kv.k,
        kv.v,
        out,
        kv.table,
        rows.starts,
        rows.lengths,
        d**-0.5 * math.log2(math.e),
        window or 0,
        *q.stride()[:2],
        *kv.k.stride()[:3],
        kv.table.stride(0),
        GROUP=hq // kv.n_kv_heads,
        D=d,
        BLOCK_M=config.block_m,
        BLOCK_N=min(config.block_n, kv.page),
        PAGE=kv.page,
        WINDOWED=window is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
