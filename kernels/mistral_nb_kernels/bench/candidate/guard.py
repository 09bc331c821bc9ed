"""New tensors as a candidate makes them, between margins, poisoned: what it forgets or writes outside shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Guard", "bits", "poison"]

MARGIN = 64
"""Elements on each side."""
EMPTY = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
FILLED = (
    *(torch.zeros, torch.zeros_like, Tensor.new_zeros),
    *(torch.ones, torch.ones_like, Tensor.new_ones),
    *(torch.full, torch.full_like, Tensor.new_full),
)
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def poison(dtype: torch.dtype) -> float | int:
    """NaN, or the largest integer."""
    if dtype.is_floating_point:
        return torch.nan
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def bits(x: Tensor) -> Tensor:
    """x as integers of its size: NaN equals itself then, and the zeros differ."""
    return x.view(_WORDS[x.element_size()])


class Guard(TorchFunctionMode):
    """While it is entered, every tensor that torch makes has margins, and is poisoned unless it is filled."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[tuple[Tensor, Tensor, int]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function not in EMPTY and function not in FILLED:
            return made
        if "out" in (kwargs or {}) or not isinstance(made, Tensor) or not _plain(made):
            return made
        return self._within(made, filled=function in FILLED)

    def _within(self, plain: Tensor, *, filled: bool) -> Tensor:
        span = 1 + sum((n - 1) * stride for n, stride in zip(plain.shape, plain.stride(), strict=True))
        whole = torch.full((span + 2 * MARGIN,), poison(plain.dtype), dtype=plain.dtype, device=plain.device)
        own = whole.as_strided(plain.shape, plain.stride(), MARGIN)
        if filled:
            own.copy_(plain)
        self._made.append((own, whole, span))
        return own

    def broken(self) -> str:
        """What was written outside of the tensors that were made meanwhile, in words; empty if nothing."""
        for own, whole, span in self._made:
            spared = torch.full_like(whole, poison(whole.dtype))
            changed = (bits(whole) != bits(spared)).nonzero()[:, 0]
            outside = [at - MARGIN for at in changed.tolist() if not MARGIN <= at < MARGIN + span]
            if outside:
                before, after = [-at for at in outside if at < 0], [at - span + 1 for at in outside if at >= span]
                where = f"{max(before)} before its first" if before else f"{min(after)} after its last"
                return f"It writes outside of a tensor of shape {list(own.shape)} that it makes: {where} element."
        return ""


def _plain(x: Tensor) -> bool:
    if x.layout != torch.strided or x.device.type == "meta" or x.is_complex():
        return False
    return x.numel() > 0 and x.dtype.itemsize in _WORDS
