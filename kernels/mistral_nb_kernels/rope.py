"""RoPE on queries and keys with the KV write, in one launch.

    y[i]       = x[i] cos(a_i) - x[i + d/2] sin(a_i)        i < d/2; a_i = position * theta^(-2i/d), by the table
    y[i + d/2] = x[i + d/2] cos(a_i) + x[i] sin(a_i)

The pairing is half-split, everywhere; loaders permute checkpoints that pair neighbours. q [n, hq, d] comes back
rotated, k [n, hkv, d] goes rotated and v as it is to the pages. Rows may be strided views of one packed projection.
Angles come from `rope_table`: fp32, so that 32k positions keep their phase, with the model's theta and scaling.

Fused because the KV write alone would read and write k and v again. The least that a token moves is 2 (hq + 2 hkv) d
elements and 4 d bytes of the table. One program turns one token: all heads share its angles.
Source: Su et al., 2021 (RoFormer).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV, Rows

__all__ = ["rope_write", "rope_write_kernel"]


@triton.jit
def _halves(x, stride, HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr):
    """Both halves [HEADS, HALF] of each head of x, in fp32."""
    head = tl.arange(0, PADDED)[:, None]
    at = x + head * stride + tl.arange(0, HALF)[None, :]
    first = tl.load(at, mask=head < HEADS, other=0.0)
    second = tl.load(at + HALF, mask=head < HEADS, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _turn(first, second, cos, sin, y, stride, HEADS: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr):
    """The halves, rotated by cos, sin [HALF], into y."""
    head = tl.arange(0, PADDED)[:, None]
    at = y + head * stride + tl.arange(0, HALF)[None, :]
    tl.store(at, (first * cos[None, :] - second * sin[None, :]).to(y.dtype.element_ty), mask=head < HEADS)
    tl.store(at + HALF, (second * cos[None, :] + first * sin[None, :]).to(y.dtype.element_ty), mask=head < HEADS)


@triton.jit(do_not_specialize=["stride_table"])
def rope_write_kernel(
    q,
    k,
    v,
    out,
    cos,
    sin,
    sequences,
    positions,
    k_pages,
    v_pages,
    table,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    stride_angle,
    stride_page,
    stride_page_head,
    stride_token,
    stride_table,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    Q_PADDED: tl.constexpr,
    KV_PADDED: tl.constexpr,
):
    """Grid: one program a row, which loads all that it reads before it stores: nothing waits behind a store."""
    row = tl.program_id(0).to(tl.int64)
    q1, q2 = _halves(q + row * stride_q, stride_q_head, HQ, Q_PADDED, D // 2)
    k1, k2 = _halves(k + row * stride_k, stride_k_head, HKV, KV_PADDED, D // 2)
    head = tl.arange(0, KV_PADDED)[:, None]
    whole = tl.arange(0, D)[None, :]
    value = tl.load(v + row * stride_v + head * stride_v_head + whole, mask=head < HKV)
    position = tl.load(positions + row)
    sequence = tl.load(sequences + row).to(tl.int64)
    if position < 0:
        return
    page = tl.load(table + sequence * stride_table + position // PAGE).to(tl.int64)
    angle = position.to(tl.int64) * stride_angle + tl.arange(0, D // 2)
    c, s = tl.load(cos + angle), tl.load(sin + angle)
    place = page * stride_page + position % PAGE * stride_token
    _turn(q1, q2, c, s, out + row * HQ * D, D, HQ, Q_PADDED, D // 2)
    _turn(k1, k2, c, s, k_pages + place, stride_page_head, HKV, KV_PADDED, D // 2)
    tl.store(v_pages + place + head * stride_page_head + whole, value, mask=head < HKV)


def rope_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Rows, kv: PagedKV, *, config: Config
) -> Tensor:
    """q [n, hq, d] rotated; k, v [n, hkv, d] are written to the pages. cos, sin [positions, d] by `rope_table`.

    Of a padding row nothing is written, and its queries come back undefined.
    """
    n, hq, d = q.shape
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == cos.stride(-1) == 1
    assert cos.stride() == sin.stride()
    out = torch.empty((n, hq, d), dtype=q.dtype, device=q.device)
    if n == 0:
        return out
    rope_write_kernel[(n,)](
        q,
        k,
        v,
        out,
        cos,
        sin,
        rows.sequences,
        rows.positions,
        kv.k,
        kv.v,
        kv.table,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        cos.stride(0),
        *kv.k.stride()[:3],
        kv.table.stride(0),
        HQ=hq,
        HKV=kv.n_kv_heads,
        D=d,
        PAGE=kv.page,
        Q_PADDED=triton.next_power_of_2(hq),
        KV_PADDED=triton.next_power_of_2(kv.n_kv_heads),
        num_warps=config.warps,
    )
    return out
