"""Attention of each sequence's newest token, several sequences in one call, in torch.

How many keys a sum is over decides the order in which it is made. So a sequence's keys are padded to a number that its
own length gives, and sequences of one such number are read together: what each gets is the same to the bit, on the CPU
with keys and values in fp32 or bf16, whatever else is in the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_nb_kernels.paged import PAGE, PagedKV
from mistral_nb_kernels.reference.layers import in_type

__all__ = ["Decoding", "decode_attention", "rope_decode_attention"]

ROWS = 4
"""On the CPU SDPA gives numbers of queries that are no multiple of it other bits with one thread than with two."""
STEPS = ((256, 32), (512, 64), (2048, 128))
"""Up to so many keys they are padded to a multiple of the second number; more to one of `LONG`. All divide 512: so
many keys SDPA takes at a time, and in none of these blocks all of them are padding.
"""
LONG = 256


@dataclass(frozen=True, slots=True)
class _Together:
    """Sequences whose attention is one call.

    rows: theirs in the batch, None for all of them. pages: the neighbouring pages that they are alone in; else their
    numbers [sequences, most]. Seen are positions `begin` .. `end` - 1 of those, and unseen [sequences, 1, 1, end -
    begin] is -inf where a key is none of the sequence's, and 0 elsewhere. `finite`: what is unseen is so, too.
    """

    rows: Tensor | None
    pages: slice | Tensor
    begin: int
    end: int
    unseen: Tensor
    finite: bool

    def keys(self, pages: Tensor) -> Tensor:
        """Of `pages` [pages, n_kv_heads, page, d] what these sequences see: [sequences, n_kv_heads, t, d]."""
        if isinstance(self.pages, slice):
            own = pages[self.pages, :, self.begin : self.end]
        else:
            own = pages[self.pages].transpose(1, 2).flatten(2, 3)[:, :, self.begin : self.end]
        return own if self.finite else own.masked_fill(self.unseen.transpose(2, 3) < 0, 0)


class Decoding:
    """What the layers of a step share in which every sequence has one row, or none: lengths [batch] are with it.

    The numbers of `lengths` and of the table are read here, and not again. Where pages hold `finite` numbers only, and
    more than `PAGE` tokens, a sequence within one is read where it lies; what is behind it there is multiplied by 0.
    """

    def __init__(self, lengths: Tensor, kv: PagedKV, window: int | None = None, *, finite: bool = False) -> None:
        ends = lengths.tolist()
        self._together = tuple(_grouped(ends, kv, window, finite))
        rows = [row for row, end in enumerate(ends) if end]
        self._rows = None if len(rows) == len(ends) else torch.tensor(rows, dtype=torch.int64, device=lengths.device)
        newest = torch.tensor([ends[row] - 1 for row in rows], dtype=torch.int64, device=lengths.device)
        sequences = torch.tensor(rows, dtype=torch.int64, device=lengths.device)
        self._places = kv.table[sequences, newest // kv.page].long(), newest % kv.page
        self._vectors = _vectors(*self._places, kv.k)
        self._angles: tuple[Tensor, Tensor] | None = None
        self._lengths = lengths

    def turn(self, cos: Tensor, sin: Tensor) -> None:
        """Look the newest tokens' angles up in cos, sin [positions, d]."""
        positions = (self._lengths - 1).clamp_min(0)
        c, s = cos[positions][:, None], sin[positions][:, None]
        first, second = s.chunk(2, dim=-1)
        self._angles = c, torch.cat((-first, second), dim=-1)

    def attend(self, heads: Tensor, kv: PagedKV) -> Tensor:
        """Of one layer: heads [batch, hq + 2 hkv, d], the queries, keys and values, un-rotated -> [batch, hq, d].

        The keys, rotated, and the values go to the pages, in whose type the sums are made.
        """
        assert self._angles is not None
        hkv, (cos, sin) = kv.n_kv_heads, self._angles
        turning, values = heads[:, :-hkv], in_type(heads[:, -hkv:], kv.v.dtype)
        first, second = turning.chunk(2, dim=-1)
        turned = in_type((turning * cos).addcmul_(torch.cat((second, first), dim=-1), sin), kv.k.dtype)
        queries, keys = turned[:, :-hkv], turned[:, -hkv:]
        if self._rows is not None:
            keys, values = keys[self._rows], values[self._rows]
        self._write(keys, kv.k)
        self._write(values, kv.v)
        return in_type(self.read(queries, kv), heads.dtype)

    def _write(self, heads: Tensor, to: Tensor) -> None:
        """One vector [d] for each sequence that has a row, and each head, to the pages `to`."""
        if self._vectors is None:
            pages, offsets = self._places
            to[pages, :, offsets] = heads
            return
        d = to.shape[-1]
        count = 1 + sum((size - 1) * stride // d for size, stride in zip(to.shape[:-1], to.stride()[:-1], strict=True))
        to.as_strided((count, d), (d, 1)).index_copy_(0, self._vectors, heads.reshape(-1, d))

    def read(self, q: Tensor, kv: PagedKV) -> Tensor:
        """`decode_attention` of q [batch, hq, d], rotated, its keys written -> [batch, hq, d]."""
        batch, hq, d = q.shape
        group = hq // kv.n_kv_heads
        heads = in_type(q, kv.k.dtype).reshape(batch, -1, group, d)
        if group % ROWS:
            heads = F.pad(heads, (0, 0, 0, -group % ROWS))
        if len(self._together) == 1 and self._together[0].rows is None:
            out = _attention(heads, self._together[0], kv)
        else:
            out = torch.zeros_like(heads)
            for part in self._together:
                out[part.rows] = _attention(heads[part.rows], part, kv)
        return in_type(out[:, :, :group].reshape(batch, hq, d), q.dtype)


def decode_attention(q: Tensor, lengths: Tensor, kv: PagedKV, window: int | None = None) -> Tensor:
    """`attention` of each sequence's newest token, q [batch, hq, d]; lengths [batch] with it. Zeros at length 0."""
    return Decoding(lengths, kv, window).read(q, kv)


def rope_decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    lengths: Tensor,
    kv: PagedKV,
    window: int | None = None,
) -> Tensor:
    """`rope_write` of the newest tokens q [batch, hq, d], k, v [batch, hkv, d], then `decode_attention`, to the bit."""
    step = Decoding(lengths, kv, window)
    step.turn(cos, sin)
    return step.attend(torch.cat((q, k, v), dim=1), kv)


def _vectors(pages: Tensor, offsets: Tensor, to: Tensor) -> Tensor | None:
    """Where these tokens' vectors lie, one for each head, if `to` [pages, n_kv_heads, page, d] is whole numbers of
    vectors from one to the next: which of them they are. To copy them by number takes half the time on the CPU.
    """
    *strides, _ = to.stride()
    d = to.shape[-1]
    if any(stride % d for stride in strides):
        return None
    page, head, token = (stride // d for stride in strides)
    heads = torch.arange(to.shape[1], device=to.device) * head
    return (pages[:, None] * page + heads + offsets[:, None] * token).flatten()


def _attention(heads: Tensor, part: _Together, kv: PagedKV) -> Tensor:
    return F.scaled_dot_product_attention(heads, part.keys(kv.k), part.keys(kv.v), attn_mask=part.unseen)


def _padded(keys: int) -> int:
    """How many keys are read of so many."""
    step = _step(keys)
    return -(-keys // step) * step


def _step(keys: int) -> int:
    return next((step for most, step in STEPS if keys <= most), LONG)


def _grouped(ends: Sequence[int], kv: PagedKV, window: int | None, finite: bool) -> Iterator[_Together]:
    """What is read together of sequences of these lengths; none of 0 is in any."""
    lone = kv.page > PAGE and max(ends, default=0) <= kv.page
    pages = kv.table[:, 0].tolist() if lone else [0] * len(ends)
    spans: dict[tuple[int, int], list[int]] = {}
    for row, end in enumerate(ends):
        if end:
            first = max(0, end - window) if window else 0
            begin = first // _step(end) * _step(end)
            spans.setdefault((begin, _padded(end)), []).append(row)
    for (begin, end), rows in spans.items():
        if lone:
            for own in _neighbours(rows, pages):
                beside = slice(pages[own[0]], pages[own[0]] + len(own))
                yield _part(own, ends, beside, begin, min(end, kv.page), kv, window, finite)
        else:
            yield _part(rows, ends, _numbers(rows, ends, end, kv), begin, end, kv, window, finite=False)


def _neighbours(rows: Sequence[int], pages: Sequence[int]) -> Iterator[list[int]]:
    """Rows in the order of their pages, those together whose pages follow each other."""
    ordered = sorted(rows, key=pages.__getitem__)
    for _, own in itertools.groupby(enumerate(ordered), lambda item: pages[item[1]] - item[0]):
        yield [row for _, row in own]


def _numbers(rows: Sequence[int], ends: Sequence[int], end: int, kv: PagedKV) -> Tensor:
    """The pages up to `end` of these sequences; any of them where a sequence has none."""
    own = [-(-ends[row] // kv.page) for row in rows]
    columns = torch.arange(-(-end // kv.page), device=kv.table.device)
    covered = torch.tensor(own, device=kv.table.device)[:, None]
    return kv.table[torch.tensor(rows, device=kv.table.device)[:, None], columns.minimum(covered - 1)].long()


def _part(
    rows: list[int],
    ends: Sequence[int],
    pages: slice | Tensor,
    begin: int,
    end: int,
    kv: PagedKV,
    window: int | None,
    finite: bool,
) -> _Together:
    device = kv.table.device
    positions = torch.arange(begin, end, device=device)
    lengths = torch.tensor([ends[row] for row in rows], device=device)[:, None]
    seen = positions < lengths
    if window is not None:
        seen &= positions >= lengths - window
    unseen = torch.zeros(seen.shape, dtype=kv.k.dtype, device=device).masked_fill_(~seen, -torch.inf)[:, None, None]
    everyone = rows == list(range(len(ends)))
    return _Together(None if everyone else torch.tensor(rows, device=device), pages, begin, end, unseen, finite)
