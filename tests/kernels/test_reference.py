"""The reference ops against fp64 formulas and against the field's own definitions."""

from __future__ import annotations

import itertools
import math

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
from mistral_nb_kernels.reference import philox

ROWS = (1, 2, 3, 5, 8, 17, 64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One query at a time in fp64."""
    n, hq, d = q.shape
    t, group = k.shape[1], hq // k.shape[0]
    out = torch.empty(n, hq, d, dtype=torch.float64)
    for row in range(n):
        end = t - n + row + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(hq):
            keys, values = (x[head // group, start:end].double() for x in (k, v))
            out[row, head] = torch.softmax(keys @ q[row, head].double() / math.sqrt(d), 0) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 9), (7, 7), (3, 10), (2, 33)])
@pytest.mark.parametrize(("hq", "hkv", "d"), [(9, 3, 64), (4, 4, 128), (8, 2, 64)])
def test_attention(n: int, t: int, hq: int, hkv: int, d: int, window: int | None) -> None:
    q, k, v = torch.randn(n, hq, d), torch.randn(hkv, t + 5, d), torch.randn(hkv, t + 5, d)
    k[:, t:], v[:, t:] = torch.nan, torch.nan
    k, v = k[:, :t], v[:, :t]
    assert relative(ops.attention(q, k, v, window), naive_attention(q, k, v, window)) < 1e-6


def test_rms_norm_is_its_formula() -> None:
    x, weight = torch.randn(5, 576), torch.rand(576)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative(ops.rms_norm(x, weight, 1e-5), expected) < 1e-6


def test_swiglu_is_its_formula() -> None:
    packed = torch.randn(4, 300)
    gate, up = packed[:, :150].double(), packed[:, 150:].double()
    assert relative(ops.swiglu(packed), gate / (1 + (-gate).exp()) * up) < 1e-6


def test_rope_turns_pairs_half_a_head_apart() -> None:
    d, theta, position = 8, 1e4, 7
    cos, sin = ops.rope_table(16, d, theta)
    x = torch.randn(1, 2, d)
    got = ops.rope(x, cos[position : position + 1], sin[position : position + 1])
    for i in range(d // 2):
        angle = position * theta ** (-2 * i / d)
        pair = torch.complex(x[0, :, i].double(), x[0, :, i + d // 2].double())
        turned = pair * complex(math.cos(angle), math.sin(angle))
        torch.testing.assert_close(got[0, :, i].double(), turned.real, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got[0, :, i + d // 2].double(), turned.imag, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("inputs", [32, 96, 576, 1536])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_linear_int8_rounds_inputs_and_sums_to_bf16(n: int, inputs: int) -> None:
    x = torch.randn(n, inputs) * torch.logspace(-3, 2, n)[:, None]
    weight, scale = ops.quantize_int8(torch.randn(320, inputs))
    exact = weight.double() * scale.double()[:, None]
    rounded = x.bfloat16().double() @ exact.t()
    # a bf16 step of the sum, and fp32's own error where products cancel
    allowed = 2**-8 * rounded.abs() + 1e-5 * (x.double().abs() @ exact.abs().t())
    got = ops.linear_int8(x, weight, scale)
    assert ((got - rounded).abs() <= allowed).all()
    assert relative(got, x.double() @ exact.t()) < 4e-3


def test_quantize_int8_keeps_within_half_a_step() -> None:
    x = torch.randn(40, 96)
    x[3] = 0
    values, scale = ops.quantize_int8(x)
    assert values.dtype == torch.int8
    assert ((values * scale[:, None] - x).abs() <= scale[:, None] * 0.5001).all()
    assert torch.equal(ops.linear_int8(torch.zeros(2, 96), values, scale), torch.zeros(2, 40))
    out = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x))
    for again in (ops.quantize_int8(x), ops.quantize_int8(x.clone(), out=out), out):
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], scale)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit by bit, at every number of rows, at any place among them and with any number of threads."""
    threads = torch.get_num_threads()
    weight, scale = ops.quantize_int8(torch.randn(960, 576))
    norm = torch.rand(576)
    cos, sin = ops.rope_table(200, 64, 1e4)
    cases = {
        "linear_int8": (torch.randn(200, 576), lambda x: ops.linear_int8(x, weight, scale)),
        "rms_norm": (torch.randn(200, 576), lambda x: ops.rms_norm(x, norm, 1e-5)),
        "swiglu": (torch.randn(200, 3072), ops.swiglu),
        "swiglu of Mistral-7B": (torch.randn(70, 2 * 14336), ops.swiglu),
        "rope": (torch.randn(200, 12, 64), lambda x: ops.rope(x, cos[: len(x)], sin[: len(x)])),
    }
    try:
        for name, (x, op) in cases.items():
            torch.set_num_threads(1)
            together = op(x)
            for rows, count in itertools.product(ROWS, (1, 2, 3, 4)):
                torch.set_num_threads(count)
                assert torch.equal(op(x[:rows]), together[:rows]), (name, rows)
                if name != "rope":
                    assert torch.equal(op(x[3 : 3 + rows]), together[3 : 3 + rows]), (name, rows)
    finally:
        torch.set_num_threads(threads)


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
        counts[ops.sample(logits, draw=(i + 0.5) / draws, **parameters)] += 1
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
    chosen = {ops.sample(logits, temperature=1.0, top_k=0, top_p=0.9, draw=i / 997) for i in range(997)}
    assert len(kept) > 4000
    assert chosen <= set(kept.tolist())
    assert ops.sample(logits, temperature=1.0, top_k=0, top_p=0.9, draw=1 - 2**-32) == int(kept[-1])


def test_ties_and_extremes() -> None:
    flat = torch.zeros(7)
    assert ops.sample(flat, temperature=0, top_k=0, top_p=1, draw=0.9) == 0
    # scores equal to the k-th all stay
    assert {ops.sample(flat, temperature=1, top_k=2, top_p=1, draw=i / 50) for i in range(50)} == set(range(7))
    lone = torch.full((7,), -math.inf)
    lone[4] = 1.0
    for draw in (0.0, 0.5, 1 - 2**-32):
        assert ops.sample(lone, temperature=1, top_k=0, top_p=1, draw=draw) == 4
        assert ops.sample(lone, temperature=5, top_k=3, top_p=0.5, draw=draw) == 4
    # a token of no weight is never drawn, not even at the ends
    edges = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    assert {ops.sample(edges, temperature=1, top_k=0, top_p=1, draw=d) for d in (0.0, 1 - 2**-32)} == {1, 2}
    hot = torch.randn(50) * 1e4
    assert ops.sample(hot, temperature=1e-3, top_k=0, top_p=1, draw=0.5) == int(hot.argmax())


def test_a_top_k_of_ties_beyond_the_head_keeps_them_all() -> None:
    flat = torch.zeros(1000)
    chosen = {ops.sample(flat, temperature=1, top_k=5, top_p=0.5, draw=i / 2000) for i in range(2000)}
    assert len(chosen) == 500


def test_the_coldest_draw_is_greedy_and_broken_logits_are_an_error() -> None:
    logits = torch.randn(50)
    assert ops.sample(logits, temperature=1e-46, top_k=0, top_p=1, draw=0.99) == int(logits.argmax())
    assert ops.sample(logits, temperature=1e-4, top_k=0, top_p=1, draw=0.99) == int(logits.argmax())
    for broken in (math.nan, math.inf):
        logits[7] = broken
        for temperature in (0, 1):
            with pytest.raises(FloatingPointError, match="largest logit"):
                ops.sample(logits, temperature=temperature, top_k=0, top_p=1, draw=0.5)


def test_repetition_penalty_zero_and_one_are_off() -> None:
    logits, seen = torch.randn(9), torch.ones(9, dtype=torch.bool)
    for off in (0.0, 1.0):
        token = ops.sample(logits, temperature=0, top_k=0, top_p=1, draw=0, seen=seen, repetition_penalty=off)
        assert token == int(logits.argmax())
