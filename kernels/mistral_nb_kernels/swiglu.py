"""SwiGLU of a packed projection: silu(gate) * up.

    y[i] = g[i] / (1 + exp(-g[i])) * u[i]        gate_up [n, 2 h] = (g, u), strided by rows -> [n, h]

In fp32, rounded once; no power overflows. For rows that come from a matrix product of cuBLAS; a few rows get it in
`linear`'s epilogue. A program takes a piece of a row.

Bytes: 3 n h e (e an element's). FLOPs: 6 n h. Source: Shazeer, 2020.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mistral_nb_kernels.configs import Config

__all__ = ["swiglu", "swiglu_kernel"]


@triton.jit
def swiglu_kernel(gate_up, out, hidden, stride, BLOCK: tl.constexpr):
    """Grid: (rows, pieces of a row)."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < hidden
    gate_up += row * stride
    gate = tl.load(gate_up + feature, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + hidden + feature, mask=inside, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))
    value = gate * tl.where(gate < 0.0, small, 1.0) / (1.0 + small) * up
    tl.store(out + row * hidden + feature, value.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, *, config: Config) -> Tensor:
    """gate_up [n, 2 h], the gate first -> [n, h]."""
    n, both = gate_up.shape
    assert both % 2 == 0
    assert gate_up.stride(-1) == 1
    out = torch.empty((n, both // 2), dtype=gate_up.dtype, device=gate_up.device)
    if n == 0:
        return out
    swiglu_kernel[(n, triton.cdiv(both // 2, config.block_n))](
        gate_up, out, both // 2, gate_up.stride(0), BLOCK=config.block_n, num_warps=config.warps
    )
    return out
