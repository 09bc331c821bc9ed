"""Packed weights: their order, their inverses, and torch's own products with them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.packed import (
    GROUPS,
    Dense,
    Int4,
    Int4Cpu,
    Int8,
    dequantize,
    pack_int4,
    quantize_int4,
    unpack_int4,
)

Exact = Callable[[Tensor, Tensor, Tensor], None]


def random_int4(outputs: int, inputs: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.randint(16, (outputs, inputs), dtype=torch.uint8)
    scale, minimum = torch.randn(2, outputs, inputs // group).half()
    return codes, scale, minimum


@pytest.mark.parametrize("group", GROUPS)
def test_int4_comes_back_as_it_went_in(group: int) -> None:
    codes, scale, minimum = random_int4(5, 6 * group, group)
    packed = pack_int4(codes, scale, minimum, group)
    assert packed.shape == codes.shape
    assert packed.packed.shape == (5, 3 * group)
    assert torch.equal(unpack_int4(packed), codes)
    assert torch.equal(packed.scale, scale)
    assert torch.equal(packed.minimum, minimum)
    wide = codes.double().unflatten(1, (-1, group)) * scale.double()[..., None] + minimum.double()[..., None]
    assert torch.equal(dequantize(packed, torch.float64), wide.flatten(1))
    again = quantize_int4(dequantize(packed, torch.float32), group)
    assert torch.equal(dequantize(again, torch.float32).argmax(1), dequantize(packed, torch.float32).argmax(1))


def test_the_order_of_the_codes_is_the_one_that_is_written_down() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)[None]
    codes[0, 64:] = 3
    packed = pack_int4(codes, torch.ones(1, 4).half(), torch.zeros(1, 4).half(), 32).packed[0]
    assert [int(byte) for byte in packed[:17]] == [17 * i for i in range(16)] + [0]
    codes[0, 32:64] = 9
    packed = pack_int4(codes, torch.ones(1, 4).half(), torch.zeros(1, 4).half(), 32).packed[0]
    assert [int(byte) for byte in packed[:3]] == [0x90, 0x91, 0x92]
    assert packed[32:].unique().tolist() == [0x33]


def test_blocks_of_q4_1_are_exact() -> None:
    """llama.cpp's block of 32: fp16 d and m, 16 bytes of which byte j holds weights j (low) and j + 16 (high)."""
    outputs, blocks = 3, 4
    d, m = torch.randn(2, outputs, blocks).half()
    stored = torch.randint(256, (outputs, blocks, 16), dtype=torch.uint8)
    codes = torch.cat((stored & 15, stored >> 4), dim=-1)
    expected = codes.float() * d.float()[..., None] + m.float()[..., None]
    packed = pack_int4(codes.flatten(1), d, m, 32)
    assert torch.equal(dequantize(packed, torch.float32), expected.flatten(1))


@pytest.mark.parametrize("group", GROUPS)
def test_quantize_int4_keeps_within_half_a_step(group: int) -> None:
    x = torch.randn(7, 2 * group) * torch.logspace(-3, 1, 7)[:, None]
    x[2] = 0.25
    x[3] = 0
    packed = quantize_int4(x, group)
    step = packed.scale.float().repeat_interleave(group, 1)
    rounding = 2**-10 * x.abs().amax(1, keepdim=True)
    assert ((dequantize(packed, torch.float32) - x).abs() <= step / 2 + rounding).all()
    assert torch.equal(dequantize(packed, torch.float32)[2:4], x[2:4])


def test_int8_comes_back_as_it_went_in() -> None:
    values = torch.randint(-127, 128, (9, 64), dtype=torch.int8)
    values[:, 5] = 127
    scale = torch.rand(9) + 0.1
    again = Int8(*reference.quantize_int8(dequantize(Int8(values, scale), torch.float32)))
    assert torch.equal(again.values, values)
    torch.testing.assert_close(again.scale, scale, rtol=1e-6, atol=0)


def for_the_cpu(codes: Tensor, group: int) -> tuple[Int4Cpu, Tensor]:
    """The weight, and what it is in fp64."""
    outputs, inputs = codes.shape
    affine = torch.randn(inputs // group, outputs, 2).bfloat16()
    weight = Int4Cpu(torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1), affine, group)
    scale, middle = affine.double().repeat_interleave(group, 0).unbind(-1)
    return weight, (codes.double() - 8) * scale.t() + middle.t()


@pytest.mark.parametrize("group", GROUPS)
def test_int4_for_the_cpu_is_its_codes_scales_and_middles(exact: Exact, group: int) -> None:
    weight, truth = for_the_cpu(torch.randint(16, (192, 3 * group), dtype=torch.uint8), group)
    assert weight.shape == truth.shape
    torch.testing.assert_close(dequantize(weight, torch.float64), truth, rtol=1e-6, atol=1e-6)
    x = torch.randn(17, 3 * group)
    plain, exactly = (x.bfloat16().float() @ truth.float().t()).bfloat16(), x.double() @ truth.t()
    exact(reference.linear(x, weight).bfloat16(), plain, exactly)
    assert torch.equal(reference.linear(x, weight), reference.linear_int4_cpu(x, weight))


@pytest.mark.parametrize("group", GROUPS)
def test_rows_of_int4_on_the_cpu_get_the_same_in_any_batch_and_on_any_number_of_threads(group: int) -> None:
    weight, _ = for_the_cpu(torch.randint(16, (192, 4 * group), dtype=torch.uint8), group)
    x, threads = torch.randn(33, 4 * group), torch.get_num_threads()
    together = reference.linear_int4_cpu(x, weight)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 2, 3, 8, 30):
                assert torch.equal(reference.linear_int4_cpu(x[3 : 3 + rows], weight), together[3 : 3 + rows])
    finally:
        torch.set_num_threads(threads)


def test_int4_for_the_cpu_is_cut_at_every_64th_output() -> None:
    weight, truth = for_the_cpu(torch.randint(16, (256, 96), dtype=torch.uint8), 32)
    rows = slice(64, 192)
    part = Int4Cpu(weight.packed[rows], weight.affine[:, rows], 32)
    x = torch.randn(5, 99).bfloat16()[:, 3:]
    torch.testing.assert_close(
        reference.linear_int4_cpu(x, weight).double(), x.double() @ truth.t(), rtol=1e-2, atol=1e-1
    )
    assert torch.equal(reference.linear_int4_cpu(x, part), reference.linear_int4_cpu(x, weight)[:, rows])
    torch.testing.assert_close(dequantize(part, torch.float64), truth[rows], rtol=1e-6, atol=1e-6)


def test_a_matrix_that_groups_do_not_fill_in_pairs_is_refused() -> None:
    with pytest.raises(AssertionError):
        Int4(torch.zeros(2, 48, dtype=torch.uint8), torch.zeros(3, 2, 2, dtype=torch.float16), 32)
    assert Dense(torch.zeros(2, 96)).shape == (2, 96)
    for refused in (
        lambda: quantize_int4(torch.zeros(2, 80), 32),
        lambda: quantize_int4(torch.zeros(2, 576), 64),
        lambda: pack_int4(torch.zeros(2, 96).byte(), torch.zeros(2, 3).half(), torch.zeros(2, 3).half(), 32),
    ):
        with pytest.raises(ValueError, match="pairs of groups"):
            refused()
