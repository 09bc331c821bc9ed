"""What works on one row of features at a time, in torch: embedding, norms, SwiGLU."""

from __future__ import annotations

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
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum, both [n, dim]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a packed [n, 2 * hidden] with the gate first -> [n, hidden] (Shazeer, 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    rows = max(1, GRAIN // gate.shape[1])
    if gate.device.type != "cpu" or len(gate) <= rows:
        return F.silu(gate) * up
    return torch.cat([F.silu(part) for part in torch.split(gate, rows)]) * up
