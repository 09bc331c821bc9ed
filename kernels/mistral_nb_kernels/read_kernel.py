"""A kernel that only reads: what no kernel that reads device memory can be faster than."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["read"]


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr):
    """Reads BLOCK words, and writes only if their largest is one that is not there."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.max(tl.load(x + at), axis=0)
    if largest == 123456789:
        tl.store(out, largest)


def read(x: Tensor, out: Tensor, block: int) -> None:
    """Every word of x int32, whose number is a multiple of `block` and which are below 123456789; out [1] int32."""
    _read_kernel[(len(x) // block,)](x, out, BLOCK=block, num_warps=8)
