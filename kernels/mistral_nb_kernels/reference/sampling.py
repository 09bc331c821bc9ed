"""From scores to the next token, in torch, and the random numbers that decide it.

    1. penalties: repetition (Keskar et al., 2019, as in transformers): of a token seen, in the prompt or written, a
       positive score is divided, another multiplied; then frequency * count + presence * (count > 0) off (OpenAI's)
    2. temperature below 1e-5: the lowest id of the largest score
    3. weights: floor(2^30 exp((score - largest) / temperature)), integers
    4. top_k > 0: scores equal to the k-th largest, or above it, stay
    5. top_p < 1: the smallest set of the likeliest tokens left whose mass reaches top_p, and all that weigh as much as
       the least of them; at least one (Holtzman et al., 2019)
    6. the draw: the first token, in the order of ids, up to which the mass left exceeds u times all of it

A repetition penalty of 0 is off, as 1 is. A score of -inf, and one so low that it weighs 0, is never drawn. Everything
up to the weights is fp32 additions, multiplications and divisions in a fixed order, each rounded as IEEE 754 has it;
exp, too, by a polynomial. From there on everything is integers. So neither the order of sums nor the hardware decides,
and the kernel draws the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mistral_nb_kernels.parameters import COLDEST, EXP2, LOG2E, MOST, UNIT, Parameters, Penalties

__all__ = ["philox", "sample", "sample_row", "uniform"]

WORD = 1 << 32


def sample(logits: Tensor, parameters: Parameters, penalties: Penalties | None = None) -> Tensor:
    """The next token of every row of `logits` [n, vocab] -> int32 [n]; -1 where the largest score is not finite."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    columns = [getattr(parameters, name).tolist() for name in (*names, "seed", "position")]
    places = [-1] * len(logits) if penalties is None else penalties.row.tolist()
    tokens = []
    for scores, place, *values, seed, position in zip(logits, places, *columns, strict=True):
        counts = seen = None
        if penalties is not None and place >= 0:
            counts = penalties.counts[place]
            seen = penalties.prompt[place] | (counts > 0)
        how = dict(zip(names, values, strict=True))
        try:
            token = sample_row(scores, draw=uniform(seed, position), seen=seen, counts=counts, **how)
        except FloatingPointError:
            token = -1
        if counts is not None and token >= 0:
            counts[token] += 1
        tokens.append(token)
    return torch.tensor(tokens, dtype=torch.int32, device=logits.device)


def sample_row(
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
    """The next token of one sequence from `logits` [vocab], and a uniform `draw` in [0, 1), of which 32 bits count.

    seen [vocab] bool; counts [vocab]. Raises `FloatingPointError` when the largest score is not a finite number.
    """
    scores = penalized(logits, seen, counts, repetition_penalty, frequency_penalty, presence_penalty)
    cold = _fp32(temperature) < COLDEST
    token = _first_of_the_largest(scores) if cold else 0
    largest = scores[token] if cold else scores.amax()
    if not math.isfinite(largest):
        raise FloatingPointError(f"the largest logit is {float(largest)}")
    if cold:
        return token
    weights, ids = keep(scores, largest, temperature, top_k, top_p)
    index = pick(weights, [int(draw * WORD)])[0]
    return index if ids is None else int(ids[index])


def _first_of_the_largest(scores: Tensor) -> int:
    """The lowest index of the largest of `scores` [m]. In blocks it takes a third of the time of torch's own search."""
    width = 256 if len(scores) % 256 == 0 else len(scores)
    blocks = scores.reshape(-1, width)
    block = int(blocks.amax(dim=-1).argmax())
    return block * width + int(blocks[block].argmax())


def penalized(
    logits: Tensor, seen: Tensor | None, counts: Tensor | None, repetition: float, frequency: float, presence: float
) -> Tensor:
    """The fp32 scores [vocab] of `logits`, penalties taken off."""
    scores = logits.float()
    if seen is not None and repetition not in (0.0, 1.0):
        factor = torch.tensor(repetition, dtype=torch.float32, device=scores.device)
        scores = torch.where(seen, torch.where(scores > 0, scores / factor, scores * factor), scores)
    if counts is not None and (frequency or presence):
        scores = scores - frequency * counts - presence * (counts > 0)
    return scores


def keep(scores: Tensor, largest: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor | None]:
    """The weights, int32, of fp32 `scores` [vocab], 0 for what top_p drops, and their ids: None for all of them."""
    ids = None
    if 0 < top_k < len(scores):
        ids = (scores >= scores.topk(top_k).values[-1]).nonzero()[:, 0]
        scores = scores[ids]
    weights = weigh(scores, largest, temperature)
    if top_p < 1:
        weights = weights * (weights >= _least(weights, top_p))
    return weights, ids


def weigh(scores: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """floor(2^30 exp((score - largest) / temperature)) of fp32 `scores`, int32 of their shape."""
    halvings = (largest - scores).mul_(LOG2E / _fp32(temperature)).clamp_(max=MOST)
    whole = halvings.floor()
    fraction = halvings.sub_(whole)
    power = fraction * EXP2[-1]
    for coefficient in EXP2[-2::-1]:
        power.add_(coefficient).mul_(fraction)
    return power.add_(1.0).mul_(UNIT).int() >> whole.int()


def pick(weights: Tensor, words: Sequence[int]) -> list[int]:
    """The index into `weights` [m] that each of `words`, of 32 bits, draws: of the first sum above word / 2^32."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.int64)
    total = int(cumulative[-1])
    targets = torch.tensor([word * total // WORD for word in words], device=weights.device)
    indices: list[int] = torch.searchsorted(cumulative, targets, right=True).tolist()
    return indices


def _least(weights: Tensor, top_p: float) -> Tensor:
    """The least weight of the smallest set of the largest of `weights` [m] whose mass reaches top_p of all."""
    needed = math.ceil(_fp32(top_p) * int(weights.sum(dtype=torch.int64)))
    size = 256
    while True:
        # 256 candidates hold the nucleus of nearly every step, and topk is about 8 times faster than a full sort
        head = weights.topk(min(size, len(weights))).values
        mass = head.cumsum(dim=-1, dtype=torch.int64)
        if mass[-1] >= needed:
            return head[torch.searchsorted(mass, needed)]
        size *= 8


def _fp32(x: float) -> float:
    """`x` rounded to fp32, as a batch's parameters are; its largest number where `x` is beyond."""
    return torch.tensor(min(x, torch.finfo(torch.float32).max), dtype=torch.float32).item()


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
