"""LoRA adapters of many requests in one batch, in torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mistral_nb_kernels.packed import Lora, Norm
from mistral_nb_kernels.reference.layers import rms_norm

__all__ = ["lora_expand", "lora_shrink"]

AT_ONCE = 1 << 20
"""Products held at a time on the CPU."""


def lora_shrink(x: Tensor, lora: Lora, slots: Tensor, *, norm: Norm | None = None) -> Tensor:
    """scale[s] * x a[s]^T of each row by its slot s: x [n, in], slots [n] int32 -> [n, parts * R] fp32.

    Rows of slot -1 get zeros. A norm is rounded to x's type, as by itself. Source: Hu et al., 2021.
    """
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros((len(x), lora.a.shape[1]), dtype=wide, device=x.device)
    for slot, rows in _by_slot(slots):
        out[rows] = _product(x[rows].to(wide), lora.a[slot].to(wide)) * lora.scale[slot]
    return out


def lora_expand(shrunk: Tensor, lora: Lora, slots: Tensor, y: Tensor) -> Tensor:
    """y [n, out] += shrunk[part] b[s]^T for each part's outputs, in place; rows of slot -1 stay. -> y.

    shrunk [n, parts * R] fp32 by `lora_shrink`, slots [n] int32. The sum is rounded once.
    """
    for slot, rows in _by_slot(slots):
        for values, begin, end in zip(
            torch.split(shrunk[rows], lora.rank, 1), (0, *lora.ends), lora.ends, strict=False
        ):
            update = _product(values, lora.b[slot, begin:end].to(values.dtype))
            y[rows, begin:end] = (y[rows, begin:end] + update).to(y.dtype)
    return y


def _by_slot(slots: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each slot in use, and its rows."""
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            yield slot, (slots == slot).nonzero()[:, 0]


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in] @ weight [out, in]^T. On the CPU by sums that are the same for a row whatever its neighbours."""
    if x.device.type != "cpu":
        return x @ weight.t()
    rows = max(1, AT_ONCE // weight.numel())
    return torch.cat([(part[:, None] * weight).sum(-1) for part in torch.split(x, rows)])
