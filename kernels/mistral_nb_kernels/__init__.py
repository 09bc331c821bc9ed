"""The ops of the transformer, and the one rule that says which code runs them.

Every op runs its torch reference, on whatever device its inputs are; `kernels_in_use` says so to the user.
"""

from __future__ import annotations

from mistral_nb_kernels.reference import (
    attention,
    embedding,
    linear,
    linear_int8,
    quantize_int8,
    rms_norm,
    rope,
    rope_table,
    sample,
    swiglu,
    uniform,
)

__all__ = [
    "attention",
    "embedding",
    "kernels_in_use",
    "linear",
    "linear_int8",
    "quantize_int8",
    "rms_norm",
    "rope",
    "rope_table",
    "sample",
    "swiglu",
    "uniform",
]


def kernels_in_use() -> str:
    """What runs the ops, in words for a status line."""
    return "torch reference"
