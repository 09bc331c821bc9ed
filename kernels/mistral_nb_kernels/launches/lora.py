"""LoRA of rank 16 on Mistral-7B's q, k, v and down projections, for few and for many rows; many expand rank 64."""

from __future__ import annotations

import torch

from mistral_nb_kernels.configs import Row
from mistral_nb_kernels.launches.attention import Forms
from mistral_nb_kernels.lora import FEW, lora_expand, lora_shrink
from mistral_nb_kernels.packed import Lora, Norm

__all__ = ["FORMS", "MATRIX"]

DIM, HIDDEN = 4096, 14336
QKV, DOWN = (4096, 5120, 6144), (4096,)
MANY = FEW + 1


def _lora(inputs: int, ends: tuple[int, ...], rank: int, dtype: torch.dtype) -> Lora:
    a, b = torch.zeros(2, len(ends) * rank, inputs, dtype=dtype), torch.zeros(2, ends[-1], rank, dtype=dtype)
    return Lora(a, b, ends)


def _shrink(row: Row, dtype: torch.dtype) -> Forms:
    slots, x = torch.zeros(MANY, dtype=torch.int32), torch.zeros(MANY, HIDDEN, dtype=dtype)
    scale = torch.zeros(MANY)
    norm = Norm(torch.zeros(DIM, dtype=dtype), 1e-5)
    qkv, down, config = _lora(DIM, QKV, 16, dtype), _lora(HIDDEN, DOWN, 16, dtype), row.config
    yield "norm", lambda: lora_shrink(x[:1, :DIM], qkv, slots[:1], scale[:1], norm=norm, config=config)
    yield "down", lambda: lora_shrink(x[:1], down, slots[:1], scale[:1], config=config)
    if config.block_m:
        yield "rows", lambda: lora_shrink(x[:, :DIM], qkv, slots, scale, config=config)
        yield "rows, down", lambda: lora_shrink(x, down, slots, scale, config=config)


def _expand(row: Row, dtype: torch.dtype) -> Forms:
    slots, y = torch.zeros(MANY, dtype=torch.int32), torch.zeros(MANY, QKV[-1], dtype=dtype)
    few, many = _lora(DIM, QKV, 16, dtype), _lora(DIM, QKV, 64, dtype)
    shrunk = torch.zeros(MANY, len(QKV) * 64)
    yield "", lambda: lora_expand(shrunk[:1, : len(QKV) * 16], few, slots[:1], y[:1], config=row.config)
    if row.config.block_m:
        yield "rows", lambda: lora_expand(shrunk, many, slots, y, config=row.config)


FORMS = {"lora_shrink": _shrink, "lora_expand": _expand}
MATRIX: dict[str, dict[int, str]] = {"lora_shrink_rows_kernel": {}}
"""Tiles of too few rows for wgmma and tcgen05. `lora_expand_rows_kernel` multiplies there too, but has no loop whose
copies could run ahead."""
