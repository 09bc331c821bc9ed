"""Paged keys and values, and the rows of several sequences: what every attention op is given.

One layer's KV is `pages` of `page` tokens, each head's tokens contiguous within a page: [pages, n_kv_heads, page, d].
A sequence's token at position p lies in page `table[sequence, p // page]` at p % page; a contiguous KV is one page as
long as the context. Everything that changes from step to step is read from device memory, so a CUDA graph that was
captured once serves every length: update the tensors in place and replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["PAGE", "PagedKV", "Rows"]

PAGE = 64
"""Tokens of a page in the engine's KV: what is tuned, timed and compiled."""


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One layer's pages. k, v [pages, n_kv_heads, page, d] with the same strides; table [batch, most] int32.

    `page` is a power of two from 16 up, and d is contiguous. A tile of keys never crosses a page: 64 tokens are enough
    for every shipped config, fewer make its tiles smaller. Of the table only the entries that a sequence's length
    covers are read.
    """

    k: Tensor
    v: Tensor
    table: Tensor
    arrived: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    """[batch, n_kv_heads] int32 zeros: decode attention counts its programs in them, and leaves zeros. So no two steps
    that share them may run at the same time; layers, which follow each other on one stream, share them all.

    Made anew where none are given, for a call or two. A CUDA graph holds the addresses of these four tensors and keeps
    none alive: whoever captures one owns them, made before the capture and kept until the last replay.
    """

    def __post_init__(self) -> None:
        assert self.k.shape == self.v.shape
        assert self.k.stride() == self.v.stride()
        assert self.k.stride(-1) == 1
        assert self.page >= 16
        assert self.page & (self.page - 1) == 0
        assert self.table.dtype == torch.int32
        assert self.table.stride(-1) == 1
        shape = len(self.table), self.n_kv_heads
        if self.arrived is None:
            arrived = torch.zeros(shape, dtype=torch.int32, device=self.table.device)
            object.__setattr__(self, "arrived", arrived)
        assert self.arrived.shape == shape
        assert self.arrived.dtype == torch.int32
        assert self.arrived.is_contiguous()

    @property
    def n_kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def page(self) -> int:
        """Tokens in a page."""
        return self.k.shape[2]

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        """The page of a sequence's token, and its place in it."""
        index, offset = divmod(position, self.page)
        return self.table.tolist()[sequence][index], offset

    def of(self, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """The first `length` tokens of a sequence, k and v [n_kv_heads, length, d]; a view of a lone page."""
        if length <= self.page:
            page, _ = self.place(sequence, 0)
            return self.k[page, :, :length], self.v[page, :, :length]
        pages = self.table[sequence, : -(-length // self.page)].long()
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :length] for x in (self.k, self.v))
        return k, v


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a batch: each sequence's newest tokens, one sequence after another.

    starts [batch + 1] int32: sequence b has rows starts[b] .. starts[b + 1] - 1. lengths [batch] int32: its tokens in
    the KV once these are written; its rows are the last of them. sequences, positions [n] int32: of each row, the
    position -1 for a row that is padding. longest: the most rows that a sequence has, known to the host.
    """

    starts: Tensor
    lengths: Tensor
    sequences: Tensor
    positions: Tensor
    longest: int

    @classmethod
    def of(cls, counts: Sequence[int], lengths: Sequence[int], device: torch.device | str = "cpu") -> Rows:
        """From each sequence's number of rows and its length with them. To a GPU in one copy that nobody waits for."""
        n, t = torch.tensor((counts, lengths), dtype=torch.int32)
        ends = n.cumsum(0, dtype=torch.int32)
        sequences = torch.arange(len(n), dtype=torch.int32).repeat_interleave(n)
        positions = torch.arange(len(sequences), dtype=torch.int32) + (t - ends).index_select(0, sequences)
        starts = torch.cat((ends - n, ends[-1:]))
        kind = torch.device(device).type
        if kind != "cpu":
            starts, t, sequences, positions = _sent((starts, t, sequences, positions), device, kind == "cuda")
        return cls(starts, t, sequences, positions, max(counts))

    @classmethod
    def newest(cls, lengths: Tensor, starts: Tensor | None = None) -> Rows:
        """One row of each sequence, its newest token. `starts` are 0 .. batch, where somebody has made them already."""
        if starts is None:
            starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        return cls(starts, lengths, starts[:-1], lengths - 1, longest=1)


def _sent(parts: Sequence[Tensor], device: torch.device | str, pinned: bool) -> tuple[Tensor, ...]:
    """int32 tensors on `device`, in one copy. Each begins at a multiple of 16 bytes: kernels are compiled for that, and
    anew for one that does not.
    """
    sizes = [-(-len(part) // 4) * 4 for part in parts]
    packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=pinned)
    for place, part in zip(torch.split(packed, sizes), parts, strict=True):
        place[: len(part)] = part
    there = torch.split(packed.to(device, non_blocking=True), sizes)
    return tuple(place[: len(part)] for place, part in zip(there, parts, strict=True))
