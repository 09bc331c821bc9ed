"""The linear layer of few rows, launched as Mistral-7B's layers are: what is fused before and after each of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_nb_kernels.configs import Row
from mistral_nb_kernels.dequantize import dequantize_rows
from mistral_nb_kernels.launches.attention import Forms
from mistral_nb_kernels.linear import DEQUANTIZED, linear
from mistral_nb_kernels.packed import GROUPS, Dense, Int4, Int8, Lora, LoraRows, Norm, Weight, pack_int4

__all__ = ["FIXED", "FORMS", "MATRIX"]

DIM, HIDDEN, ROWS = 4096, 512, 8
"""HIDDEN stands for all widths of outputs: they decide nothing but the grid."""


@dataclass(frozen=True, slots=True)
class Fused:
    """What stands around a product [ROWS, DIM] x [outputs, DIM]^T, with adapters of so many parts."""

    norm: bool = False
    residual: bool = False
    gated: bool = False
    parts: int = 0
    rank: int = 16

    def launch(self, row: Row, dtype: torch.dtype, weight: Weight) -> Tensor:
        x = torch.zeros(ROWS, DIM, dtype=dtype)
        return linear(
            x,
            weight,
            norm=Norm(torch.zeros(DIM, dtype=dtype), 1e-5) if self.norm else None,
            residual=torch.zeros(ROWS, weight.shape[0], dtype=dtype) if self.residual else None,
            gated=self.gated,
            lora=self._lora(x, weight.shape[0]) if self.parts else None,
            config=row.config,
            dot=row.arch >= 80,
        )

    def _lora(self, x: Tensor, outputs: int) -> LoraRows:
        ends = {1: (outputs,), 2: (outputs // 2, outputs), 3: (outputs // 2, outputs * 3 // 4, outputs)}[self.parts]
        a, b = torch.zeros(2, self.parts * self.rank, DIM), torch.zeros(2, outputs, self.rank)
        lora = Lora(a.to(x.dtype), b.to(x.dtype), ends)
        return LoraRows(lora, torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS, self.parts * self.rank))


LAYERS = {
    "qkv": Fused(norm=True, parts=3),
    "output": Fused(residual=True, parts=1),
    "gate, up": Fused(norm=True, gated=True, parts=2),
}
HIGH_RANK = {"qkv, rank 64": Fused(norm=True, parts=3, rank=64)}
"""For dense weights on one architecture: past 16 ranks there is a loop behind the product, whatever the weights."""


def weights(bits: int, outputs: int, dtype: torch.dtype) -> dict[str, Weight]:
    """By name, the kinds of weights of so many bits."""
    if bits >= 16:
        return {"": Dense(torch.zeros(outputs, DIM, dtype=dtype))}
    if bits == 8:
        return {"": Int8(torch.zeros(outputs, DIM, dtype=torch.int8), torch.zeros(outputs))}
    codes = torch.zeros(outputs, DIM, dtype=torch.uint8)
    scales = {group: torch.zeros(outputs, DIM // group, dtype=torch.float16) for group in GROUPS}
    return {f"g{group}": pack_int4(codes, scale, scale, group) for group, scale in scales.items()}


def _linear(row: Row, dtype: torch.dtype) -> Forms:
    """Every layer for one kind of weights of so many bits; for the others, which differ in a constant, the longest form
    on one architecture.
    """
    layers = LAYERS | HIGH_RANK if (row.arch, row.bits) == (90, 16) else LAYERS
    for index, (kind, weight) in enumerate(weights(row.bits, HIDDEN, dtype).items()):
        if index and row.arch != 90:
            return
        for layer in layers if index == 0 else ("gate, up",):
            yield f"{layer} {kind}".strip(), functools.partial(layers[layer].launch, row, dtype, weight)
        if isinstance(weight, Int8 | Int4):
            buffer = torch.zeros(HIDDEN, DIM, dtype=dtype)
            yield (
                f"dequantise {kind}".strip(),
                functools.partial(dequantize_rows, weight, 0, buffer, config=DEQUANTIZED),
            )


FORMS = {"linear": _linear}
MATRIX: dict[str, dict[int, str]] = {"linear_kernel": {}}
"""Three-dimensional products are mma on every architecture."""
FIXED = ("dequantize_kernel",)
