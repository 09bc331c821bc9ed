"""The rule by which a kernel is exact enough: near fp64, in units of what torch misses it by in the same type."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exact"]


def exact(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """The error against fp64 is at most twice that of torch in the same type, plus one unit in the last place.

    Errors are relative to the largest value of their row (the last axis): a long sequence's would be nothing beside a
    short one's values. Worst row with worst row: of one row alone torch's error is now and then far below its usual.
    """
    assert got.dtype == plain.dtype
    size = truth.abs().amax(-1)
    nonzero = torch.where(size > 0, size, 1.0)
    errors = [(x.double() - truth).abs().amax(-1) for x in (got, plain)]
    allowed = 2 * (errors[1] / nonzero).max() + torch.finfo(got.dtype).eps
    off = ~(errors[0] <= allowed * size)
    assert not off.any(), (
        f"{int(off.sum())} of {off.numel()} rows, first {off.nonzero()[0].tolist()}: "
        f"error {float((errors[0] / nonzero)[off][0]):.3g}, allowed {float(allowed):.3g}"
    )
