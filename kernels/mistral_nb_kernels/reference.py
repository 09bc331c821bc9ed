"""The one torch reference of each op: the CPU path, the oracle of the tests and the baseline of the benchmarks.

Shapes use `n` for rows (tokens of all sequences, one after another), `dim` for features, `hq` and `hkv` for query and
KV heads, `d` for the head dimension and `t` for the keys of one sequence. Every op works row by row: on the CPU what a
row gets is the same to the bit however many rows and threads there are (`linear` excepted: BLAS chooses its order by
the shape).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_nb_kernels.paged import PagedKV, Rows

__all__ = [
    "attention",
    "decode_attention",
    "embedding",
    "linear",
    "linear_int8",
    "philox",
    "prefill_attention",
    "quantize_int8",
    "rms_norm",
    "rope",
    "rope_decode_attention",
    "rope_table",
    "rope_write",
    "sample",
    "swiglu",
    "uniform",
]

INT8_MAX = 127

GRAIN = 32_768
"""Elements from which on torch splits an element-wise CPU op by threads: the end of a split that is no whole number of
vectors takes the scalar form of `exp`, which rounds differently."""

COLDEST = 1e-5
"""Below this temperature a draw is greedy: the scores' quotient would leave fp32."""


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [vocab, dim] for `tokens` [n] (int64) -> [n, dim]."""
    return F.embedding(tokens, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32; [n, dim] -> [n, dim] (Zhang, Sennrich, 2019)."""
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def rope_table(positions: int, d: int, theta: float, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """cos and sin [positions, d] of the half-split pairing: features i and i + d/2 turn by pos * theta^(-2i/d).

    The angles are computed in fp32 from fp32 frequencies, as transformers does. Source: Su et al., 2021 (RoFormer).
    """
    inverse = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.int64, device=device).float() / d)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32, device=device), inverse)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin_()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [n, heads, d] by cos, sin [n, d] of its rows' positions; half-split pairing. -> [n, heads, d]."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Causal grouped-query attention of one sequence's last n tokens over its first t.

    q [n, hq, d]; k, v [hkv, t, d] with t >= n, the queries standing at positions t-n .. t-1; each sees itself and what
    comes before, the last `window` positions of it where a window is given. Scores are scaled by d^-1/2. -> [n, hq, d].
    """
    n, hq, d = q.shape
    hkv, t, _ = k.shape
    group = hq // hkv
    if n == 1:
        if window is not None and t > window:
            k, v = k[:, t - window :], v[:, t - window :]
        out = F.scaled_dot_product_attention(q.view(1, hkv, group, d), k[None], v[None])
        return out.view(1, hq, d)
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
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def rope_write(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, rows: Rows, kv: PagedKV) -> Tensor:
    """q [n, hq, d] rotated; k [n, hkv, d] goes rotated, v as it is, to the pages. cos, sin [positions, d].

    Of a padding row nothing is written, and its queries come back undefined.
    """
    positions = rows.positions.long()
    angles = positions.clamp_min(0)
    turned = rope(k, cos[angles], sin[angles])
    real = positions >= 0
    sequences, positions = rows.sequences[real].long(), positions[real]
    pages, offsets = kv.table[sequences, positions // kv.page].long(), positions % kv.page
    kv.k[pages, :, offsets] = turned[real]
    kv.v[pages, :, offsets] = v[real]
    return rope(q, cos[angles], sin[angles])


def prefill_attention(q: Tensor, rows: Rows, kv: PagedKV, window: int | None = None) -> Tensor:
    """`attention` of each sequence's rows over its pages; q [n, hq, d], rotated and its keys written -> [n, hq, d]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = rows.starts.tolist()
    for sequence, length in enumerate(rows.lengths.tolist()):
        mine = slice(starts[sequence], starts[sequence + 1])
        if mine.stop > mine.start:
            out[mine] = attention(q[mine], *kv.of(sequence, length), window)
    return out


def decode_attention(q: Tensor, lengths: Tensor, kv: PagedKV, window: int | None = None) -> Tensor:
    """`attention` of each sequence's newest token, q [batch, hq, d]; lengths [batch] with it. Zeros at length 0."""
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    for sequence, length in enumerate(lengths.tolist()):
        if length:
            out[sequence] = attention(q[sequence : sequence + 1], *kv.of(sequence, length), window)[0]
    return out


def rope_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    kv: PagedKV,
    window: int | None = None,
) -> Tensor:
    """`rope_write` of the newest tokens q [batch, hq, d], k, v [batch, hkv, d], then `decode_attention`."""
    batch = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    rows = Rows(batch, lengths, batch[:-1], lengths - 1, longest=1)
    return decode_attention(rope_write(q, k, v, cos, sin, rows, kv), lengths, kv, window)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a packed [n, 2 * hidden] with the gate first -> [n, hidden] (Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    rows = max(1, GRAIN // gate.shape[1])
    if gate.device.type != "cpu" or len(gate) <= rows:
        return F.silu(gate) * up
    return torch.cat([F.silu(part) for part in torch.split(gate, rows)]) * up


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] @ weight [out, in]^T -> [n, out]."""
    return F.linear(x, weight)


def quantize_int8(x: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale a row: x [rows, in] -> (int8 [rows, in], fp32 [rows]), x ~ values * scale[:, None].

    With `out` they go there, and an fp32 `x` is overwritten with the quotients: nothing of its size is allocated.
    """
    largest = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg())
    scale = largest.float().clamp_min_(1e-12).mul_(1 / INT8_MAX)
    if out is None:
        return (x / scale).round_().to(torch.int8), scale[:, 0]
    values, scales = out
    scales.copy_(scale[:, 0])
    values.copy_(x.div_(scale).round_())
    return out


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [n, in] @ (weight * scale[:, None])^T for int8 weight [out, in] and fp32 scale [out] -> fp32 [n, out]. CPU.

    x and the sums are rounded to bf16, 2.4e-3 of the result in all against fp64, where rounding the weights to int8
    costs 7e-3; the sums themselves are made in fp32, in an order that does not depend on the number of rows. On
    2 cores a decoding step takes 0.8 of the time that the same weights take with activations in two int8 halves
    through `torch._int_mm`, at the same perplexity. `in` is a multiple of 32: past that torch's op reads out of bounds.
    """
    assert weight.shape[1] % 32 == 0
    return torch._weight_int8pack_mm(x.to(torch.bfloat16), weight, _ones(len(weight))) * scale


@functools.cache
def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)


def sample(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    draw: float,
    seen: Tensor | None = None,
    counts: Tensor | None = None,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> int:
    """The next token of one sequence from `logits` [vocab], and a uniform `draw` in [0, 1).

    In this order: repetition penalty over `seen` [vocab] bool (Keskar et al., 2019, as in transformers: positive scores
    are divided, negative ones multiplied); frequency and presence penalties by `counts` [vocab], the times a token was
    written (OpenAI's definition); temperature, of which less than 1e-5 is the lowest id of the largest score; `top_k`
    (0 keeps all; scores equal to the k-th stay); `top_p` (the smallest set of likeliest tokens whose mass reaches it,
    at least one; Holtzman et al., 2019); then the inverse of the cumulative distribution, likeliest token first where a
    filter is on. Raises `FloatingPointError` when the largest score is not a finite number.
    """
    scores = logits.float()
    if seen is not None and repetition_penalty not in (0.0, 1.0):
        penalized = torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)
        scores = torch.where(seen, penalized, scores)
    if counts is not None and (frequency_penalty or presence_penalty):
        scores = scores - frequency_penalty * counts - presence_penalty * (counts > 0)
    largest, likeliest = scores.max(dim=-1)
    if not math.isfinite(largest):
        raise FloatingPointError(f"the largest logit is {float(largest)}")
    if temperature < COLDEST:
        return int(likeliest)
    weights = ((scores - largest) / temperature).exp()
    if top_k == 0 and top_p >= 1:
        return _draw(weights, draw)
    return _draw_filtered(weights, top_k, top_p, draw)


def _draw(weights: Tensor, draw: float) -> int:
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    index = int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))
    return min(index, len(cumulative) - 1)


def _draw_filtered(weights: Tensor, top_k: int, top_p: float, draw: float) -> int:
    """Draw by `weights` [vocab] among the likeliest; sorts only as much of the vocabulary as the filters can keep."""
    vocab = weights.shape[-1]
    top_k = min(top_k, vocab)
    # 256 candidates hold the nucleus of nearly every step, and topk is about 8 times faster than a full sort
    size = min(vocab, max(256, 2 * top_k))
    while True:
        head, ids = weights.topk(size)
        cut = bool(top_k) and bool(head[-1] < head[top_k - 1])
        if cut:
            head = head.masked_fill(head < head[top_k - 1], 0.0)
        total = (head if cut else weights).sum(dtype=torch.float64)
        keep = head.cumsum(dim=-1, dtype=torch.float64) - head < top_p * total
        if size == vocab or cut or not (top_k or keep[-1]):
            break
        size = min(vocab, size * 8)
    keep[0] = True
    return int(ids[_draw(head * keep, draw)])


def uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1) keyed by (seed, position): Philox's first word over 2^32.

    The seed's low and high 32 bits are the key, the position's are the counter's first two words.
    """
    low = 0xFFFFFFFF
    counter = (position & low, position >> 32 & low, 0, 0)
    return math.ldexp(philox(counter, (seed & low, seed >> 32 & low))[0], -32)


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al., 2011): four words of 32 bits from a counter and a key."""
    low = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3
