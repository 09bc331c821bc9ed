"""Whether what was drawn can have come from a distribution: Pearson's chi-square test, at 1 in 1000."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["assert_drawn_from"]


def assert_drawn_from(observed: Tensor, expected: Tensor) -> None:
    """Counts [n] against those expected [n], fp64; what is expected less than 5 times counts together.

    The quantile is Wilson and Hilferty's (1931).
    """
    assert (observed[expected == 0] == 0).all()
    rare = expected < 5
    observed, expected = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (observed, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert float(((observed - expected) ** 2 / expected).sum()) < quantile
