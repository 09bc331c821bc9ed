"""The next token of every row of scores, in one launch: penalties, temperature, top-k, top-p and a Philox draw.

    logits [n, vocab] -> int32 [n]      by the definitions of `reference.sampling`, token for token

One program a row; nothing of it depends on the other rows or on what they ask for, and the draw is keyed by (seed,
position). The GPU never sorts: the draw is the inverse of the cumulative distribution in the order of ids, and a filter
is a bound, found by bisection: top-k's on the bits of the scores, which order as they do; top-p's on the weights. Sums
are of integers, so no order of them changes a token. The scores go, with their penalties, to int32 of scratch memory
as ordered bits, and become weights there.

A row is too much for the registers of a multiprocessor (49152 numbers of 4 bytes are 3/4 of them), so a step of a
bisection reads the scratch again: 128 KB at a vocabulary of 32000, which this multiprocessor wrote, from its L1 where
that is as large (9.0, 8.0), else from L2. By the machine code a pass is 5 instructions an element: at 32000 1300 cycles
of every scheduler, more than the 1000 of the L1, and 1500 with its reduction, 0.9 us at 1.7 GHz. There are few passes,
as a bisection ends where no further step can move a token: top-p once less mass than two tokens' lies between its
bounds, after 5 to 22 steps of 30; top-k, at exactly k tokens, mostly after the first, as it starts from a search among
the largest scores of each lane, in registers. That makes, in us and on no measurement: scores 2, top-k 6, weights 4
(27 instructions an element), top-p 5 to 20, draw 2. What a row does not ask for is skipped; greedy draws the first
token from a bound that needs no search.

Bytes: the scores once, 5 vocab where there are penalties; 4 vocab in each pass, on the chip.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.parameters import COLDEST, EXP2, LOG2E, MOST, UNIT, Parameters, Penalties

__all__ = ["sample", "sample_kernel"]

_COLDEST, _LOG2E, _MOST, _UNIT = (tl.constexpr(x) for x in (COLDEST, LOG2E, MOST, UNIT))
_C1, _C2, _C3, _C4, _C5 = (tl.constexpr(x) for x in EXP2)
_NEVER = tl.constexpr(-0x7F800001)
"""The ordered bits of -inf."""
_MINUS_ZERO = tl.constexpr(-1)
"""Those of -0, which is 0."""


@triton.jit
def _ordered(bits):
    """The bits of fp32 numbers as int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _penalized(score, at, counted, counts, prompt, repetition, frequency, presence):
    count = tl.load(counts + at, mask=at < counted, other=0)
    seen = (count > 0) | (tl.load(prompt + at, mask=at < counted, other=0) != 0)
    score = tl.where(seen, tl.where(score > 0, tl.div_rn(score, repetition), score * repetition), score)
    return score - frequency * count.to(tl.float32) - presence * (count > 0).to(tl.float32)


@triton.jit
def _weight(score, largest, rate):
    halvings = tl.minimum((largest - score) * rate, _MOST)
    whole = tl.floor(halvings)
    fraction = halvings - whole
    power = fraction * _C5
    power = (power + _C4) * fraction
    power = (power + _C3) * fraction
    power = (power + _C2) * fraction
    power = (power + _C1) * fraction
    return ((power + 1.0) * _UNIT).to(tl.int32) >> whole.to(tl.int32)


@triton.jit
def _count(keys, bound, vocab, BLOCK: tl.constexpr):
    """How many of the row's keys are at least `bound`."""
    found = tl.zeros((BLOCK,), tl.int32)
    for at in tl.range(0, vocab, BLOCK):
        found += (tl.load(keys + at + tl.arange(0, BLOCK)) >= bound).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _mass(weights, bound, vocab, BLOCK: tl.constexpr):
    """The sum, int64, of the row's weights that are at least `bound`."""
    mass = tl.zeros((BLOCK,), tl.int64)
    for at in tl.range(0, vocab, BLOCK):
        mass += _kept(weights, at, bound, BLOCK)
    return tl.sum(mass, axis=0)


@triton.jit
def _kept(weights, at, bound, BLOCK: tl.constexpr):
    weight = tl.load(weights + at + tl.arange(0, BLOCK))
    return tl.where(weight >= bound, weight, 0).to(tl.int64)


@triton.jit
def _halved(low, middle, high, at_low, at_middle, needed):
    """The half of [low, high) at whose lower end still `needed` is reached, and what is reached there."""
    enough = at_middle >= needed
    return tl.where(enough, middle, low), tl.where(enough, high, middle), tl.where(enough, at_middle, at_low)


@triton.jit
def _bound_of_count(keys, lanes, k, highest, vocab, BLOCK: tl.constexpr):
    """A bound that the k largest keys and those equal to the least of them reach, and no others.

    lanes [BLOCK]: of every BLOCK-th key the largest, in registers. What k of them reach k keys reach: the k-th of them
    is found first, and is mostly the k-th of all.
    """
    low, high = tl.cast(_NEVER, tl.int64), highest.to(tl.int64) + 1
    count = tl.cast(BLOCK, tl.int32)
    while (high - low > 1) & (count > k):
        middle = (low + high) >> 1
        found = tl.sum((lanes >= middle.to(tl.int32)).to(tl.int32), axis=0)
        low, high, count = _halved(low, middle, high, count, found, k)
    kth = tl.min(tl.where(lanes >= low.to(tl.int32), lanes, highest), axis=0)
    low, high = tl.where(k > BLOCK, _NEVER, kth).to(tl.int64), highest.to(tl.int64) + 1
    count = _count(keys, low.to(tl.int32), vocab, BLOCK)
    while (high - low > 1) & (count != k):
        middle = (low + high) >> 1
        found = _count(keys, middle.to(tl.int32), vocab, BLOCK)
        low, high, count = _halved(low, middle, high, count, found, k)
    return low.to(tl.int32)


@triton.jit
def _bound_of_mass(weights, needed, total, vocab, BLOCK: tl.constexpr):
    """The same of the fewest largest weights whose sum reaches `needed`, and the sum of those that reach the bound."""
    low, high = tl.cast(1, tl.int32), tl.cast(_UNIT, tl.int32) + 1
    mass, above = total, total - total
    while (high - low > 1) & (mass - above >= 2 * low.to(tl.int64)):
        middle = low + ((high - low) >> 1)
        found = _mass(weights, middle, vocab, BLOCK)
        above = tl.where(found >= needed, above, found)
        low, high, mass = _halved(low, middle, high, mass, found, needed)
    return low, mass


@triton.jit
def _share(seed, position, total):
    """floor(total * word / 2^32) of a total below 2^63, by halves; word: Philox's first."""
    first, second = (position & 0xFFFFFFFF).to(tl.uint32), (position >> 32).to(tl.uint32)
    none = tl.cast(0, tl.uint32)
    word, _, _, _ = tl.philox(seed, first, second, none, none)
    low = (word.to(tl.uint64) * (total & 0xFFFFFFFF).to(tl.uint64)) >> 32
    return word.to(tl.int64) * (total >> 32) + low.to(tl.int64)


@triton.jit
def sample_kernel(
    logits,
    tokens,
    scratch,
    temperatures,
    tops_p,
    repetitions,
    frequencies,
    presences,
    tops_k,
    seeds,
    positions,
    counts,
    prompts,
    places,
    vocab,
    stride_logits,
    stride_scratch,
    stride_counts,
    stride_prompts,
    BLOCK: tl.constexpr,
    PENALTIES: tl.constexpr,
):
    """Grid: one program a row. counts, prompts, places are read with PENALTIES only."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_logits
    scratch += row * stride_scratch
    column = tl.arange(0, BLOCK)
    if PENALTIES:
        repetition = tl.load(repetitions + row)
        repetition = tl.where(repetition == 0.0, 1.0, repetition)
        frequency, presence = tl.load(frequencies + row), tl.load(presences + row)
        place = tl.load(places + row).to(tl.int64)
        counted = tl.where(place < 0, 0, vocab)
        counts += place * stride_counts
        prompts += place * stride_prompts

    lanes = tl.full((BLOCK,), _NEVER, tl.int32)
    for at in tl.range(0, vocab, BLOCK):
        inside = at + column < vocab
        score = tl.load(logits + at + column, mask=inside, other=float("-inf")).to(tl.float32)
        if PENALTIES:
            score = _penalized(score, at + column, counted, counts, prompts, repetition, frequency, presence)
        key = _ordered(tl.where(score == score, score, float("inf")).to(tl.int32, bitcast=True))
        key = tl.where(key == _MINUS_ZERO, 0, key)
        tl.store(scratch + at + column, key)
        lanes = tl.maximum(lanes, key)
    highest = tl.max(lanes, axis=0)
    largest = _ordered(highest).to(tl.float32, bitcast=True)
    if tl.abs(largest) == float("inf"):
        tl.store(tokens + row, -1)
        return
    tl.debug_barrier()

    temperature = tl.load(temperatures + row)
    greedy = temperature < _COLDEST
    lowest = tl.where(greedy, highest, _NEVER)
    k = tl.load(tops_k + row)
    if (k > 0) & (k < vocab) & (temperature >= _COLDEST):
        lowest = _bound_of_count(scratch, lanes, k, highest, vocab, BLOCK)

    rate = tl.div_rn(tl.cast(_LOG2E, tl.float32), tl.maximum(temperature, _COLDEST))
    mass = tl.zeros((BLOCK,), tl.int64)
    for at in tl.range(0, vocab, BLOCK):
        key = tl.load(scratch + at + column)
        weight = _weight(_ordered(key).to(tl.float32, bitcast=True), largest, rate)
        weight = tl.where(key >= lowest, weight, 0)
        tl.store(scratch + at + column, weight)
        mass += weight.to(tl.int64)
    total = tl.sum(mass, axis=0)
    tl.debug_barrier()

    least = tl.cast(1, tl.int32)
    p = tl.load(tops_p + row)
    if (p < 1.0) & (temperature >= _COLDEST):
        needed = tl.ceil(p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        least, total = _bound_of_mass(scratch, needed, total, vocab, BLOCK)

    target = tl.where(greedy, 0, _share(tl.load(seeds + row), tl.load(positions + row), total))
    at, before = 0, total - total
    mass_at = tl.sum(_kept(scratch, 0, least, BLOCK), axis=0)
    while before + mass_at <= target:
        before += mass_at
        at += BLOCK
        mass_at = tl.sum(_kept(scratch, at, least, BLOCK), axis=0)
    cumulative = before + tl.cumsum(_kept(scratch, at, least, BLOCK), axis=0)
    token = at + tl.sum((cumulative <= target).to(tl.int32), axis=0)
    tl.store(tokens + row, token)
    if PENALTIES:
        tl.atomic_add(counts + token, 1, mask=place >= 0)


def _aligned(values: Tensor) -> Tensor:
    """The same; a copy where they begin anywhere, as those of one place do: the kernel is compiled for multiples of 16
    bytes, and would be anew.
    """
    return values if values.data_ptr() % 16 == 0 else values.clone()


def sample(logits: Tensor, parameters: Parameters, penalties: Penalties | None = None, *, config: Config) -> Tensor:
    """logits [n, vocab] -> int32 [n], -1 where a row's largest score is not finite; the tokens are counted."""
    n, vocab = logits.shape
    assert logits.stride(-1) == 1
    for field in dataclasses.fields(parameters):
        values = getattr(parameters, field.name)
        assert values.shape == (n,)
        assert values.is_contiguous()
    tokens = torch.empty(n, dtype=torch.int32, device=logits.device)
    if n == 0:
        return tokens
    width = triton.cdiv(vocab, config.block_n) * config.block_n
    scratch = torch.empty((n, width), dtype=torch.int32, device=logits.device)
    if penalties is not None:
        assert penalties.counts.shape == penalties.prompt.shape == (len(penalties.counts), vocab)
        assert penalties.counts.stride(-1) == penalties.prompt.stride(-1) == 1
        assert penalties.row.shape == (n,)
        assert penalties.row.is_contiguous()
    sample_kernel[(n,)](
        logits,
        tokens,
        scratch,
        _aligned(parameters.temperature),
        _aligned(parameters.top_p),
        _aligned(parameters.repetition_penalty),
        _aligned(parameters.frequency_penalty),
        _aligned(parameters.presence_penalty),
        _aligned(parameters.top_k),
        _aligned(parameters.seed),
        _aligned(parameters.position),
        penalties.counts if penalties is not None else None,
        penalties.prompt if penalties is not None else None,
        _aligned(penalties.row) if penalties is not None else None,
        vocab,
        logits.stride(0),
        width,
        penalties.counts.stride(0) if penalties is not None else 0,
        penalties.prompt.stride(0) if penalties is not None else 0,
        BLOCK=config.block_n,
        PENALTIES=penalties is not None,
        num_warps=config.warps,
        # the weights are bit for bit the reference's: no multiplication and addition may become one operation
        enable_fp_fusion=False,
    )
    return tokens
