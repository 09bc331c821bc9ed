"""LoRA adapters of many requests in one batch, in torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_nb_kernels.packed import Lora, Norm
from mistral_nb_kernels.reference.layers import in_type, one_thread, rms_norm, wider

__all__ = ["Adapting", "lora_expand", "lora_shrink"]

AT_ONCE = 1 << 20
"""Products held at a time on the CPU."""
FEW = 64
"""The most rows of one adapter that are multiplied one by one on the CPU: steps that decode."""


@dataclass(frozen=True, slots=True)
class _Alike:
    """Rows whose adapters have one rank: all of one slot, or one row for each of some slots that follow each other.

    rows: theirs in the batch, None for all of it. scale [rows, 1].
    """

    rank: int
    slots: slice
    rows: Tensor | None
    scale: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        return x if self.rows is None else x[self.rows]

    def shrink(self, x: Tensor, lora: Lora) -> Tensor:
        """x [n, in] -> a x [n, parts * rank], scaled."""
        wide, height = wider(x.dtype), len(lora.ends) * self.rank
        a = lora.a[self.slots].flatten(1)[:, : height * x.shape[1]].view(-1, height, x.shape[1])
        shrunk = _sums(in_type(x, wide), in_type(a, wide))
        return shrunk if self.scale is None else in_type(shrunk * self.scale, wide)

    def expand(self, shrunk: Tensor, lora: Lora) -> Iterator[tuple[int, int, Tensor]]:
        """shrunk [n, parts * rank] -> b of it, each part's outputs by themselves, and where they begin and end."""
        b = lora.b[self.slots]
        if lora.ranks is None:
            b = b.transpose(1, 2)
        else:
            b = b.flatten(1)[:, : self.rank * lora.ends[-1]].view(-1, self.rank, lora.ends[-1])
        b = in_type(b, shrunk.dtype)
        for part, (begin, end) in enumerate(itertools.pairwise((0, *lora.ends))):
            own = shrunk[:, part * self.rank : (part + 1) * self.rank]
            yield begin, end, _product(own, b[..., begin:end])


class Adapting:
    """What the products of a step share: which rows have which adapter. slots [n] int32, scale [n], as `lora_shrink`'s.

    The numbers of `slots` are read here, and not again.
    """

    def __init__(self, slots: Tensor, scale: Tensor | None = None) -> None:
        self._device = slots.device
        self._slots: list[int] = slots.tolist()
        self._scale = scale
        self._alike: dict[tuple[int, ...], tuple[_Alike, ...]] = {}

    def shrink(self, x: Tensor, lora: Lora) -> Tensor:
        """x [n, in] -> [n, parts * R], scaled; zeros where a row has no adapter."""
        out = torch.zeros((len(x), len(lora.ends), lora.rank), dtype=wider(x.dtype), device=x.device)
        for alike in self._of(lora):
            shrunk = alike.shrink(alike.of(x), lora).view(-1, len(lora.ends), alike.rank)
            out[slice(None) if alike.rows is None else alike.rows, :, : alike.rank] = shrunk
        return out.flatten(1)

    def expand(self, shrunk: Tensor, lora: Lora, y: Tensor) -> Tensor:
        """y [n, out] += what `shrunk` [n, parts * R] becomes, in place. -> y."""
        for alike in self._of(lora):
            own = alike.of(shrunk).view(-1, len(lora.ends), lora.rank)[..., : alike.rank]
            _add(alike, own.flatten(1), lora, y)
        return y

    def update(self, x: Tensor, lora: Lora, y: Tensor) -> Tensor:
        """`expand` of `shrink`: y [n, out] += scale b a x of x [n, in], in place. -> y."""
        for alike in self._of(lora):
            _add(alike, alike.shrink(alike.of(x), lora), lora, y)
        return y

    def _of(self, lora: Lora) -> tuple[_Alike, ...]:
        ranks = tuple(0 if slot < 0 else lora.rank if lora.ranks is None else lora.ranks[slot] for slot in self._slots)
        if ranks not in self._alike:
            self._alike[ranks] = tuple(self._grouped(ranks))
        return self._alike[ranks]

    def _grouped(self, ranks: Sequence[int]) -> Iterator[_Alike]:
        of_slots: dict[int, list[int]] = {}
        for row, (rank, slot) in enumerate(zip(ranks, self._slots, strict=True)):
            if rank:
                of_slots.setdefault(slot, []).append(row)
        runs: list[list[int]] = []
        for slot, rows in sorted(of_slots.items()):
            before = of_slots.get(slot - 1, ())
            if len(rows) == len(before) == 1 and ranks[rows[0]] == ranks[before[0]]:
                runs[-1].append(slot)
            else:
                runs.append([slot])
        for run in runs:
            rows = [row for slot in run for row in of_slots[slot]]
            chosen = None if rows == list(range(len(ranks))) else torch.tensor(rows, device=self._device)
            scale = self._scale if self._scale is None or chosen is None else self._scale[chosen]
            yield _Alike(ranks[rows[0]], slice(run[0], run[-1] + 1), chosen, None if scale is None else scale[:, None])


def _add(alike: _Alike, shrunk: Tensor, lora: Lora, y: Tensor) -> None:
    for begin, end, update in alike.expand(shrunk, lora):
        if alike.rows is None:
            y[:, begin:end].add_(update)
        else:
            y[alike.rows, begin:end] = in_type(y[alike.rows, begin:end] + update, y.dtype)


def lora_shrink(x: Tensor, lora: Lora, slots: Tensor, scale: Tensor, *, norm: Norm | None = None) -> Tensor:
    """scale[i] * x[i] a[s]^T of each row i by its slot s: x [n, in], slots [n] int32, scale [n] -> [n, parts * R] fp32.

    Rows of slot -1 get zeros. A norm is rounded to x's type, as by itself. Source: Hu et al., 2021.
    """
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    return Adapting(slots, scale).shrink(x, lora)


def lora_expand(shrunk: Tensor, lora: Lora, slots: Tensor, y: Tensor) -> Tensor:
    """y [n, out] += shrunk[part] b[s]^T for each part's outputs, in place; rows of slot -1 stay. -> y.

    shrunk [n, parts * R] fp32 by `lora_shrink`, slots [n] int32. The sum is rounded once.
    """
    return Adapting(slots).expand(shrunk, lora, y)


def _sums(x: Tensor, weights: Tensor) -> Tensor:
    """x [n, in] @ weights^T, [1, out, in] for all rows or [n, out, in] of each -> [n, out].

    As `_product`, but few rows on the CPU by sums in pairs, which miss half as much over the width of a model, as soon.
    """
    if x.device.type != "cpu" or len(x) > FEW:
        return _product(x, weights.transpose(1, 2))
    rows = max(1, AT_ONCE // weights[0].numel())
    if len(x) <= rows:
        return (x[:, None] * weights).sum(-1)
    each = zip(torch.split(x, rows), torch.split(weights.expand(len(x), -1, -1), rows), strict=True)
    return torch.cat([(part[:, None] * own).sum(-1) for part, own in each])


def _product(x: Tensor, weights: Tensor) -> Tensor:
    """x [n, in] @ weights, [1, in, out] for all rows or [n, in, out] of each -> [n, out].

    Few rows on the CPU by products of one row each, which are the same whatever its neighbours. More rows are a chunk
    of one prompt, whose number of rows is the same whenever it is computed; on one thread, as how a product is cut into
    parts goes by their number.
    """
    if len(weights) > 1 or (x.device.type == "cpu" and len(x) <= FEW):
        return torch.bmm(x[:, None], weights.expand(len(x), -1, -1))[:, 0]
    if x.device.type != "cpu":
        return x @ weights[0]
    with one_thread():
        return x @ weights[0]
