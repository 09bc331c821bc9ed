"""RoPE and attention over paged keys and values, in torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_nb_kernels.paged import PagedKV, Rows
from mistral_nb_kernels.reference.layers import in_type

__all__ = [
    "RopeScaling",
    "attention",
    "prefill_attention",
    "rope",
    "rope_prefill_attention",
    "rope_table",
    "rope_write",
]

ROWS = 4
"""On the CPU SDPA gives numbers of queries that are no multiple of it other bits with one thread than with two."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a model's angles were stretched after its training, in the names of Hugging Face's `rope_parameters`.

    "linear" divides every frequency by `factor`. "llama3" divides those that turn less than `low_freq_factor` times in
    `original_max_position_embeddings` positions, keeps those that turn more than `high_freq_factor` times, and weighs
    in between. The last three are of "llama3" alone.
    """

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rope_table(
    positions: int,
    d: int,
    theta: float,
    device: torch.device | str = "cpu",
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, d] of the half-split pairing: features i and i + d/2 turn by pos * theta^(-2i/d).

    The angles are computed in fp32 from fp32 frequencies, as transformers does. Sources: Su et al., 2021 (RoFormer);
    Chen et al., 2023 ("linear"); Llama Team, 2024 ("llama3").
    """
    inverse = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.int64, device=device).float() / d)
    if scaling is not None:
        kept = torch.zeros_like(inverse)
        if scaling.rope_type == "llama3":
            turns = scaling.original_max_position_embeddings / (2 * math.pi / inverse)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        inverse = (1 - kept) * inverse / scaling.factor + kept * inverse
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin_()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [n, heads, d] by cos, sin [n, d] of its rows' positions; half-split pairing. -> [n, heads, d]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return in_type((x * cos[:, None]).addcmul_(turned, sin[:, None]), x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal grouped-query attention of one sequence's last n tokens over its first t.

    q [n, hq, d]; k, v [hkv, t, d] with t >= n, the queries standing at positions t-n .. t-1; each sees itself and what
    comes before, the last `window` positions of it where a window is given. Scores are scaled by d^-1/2. -> [n, hq, d].
    Where no fused kernel of SDPA shares KV heads, they are repeated, so that none keeps every head's scores.
    """
    n, hq, d = q.shape
    hkv, t, _ = k.shape
    group = hq // hkv
    if n == 1:
        if window is not None and t > window:
            k, v = k[:, t - window :], v[:, t - window :]
        heads = q.view(1, hkv, group, d)
        if group % ROWS and q.device.type == "cpu":
            heads = F.pad(heads, (0, 0, 0, -group % ROWS))
        return F.scaled_dot_product_attention(heads, k[None], v[None])[:, :, :group].reshape(1, hq, d)
    if window is not None and t - n >= window:
        first = t - n - window + 1
        k, v, t = k[:, first:], v[:, first:], t - first
    mask = None
    if t > n or (window is not None and t > window):
        rows = torch.arange(t - n, t, device=q.device)[:, None]
        columns = torch.arange(t, device=q.device)[None]
        mask = columns <= rows
        if window is not None:
            mask &= columns > rows - window
    shared = group > 1
    if shared and not _shares_heads(q, mask):
        shared = False
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    if n % ROWS and q.device.type == "cpu":
        q = F.pad(q, (0, 0, 0, 0, 0, -n % ROWS))
        mask = None if mask is None else F.pad(mask, (0, 0, 0, -n % ROWS), value=True)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=shared
    )
    return out[0].transpose(0, 1)[:n]


def _shares_heads(q: Tensor, mask: Tensor | None) -> bool:
    """Whether SDPA's fused kernel takes fewer KV heads: on a GPU flash alone, from 8.0 on, 16 bits, no mask."""
    if q.device.type != "cuda":
        return True
    return mask is None and q.itemsize == 2 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def rope_write(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Rows, kv: PagedKV) -> Tensor:
    """q [n, hq, d] rotated; k [n, hkv, d] goes rotated, v as it is, to the pages. cos, sin [positions, d].

    Of a padding row nothing is written, and its queries come back undefined.
    """
    q, k = (_turned(heads, cos, sin, rows) for heads in (q, k))
    _write(k, v, rows, kv)
    return q


def prefill_attention(q: Tensor, rows: Rows, kv: PagedKV, window: int | None = None) -> Tensor:
    """`attention` of each sequence's rows over its pages; q [n, hq, d], rotated and its keys written -> [n, hq, d].

    The host reads where rows begin and end: on a GPU it waits for what was launched before.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    ends = torch.cat((rows.starts, rows.lengths)).tolist()
    batch = len(rows.lengths)
    for sequence, length in enumerate(ends[batch + 1 :]):
        mine = slice(ends[sequence], ends[sequence + 1])
        if mine.stop > mine.start:
            out[mine] = attention(q[mine], *kv.of(sequence, length), window)
    return out


def rope_prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Rows, kv: PagedKV, window: int | None = None
) -> Tensor:
    """`rope_write`, then `prefill_attention`, where pages are of a shorter type than q, k and v.

    Each sequence's rows are attended to as they are, and what came before them, which is copied, as the pages have it.
    """
    q, k = (_turned(heads, cos, sin, rows) for heads in (q, k))
    _write(k, v, rows, kv)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bounds = rows.starts.tolist()
    for sequence, length in enumerate(rows.lengths.tolist()):
        mine = slice(bounds[sequence], bounds[sequence + 1])
        if mine.stop > mine.start:
            before = length - mine.stop + mine.start
            first = max(0, before - window) if window else 0
            keys, values = (
                torch.cat((past[:, first:], own[mine].transpose(0, 1)), dim=1)
                for past, own in zip(kv.of(sequence, before), (k, v), strict=True)
            )
            out[mine] = attention(q[mine], keys, values, window)
    return out


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, rows: Rows) -> Tensor:
    """`rope` of heads [n, heads, d] by the angles of their rows; any where a row is padding."""
    angles = rows.positions.long().clamp_min(0)
    return rope(heads, cos[angles], sin[angles])


def _write(k: Tensor, v: Tensor, rows: Rows, kv: PagedKV) -> None:
    """k, rotated, and v [n, hkv, d] to the pages, in their type."""
    positions = rows.positions.long()
    real = positions >= 0
    sequences, positions = rows.sequences[real].long(), positions[real]
    pages, offsets = kv.table[sequences, positions // kv.page].long(), positions % kv.page
    kv.k[pages, :, offsets] = in_type(k[real], kv.k.dtype)
    kv.v[pages, :, offsets] = in_type(v[real], kv.v.dtype)
