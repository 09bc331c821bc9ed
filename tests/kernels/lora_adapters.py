"""LoRA adapters of several ranks in slots, padded or as the host has them, and scales for a batch's rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mistral_nb_kernels.packed import Lora

__all__ = ["adapters", "packed", "scales"]


def adapters(inputs: int, ends: Sequence[int], ranks: Sequence[int], dtype: torch.dtype = torch.float32) -> Lora:
    """Slots of those ranks, padded to the largest; one of rank 0 is all NaN."""
    rank, parts = max(ranks), len(ends)
    a = torch.randn(len(ranks), parts, rank, inputs) * inputs**-0.5
    b = torch.randn(len(ranks), ends[-1], rank)
    for slot, own in enumerate(ranks):
        a[slot, :, own:], b[slot, :, own:] = 0, 0
        if own == 0:
            a[slot], b[slot] = torch.nan, torch.nan
    return Lora(a.flatten(1, 2).to(dtype), b.to(dtype), tuple(ends))


def packed(padded: Lora, ranks: Sequence[int]) -> Lora:
    """The same adapters as the host has them that knows their ranks; NaN behind each."""
    parts, inputs, outputs = len(padded.ends), padded.a.shape[2], padded.ends[-1]
    a, b = torch.full_like(padded.a, torch.nan), torch.full_like(padded.b, torch.nan)
    for slot, rank in enumerate(ranks):
        own = padded.a[slot].view(parts, -1, inputs)[:, :rank]
        a[slot].view(-1)[: own.numel()] = own.flatten()
        b[slot].view(-1)[: rank * outputs] = padded.b[slot, :, :rank].t().flatten()
    return Lora(a, b, padded.ends, ranks)


def scales(slots: Tensor) -> Tensor:
    """Another for every row, also of one slot; NaN for a row without an adapter."""
    return torch.where(slots < 0, torch.nan, 0.5 + torch.arange(len(slots)) / 8)
