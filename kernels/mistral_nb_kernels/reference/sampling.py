"""From scores to the next token, in torch, and the random numbers that decide it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["philox", "sample", "uniform"]

COLDEST = 1e-5
"""Below this temperature a draw is greedy: the scores' quotient would leave fp32."""


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
