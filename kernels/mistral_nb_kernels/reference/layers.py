"""What works on one row of features at a time, in torch: embedding, norms, SwiGLU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_rms_norm", "embedding", "rms_norm", "swiglu"]

GRAIN = 32_768
"""Elements from which on torch splits an element-wise CPU op by threads: the end of a split that is no whole number of
vectors takes the scalar form of `exp`, which rounds differently."""


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` [vocab, dim] for `tokens` [n] (int64) -> [n, dim]."""
    return F.embedding(tokens, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32; [n, dim] -> [n, dim] (Zhang, Sennrich, 2019)."""
    wide = wider(x.dtype)
    return in_type(F.rms_norm(in_type(x, wide), weight.shape, in_type(weight, wide), eps), x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum, both [n, dim]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a packed [n, 2 * hidden] with the gate first -> [n, hidden] (Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.numel() <= GRAIN or gate.device.type != "cpu":
        return F.silu(gate) * up
    rows = max(1, GRAIN // gate.shape[1])
    return torch.cat([F.silu(part) for part in torch.split(gate, rows)]) * up


def wider(dtype: torch.dtype) -> torch.dtype:
    """In what sums are made: fp32, and fp64 for fp64."""
    return dtype if dtype == torch.float64 else torch.float32


def in_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, whose call alone takes 0.5 us where there is nothing to do: 500 of them in a step."""
    return x if x.dtype == dtype else x.to(dtype)


@contextmanager
def one_thread() -> Iterator[None]:
    """The ops within take no other thread."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
