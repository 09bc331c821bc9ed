"""Mutants of RMSNorm and SwiGLU."""

from __future__ import annotations

from tests.kernels.mutations.mutant import Mutant


def norm(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "rms_norm.py", "test_layers.py", old, new)


def swiglu(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "swiglu.py", "test_layers.py", old, new)


MUTANTS = (
    norm("mean over the block", "axis=0) / dim + eps", "axis=0) / BLOCK + eps"),
    norm("eps forgotten", "/ dim + eps)", "/ dim)"),
    norm("the sum is normed before it is rounded", "        value = kept.to(tl.float32)\n", ""),
    norm("the sum is not added", "value += tl.load(residual", "value += 0 * tl.load(residual"),
    norm("residual at x's stride", "residual + row * stride_residual", "residual + row * stride_x"),
    norm("no mask of features", "inside = feature < dim", "inside = feature < BLOCK"),
    norm("offsets in 32 bits", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    norm("a weight of any stride", "assert weight.is_contiguous()", "pass"),
    norm("a weight of any length", "assert weight.shape == (dim,)", "pass"),
    swiglu("up from the gate", "gate_up + hidden + feature", "gate_up + feature"),
    swiglu("the wrong half of the sigmoid", "tl.where(gate < 0.0, small, 1.0)", "tl.where(gate < 0.0, 1.0, small)"),
    swiglu("exp overflows", "tl.exp(-tl.abs(gate))", "tl.exp(-gate)"),
    swiglu("last piece left out", "triton.cdiv(both // 2, config.block_n)", "max(1, both // 2 // config.block_n)"),
    swiglu("no mask of features", "inside = feature < hidden", "inside = feature < hidden + BLOCK"),
    swiglu("offsets in 32 bits", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
)
