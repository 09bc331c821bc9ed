"""The reference of sampling, against exact distributions and against the field's own definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mistral_nb_kernels import reference as ops
from mistral_nb_kernels.parameters import UNIT, Parameters, Penalties
from mistral_nb_kernels.reference import philox
from mistral_nb_kernels.reference.sampling import _least, keep, penalized, pick, weigh
from tests.kernels.chi_square import assert_drawn_from


def test_philox_known_answers() -> None:
    """The known-answer tests of the Random123 library, philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    assert philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_spreads_evenly() -> None:
    draws = torch.tensor([ops.uniform(seed, position) for seed in (1, 2**33 + 1) for position in range(4000)])
    counts = torch.histc(draws, 20, 0, 1)
    # chi-square with 19 degrees of freedom: 43.8 is its 99.9% quantile
    assert float(((counts - 400) ** 2 / 400).sum()) < 43.8
    assert len(draws.unique()) > 7990


def distribution(logits: Tensor, draws: int = 4001, **parameters: object) -> Tensor:
    """The exact shares that `sample` gives, from evenly spaced draws: within 1/draws of every probability."""
    counts = torch.zeros(len(logits))
    for i in range(draws):
        counts[ops.sample_row(logits, draw=(i + 0.5) / draws, **parameters)] += 1
    return counts / draws


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (2.5, 5, 1.0), (1.0, 0, 0.9), (0.7, 8, 0.8), (1.0, 1, 1.0), (1.0, 0, 0.0)],
)
def test_sample_has_the_distribution_of_the_transformers_warpers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(24) * 2
    seen_ids = torch.tensor([1, 5, 9])
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(seen_ids[None], logits[None].clone())[0].softmax(-1)
    seen = torch.zeros(24, dtype=torch.bool)
    seen[seen_ids] = True
    got = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p, seen=seen, repetition_penalty=1.3)
    torch.testing.assert_close(got, expected, atol=6e-4, rtol=0)


def test_frequency_and_presence_follow_openai() -> None:
    logits, counts = torch.randn(10), torch.tensor([0.0, 1, 2, 3, 0, 0, 0, 0, 0, 0])
    got = distribution(
        logits, temperature=1.0, top_k=0, top_p=1.0, counts=counts, frequency_penalty=0.7, presence_penalty=0.4
    )
    expected = (logits - 0.7 * counts - 0.4 * (counts > 0)).softmax(-1)
    torch.testing.assert_close(got, expected, atol=6e-4, rtol=0)


def test_filters_over_a_large_vocabulary_equal_a_full_sort() -> None:
    """A flat distribution needs more candidates than the short head holds."""
    logits = torch.randn(5000) * 0.1
    probabilities = logits.softmax(-1)
    ordered, ids = probabilities.sort(descending=True)
    kept = ids[: int((ordered.cumsum(0) - ordered < 0.9).sum())]
    chosen = {ops.sample_row(logits, temperature=1.0, top_k=0, top_p=0.9, draw=i / 211) for i in range(211)}
    assert len(kept) > 4000
    assert chosen <= set(kept.tolist())
    assert ops.sample_row(logits, temperature=1.0, top_k=0, top_p=0.9, draw=1 - 2**-32) == int(kept.max())


def test_ties_and_extremes() -> None:
    flat = torch.zeros(7)
    assert ops.sample_row(flat, temperature=0, top_k=0, top_p=1, draw=0.9) == 0
    # scores equal to the k-th all stay
    assert {ops.sample_row(flat, temperature=1, top_k=2, top_p=1, draw=i / 50) for i in range(50)} == set(range(7))
    lone = torch.full((7,), -math.inf)
    lone[4] = 1.0
    for draw in (0.0, 0.5, 1 - 2**-32):
        assert ops.sample_row(lone, temperature=1, top_k=0, top_p=1, draw=draw) == 4
        assert ops.sample_row(lone, temperature=5, top_k=3, top_p=0.5, draw=draw) == 4
    # a token of no weight is never drawn, not even at the ends
    edges = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    assert {ops.sample_row(edges, temperature=1, top_k=0, top_p=1, draw=d) for d in (0.0, 1 - 2**-32)} == {1, 2}
    assert {ops.sample_row(edges, temperature=1e300, top_k=0, top_p=1, draw=d) for d in (0.0, 1 - 2**-32)} == {1, 2}
    hot = torch.randn(50) * 1e4
    assert ops.sample_row(hot, temperature=1e-3, top_k=0, top_p=1, draw=0.5) == int(hot.argmax())


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 768, 1024])
def test_the_coldest_takes_the_lowest_of_the_largest_wherever_they_are(vocab: int) -> None:
    for first in {0, vocab // 3, max(0, vocab - 257), vocab - 1}:
        scores = torch.full((vocab, 2), -math.inf)[:, 0]
        scores[first::7] = 3.0
        scores[:first] = 2.0
        assert ops.sample_row(scores, temperature=0, top_k=0, top_p=1, draw=0.5) == first


def test_ties_with_the_least_of_what_a_filter_keeps_all_stay() -> None:
    flat = torch.zeros(1000)
    for top_k, top_p in ((5, 1), (0, 0.5), (5, 0.5)):
        how = {"temperature": 1, "top_k": top_k, "top_p": top_p}
        assert {ops.sample_row(flat, draw=i / 2000, **how) for i in range(2000)} == set(range(1000))
    # 0.4, 0.2, 0.2, 0.1, 0.1: half the mass takes one of two that weigh the same
    logits = torch.tensor([2.0, 1, 4, 2, 1]).log()
    assert {ops.sample_row(logits, temperature=1, top_k=0, top_p=0.5, draw=i / 99) for i in range(99)} == {0, 2, 3}
    assert {ops.sample_row(logits, temperature=1, top_k=4, top_p=1, draw=i / 99) for i in range(99)} == set(range(5))


def test_a_nucleus_ends_on_the_token_that_reaches_its_mass() -> None:
    even = torch.tensor([0.0, 0, -math.inf, -math.inf])
    for top_p, kept in ((0.5, {0, 1}), (1e-9, {0, 1})):
        assert {ops.sample_row(even, temperature=1, top_k=0, top_p=top_p, draw=i / 9) for i in range(9)} == kept
    # weights are whole units: exactly half of all lies in the first
    weights = torch.tensor([2**29, 2**28, 2**28], dtype=torch.int32)
    assert int(_least(weights, 0.5)) == 2**29
    assert int(_least(weights, 0.5 + 2**-20)) == 2**28


def test_the_coldest_draw_is_greedy_and_broken_logits_are_an_error() -> None:
    logits = torch.randn(50)
    assert ops.sample_row(logits, temperature=1e-46, top_k=0, top_p=1, draw=0.99) == int(logits.argmax())
    assert ops.sample_row(logits, temperature=1e-4, top_k=0, top_p=1, draw=0.99) == int(logits.argmax())
    for broken in (math.nan, math.inf):
        logits[7] = broken
        for temperature in (0, 1):
            with pytest.raises(FloatingPointError, match="largest logit"):
                ops.sample_row(logits, temperature=temperature, top_k=0, top_p=1, draw=0.5)


def test_repetition_penalty_zero_and_one_are_off() -> None:
    logits, seen = torch.randn(9), torch.ones(9, dtype=torch.bool)
    for off in (0.0, 1.0):
        token = ops.sample_row(logits, temperature=0, top_k=0, top_p=1, draw=0, seen=seen, repetition_penalty=off)
        assert token == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.05, 0.6, 1.0, 3.0, 1e4])
def test_weights_are_the_exponential_in_whole_units(temperature: float) -> None:
    """To 4e-7 and the rounding of the quotient, of which 30 halvings have 2^-24 each; the largest is 2^30."""
    scores = torch.cat((torch.linspace(-90, 5, 20_001), torch.tensor([-math.inf, -1e30])))
    quotient = (scores.double() - 5) / float(torch.tensor(temperature))
    weights = weigh(scores, scores.max(), temperature)
    exact = quotient.exp() * UNIT
    assert ((weights - exact).abs() <= 1 + exact * (4e-7 + 3 * 2**-24 * quotient.abs().nan_to_num(posinf=0))).all()
    assert int(weights[20_000]) == UNIT
    assert weights[-2:].tolist() == [0, 0]


SETS = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.7, "top_k": 40},
    {"temperature": 0.8, "top_k": 60, "top_p": 0.95},
    {"temperature": 1.0, "penalties": (1.3, 0.0, 0.0)},
    {"temperature": 3.0, "top_p": 0.5, "penalties": (1.1, 0.3, 0.4)},
]


@pytest.mark.parametrize("parameters", SETS)
def test_draws_have_the_exact_distribution(parameters: dict[str, Any]) -> None:
    """Chi-square of 100,000 draws, below its 99.9% quantile, against fp64 and a sort."""
    temperature, top_k, top_p = (
        parameters.get(name, off) for name, off in (("temperature", 1), ("top_k", 0), ("top_p", 1))
    )
    repetition, frequency, presence = parameters.get("penalties", (1.0, 0.0, 0.0))
    logits, counts = torch.randn(300) * 2, torch.randint(0, 3, (300,), dtype=torch.int32)
    seen = (counts > 0) | (torch.rand(300) < 0.2)
    exact = logits.double()
    exact = torch.where(seen, torch.where(exact > 0, exact / repetition, exact * repetition), exact)
    exact = exact - frequency * counts - presence * (counts > 0)
    if top_k:
        exact = exact.masked_fill(exact < exact.topk(top_k).values[-1], -math.inf)
    shares, ids = (exact / temperature).softmax(0).sort(descending=True)
    shares = shares * (shares.cumsum(0) - shares < top_p)
    expected = torch.zeros(300, dtype=torch.float64).scatter(0, ids, shares / shares.sum()) * 100_000

    words = philox((np.arange(100_000, dtype=np.uint64), 0, 0, 0), (1234, 0))[0]  # type: ignore[arg-type]
    scores = penalized(logits, seen, counts, repetition, frequency, presence)
    weights, kept = keep(scores, scores.max(), temperature, top_k, top_p)
    drawn = torch.tensor(pick(weights, words.tolist()))  # type: ignore[attr-defined]
    drawn = drawn if kept is None else kept[drawn]
    for position in range(20):
        how = {"seen": seen, "counts": counts, "repetition_penalty": repetition}
        how |= {"frequency_penalty": frequency, "presence_penalty": presence, "draw": ops.uniform(1234, position)}
        token = ops.sample_row(logits, temperature=temperature, top_k=top_k, top_p=top_p, **how)
        assert token == int(drawn[position])
    observed = torch.bincount(drawn, minlength=300).double()
    assert_drawn_from(observed, expected)


def test_rows_of_a_batch_are_drawn_one_by_one() -> None:
    """Each by its own parameters and penalties; a broken row is -1 and counts nothing."""
    logits = torch.randn(4, 50)
    logits[2, 7] = math.nan
    numbers = (torch.tensor(x) for x in ([0.0, 1, 1, 1], [1, 0.9, 1, 1], [1, 1.2, 1, 1], [0, 0.5, 0, 0], [0.0] * 4))
    integers = torch.tensor([0, 9, 0, 0], dtype=torch.int32), torch.tensor([1, 2, 3, 2**40]), torch.tensor([5, 6, 7, 8])
    counts, prompt = torch.randint(0, 2, (3, 50), dtype=torch.int32), torch.rand(3, 50) < 0.5
    before = counts.clone()
    penalties = Penalties(counts, prompt, torch.tensor([-1, 2, 0, 1], dtype=torch.int32))
    tokens = ops.sample(logits, Parameters(*numbers, *integers), penalties).tolist()
    how = {"top_k": 9, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "counts": before[2]}
    second = ops.sample_row(
        logits[1], temperature=1, top_p=0.9, draw=ops.uniform(2, 6), seen=prompt[2] | (before[2] > 0), **how
    )
    last = ops.sample_row(logits[3], temperature=1, top_k=0, top_p=1, draw=ops.uniform(2**40, 8))
    assert tokens == [int(logits[0].argmax()), second, -1, last]
    before[2, second] += 1
    before[1, last] += 1
    assert torch.equal(counts, before)
