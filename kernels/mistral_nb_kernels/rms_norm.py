"""RMSNorm of rows, alone and of a sum that is kept.

    y[i] = x[i] / sqrt(mean(x^2) + eps) * w[i]
    add_rms_norm: s = x + r, rounded to its type, and y of s: to the bit what an addition and `rms_norm` give

x, r [n, dim] in one type, strided by rows; w [dim] in any; sums in fp32, in an order that only dim decides. A program
takes a row, which it reads once and keeps in registers: dim up to 16384.

Bytes: 2 n dim e (e an element's), and w; with the addition 4 n dim e, where two launches move 5. FLOPs: 4 n dim.
Source: Zhang, Sennrich, 2019.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_kernel"]

WIDEST = 16384
"""The most features of a row: 16 a thread at 32 warps."""
PER_WARP = 512
"""Features for which a program takes another warp: 16 a thread."""


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, total, eps, dim, stride_x, stride_residual, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    """Grid: one program a row. `residual` is read and `total` written with ADD only."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    inside = feature < dim
    value = tl.load(x + row * stride_x + feature, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * stride_residual + feature, mask=inside, other=0.0).to(tl.float32)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + row * dim + feature, kept, mask=inside)
        value = kept.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / dim + eps)
    scale = tl.load(weight + feature, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + feature, (value * inverse * scale).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, config: Config) -> Tensor:
    """x [n, dim] -> [n, dim]."""
    return _norm(x, None, weight, eps, config)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, config: Config) -> tuple[Tensor, Tensor]:
    """x, residual [n, dim] -> the norm of their sum, and the sum, both [n, dim]."""
    assert x.shape == residual.shape
    assert x.dtype == residual.dtype
    assert residual.stride(-1) == 1
    return _norm(x, residual, weight, eps, config)


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, config: Config) -> tuple[Tensor, Tensor]:
    n, dim = x.shape
    assert dim <= WIDEST
    assert weight.shape == (dim,)
    assert x.stride(-1) == 1
    assert weight.is_contiguous()
    out = torch.empty((n, dim), dtype=x.dtype, device=x.device)
    total = torch.empty((n, dim), dtype=x.dtype, device=x.device) if residual is not None else out
    if n == 0:
        return out, total
    block = triton.next_power_of_2(dim)
    rms_norm_kernel[(n,)](
        x,
        residual,
        weight,
        out,
        total,
        eps,
        dim,
        x.stride(0),
        residual.stride(0) if residual is not None else 0,
        BLOCK=block,
        ADD=residual is not None,
        num_warps=max(1, min(config.warps, block // PER_WARP)),
        enable_fp_fusion=True,
    )
    return out, total
