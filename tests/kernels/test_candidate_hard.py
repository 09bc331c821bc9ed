"""Hard cases of ops on rows: wrong candidates that only many rows, or one strided input alone, show."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.candidate import Failure, check, hard_cases

ON_ROWS = ("rms_norm", "add_rms_norm", "swiglu", "lora_shrink", "lora_expand")


def first_failure(function: Any, op: str) -> Failure | None:
    return next(filter(None, (check(function, hard) for hard in hard_cases(op, torch.float32, "cpu"))), None)


@pytest.mark.parametrize("tile", [16, 32, 64, 128])
@pytest.mark.parametrize("op", ON_ROWS)
def test_the_rows_behind_the_last_whole_tile(op: str, tile: int) -> None:
    def forgetful(*inputs: Any, **keywords: Any) -> Any:
        out = getattr(reference, op)(*inputs, **keywords)
        for tensor in out if isinstance(out, tuple) else (out,):
            if len(tensor) >= tile:
                tensor[len(tensor) // tile * tile :] = 0
        return out

    failure = first_failure(forgetful, op)
    assert failure is not None
    assert failure.index is not None
    rows = int(failure.where.partition(", ")[2].partition(" rows")[0])
    assert rows in (17, 19, 130)
    assert failure.index[0] >= rows // tile * tile


@pytest.mark.parametrize("swap", [False, True])
def test_a_stride_taken_for_another_tensor_s(swap: bool) -> None:
    def confused(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if swap:
            x, residual = residual, x
        if x.stride(0) <= residual.stride(0):  # else it would read outside of the tensor
            residual = residual.as_strided(residual.shape, x.stride())
        return reference.add_rms_norm(x, residual, weight, eps)

    failure = first_failure(confused, "add_rms_norm")
    assert failure is not None
    assert f"{'x' if swap else 'residual'} strided between NaN" in failure.where


@pytest.mark.parametrize("taken", ["shrunk", "y"])
def test_rows_taken_for_contiguous(taken: str) -> None:
    def packed(shrunk: Tensor, lora: Any, slots: Tensor, y: Tensor) -> Tensor:
        if taken == "shrunk":
            shrunk = shrunk.as_strided(shrunk.shape, (shrunk.shape[1], 1))
        else:
            y.copy_(y.as_strided(y.shape, (y.shape[1], 1)).clone())
        return reference.lora_expand(shrunk, lora, slots, y)

    failure = first_failure(packed, "lora_expand")
    assert failure is not None
    assert f"{taken} strided between NaN" in failure.where
