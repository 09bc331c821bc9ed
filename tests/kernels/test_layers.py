"""RMSNorm and SwiGLU under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config

norms = pytest.importorskip("mistral_nb_kernels.rms_norm")
swiglu = pytest.importorskip("mistral_nb_kernels.swiglu").swiglu

CONFIG = Config(warps=4, block_n=64)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FAR = 2**31

Exact = Callable[[Tensor, Tensor, Tensor], None]


def within_nan(x: Tensor) -> Tensor:
    """The same numbers with NaN on both sides of every row."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 24), torch.nan, dtype=x.dtype)
    wide[..., 8:-16] = x
    return wide[..., 8:-16]


def far_rows(columns: int, at: int) -> Tensor:
    """[3, columns] whose last row lies past 2^31 elements; only what is touched of the storage takes memory."""
    storage = torch.empty_strided((FAR + 2**15,), (1,), dtype=torch.float16)
    x = storage.as_strided((3, columns), (FAR // 2, 1), at)
    return x.copy_(torch.randn(3, columns))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 63, 64, 65, 576, 1025])
def test_the_norm_equals_the_reference(exact: Exact, dim: int, dtype: torch.dtype) -> None:
    """Rows of very different sizes; the smallest is near eps."""
    x, weight = within_nan((torch.randn(3, dim) * torch.tensor([[1e-3], [1], [30]])).to(dtype)), torch.rand(dim)
    weight = within_nan(weight.to(dtype))
    got = norms.rms_norm(x, weight, 1e-5, config=CONFIG)
    for row in range(3):
        here = x[row : row + 1]
        exact(
            got[row : row + 1],
            reference.rms_norm(here, weight, 1e-5),
            reference.rms_norm(here.double(), weight.double(), 1e-5),
        )
        assert torch.equal(norms.rms_norm(here, weight, 1e-5, config=CONFIG), got[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("dim", [64, 100])
def test_the_norm_of_a_sum_is_an_addition_and_a_norm(exact: Exact, dim: int, dtype: torch.dtype) -> None:
    """Bit by bit, in the types that the interpreter rounds as the hardware does."""
    x, residual = within_nan(torch.randn(4, dim).to(dtype)), torch.randn(4, 2 * dim).to(dtype)[:, :dim]
    weight = torch.rand(dim).to(dtype)
    got, total = norms.add_rms_norm(x, residual, weight, 1e-5, config=CONFIG)
    expected, summed = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, summed)
    assert torch.equal(got, norms.rms_norm(total, weight, 1e-5, config=CONFIG))
    exact(got, expected, reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)[0])


def test_the_widest_row(exact: Exact) -> None:
    x, weight = torch.randn(1, norms.WIDEST), torch.rand(norms.WIDEST)
    truth = reference.rms_norm(x.double(), weight.double(), 1e-6)
    exact(norms.rms_norm(x, weight, 1e-6, config=Config(32)), reference.rms_norm(x, weight, 1e-6), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 63, 64, 65, 200])
def test_swiglu_equals_the_reference(exact: Exact, hidden: int, dtype: torch.dtype) -> None:
    packed = within_nan((torch.randn(3, 2 * hidden) * 3).to(dtype))
    got = swiglu(packed, config=CONFIG)
    exact(got, reference.swiglu(packed), reference.swiglu(packed.double()))
    assert torch.equal(swiglu(packed[1:2], config=CONFIG), got[1:2])


def test_swiglu_at_the_ends_of_its_gate() -> None:
    gate = torch.tensor([[-1e4, -200.0, -89.0, -30.0, 0.0, 30.0, 89.0, 1e4]])
    got = swiglu(torch.cat((gate, torch.ones(1, 8)), dim=1), config=CONFIG)
    torch.testing.assert_close(got, torch.nn.functional.silu(gate.double()).float(), atol=1e-30, rtol=1e-6)


def test_a_weight_of_another_length_or_stride_is_refused() -> None:
    x, weight = torch.zeros(2, 64), torch.zeros(64, 2)
    for wrong in (weight[:, 0], weight[:32, 0].clone(), weight.flatten()):
        with pytest.raises(AssertionError):
            norms.rms_norm(x, wrong, 1e-5, config=CONFIG)


def test_no_rows_are_no_launch() -> None:
    nothing = torch.empty(0, 64)
    assert norms.rms_norm(nothing, torch.ones(64), 1e-5, config=CONFIG).shape == (0, 64)
    assert norms.add_rms_norm(nothing, nothing, torch.ones(64), 1e-5, config=CONFIG)[1].shape == (0, 64)
    assert swiglu(nothing, config=CONFIG).shape == (0, 32)


def test_rows_past_two_to_the_31_elements() -> None:
    x, residual, weight = far_rows(64, 0), far_rows(64, 2**14), torch.rand(64).half()
    got, total = norms.add_rms_norm(x, residual, weight, 1e-5, config=CONFIG)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(got, reference.rms_norm(total, weight, 1e-5), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(swiglu(x, config=CONFIG), reference.swiglu(x.clone()), atol=1e-3, rtol=2e-3)
