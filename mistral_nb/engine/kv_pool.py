"""The keys and values of all sequences that run: places in the batch, the pages behind each, and what is kept of those
that ended.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.memory import Device, Precision, estimate
from mistral_nb.engine.arena import Reserve
from mistral_nb.engine.prefixes import Prefix, Prompt
from mistral_nb_kernels import PAGE, PagedKV

__all__ = ["KVPool", "Swapped", "kv_tokens"]

KV_SHARE = 0.5
"""Share of the memory that is free after loading which keys and values may take."""

KEPT_CONTEXTS = 2
"""On the CPU so many contexts' worth of prefixes is kept at most: their memory is the whole machine's."""


def kv_tokens(args: ModelArgs, precision: Precision, device: Device, places: int, free: int | None) -> int:
    """How many tokens to hold where `free` bytes are left beside the weights; None: nobody knows.

    What is estimated for the computation is left to it. At least one full context, at most one for each place.
    """
    if free is None:
        return args.context
    need = estimate(args, precision, args.context, device)
    room = min(int(free * KV_SHARE), free - need.workspace) // (need.kv // args.context)
    return min(max(room, args.context), places * args.context)


@dataclass(eq=False, slots=True)
class _Held:
    """The pages of a place or of a kept prefix; `tokens` are promised to it, or kept in it."""

    pages: list[int]
    tokens: int
    prefix: Prefix | None = None


@dataclass(eq=False, slots=True)
class Swapped:
    """What `place` had while another has its pages: their numbers until it is saved, then `copy`, on the host.

    Each page has memory of its own: torch keeps pinned blocks for the next of that size, which it rounds up to a power
    of two.
    """

    place: int
    pages: list[int]
    prefix: Prefix | None
    copy: list[Tensor] | None = None


class KVPool:
    """Places for sequences, and pages of keys and values: [pages, n_layers, 2, n_kv_heads, page, head_dim].

    On a GPU a page holds `PAGE` tokens, and a place takes pages as its sequence grows. On the CPU it is as long as the
    context, so that attention reads a sequence where it lies: a place has one, and `tokens` bounds what is promised
    and kept; the system gives it memory as it is written to, and has it back with the place. The numbers of a place's
    pages stand in its row of `table` [places, most], int32; `most` is a multiple of 4, so that every row begins at a
    multiple of the 16 bytes that kernels are compiled for.

    Prefixes of prompts are kept when their places are given back, until somebody needs the room: the one that was used
    longest ago goes first. Where a new prompt begins as one that is kept, or that runs, its place begins with the same
    pages; on the CPU with the kept page itself where all that is in it is of use, else with a copy. A page is free once
    nobody holds it.
    """

    def __init__(
        self,
        args: ModelArgs,
        places: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        page: int | None = None,
    ) -> None:
        on_cpu = device.type == "cpu"
        self.grows = not on_cpu or page is not None
        self.page = page or (max(16, 1 << (args.context - 1).bit_length()) if on_cpu else PAGE)
        count = -(-tokens // self.page) if self.grows else 2 * places
        self.tokens = count * self.page if self.grows else tokens
        self._most_kept = self.tokens if self.grows else min(KEPT_CONTEXTS * args.context, tokens)
        shape = (count, args.n_layers, 2, args.n_kv_heads, self.page, args.head_dim)
        self._reserve = None if self.grows else Reserve(shape, dtype)
        self._data = self._reserve.tensor if self._reserve else torch.empty(shape, dtype=dtype, device=device)
        self.table = torch.zeros((places, -(-args.context // (4 * self.page)) * 4), dtype=torch.int32, device=device)
        self._arrived = torch.zeros((places, args.n_kv_heads), dtype=torch.int32, device=device)
        self._free_places = list(range(places))
        self._free_pages = list(range(count))
        self._holders = [0] * count
        self._promised = [0] * count
        self._taken: dict[int, _Held] = {}
        self._kept: list[_Held] = []
        self._copies: list[tuple[int, ...]] = []
        self._of: tuple[tuple[int, ...], tuple[PagedKV, ...]] = ((), ())

    @property
    def used(self) -> int:
        """Tokens that places have."""
        if self.grows:
            return (len(self._holders) - self.room) * self.page
        return sum(held.tokens for held in self._taken.values())

    @property
    def kept(self) -> int:
        """Tokens of prefixes that are kept; two may share some."""
        return sum(held.tokens for held in self._kept)

    @property
    def room(self) -> int:
        """Pages that no place has; prefixes may be kept in them."""
        return len(self._holders) - len({page for held in self._taken.values() for page in held.pages})

    def lacks(self, place: int, tokens: int) -> int:
        """How many pages a place would have to take to hold so many tokens."""
        return max(0, -(-tokens // self.page) - len(self._taken[place].pages))

    def take(self, tokens: int, prompt: Prompt | None = None) -> int | None:
        """The lowest free place, with pages for so many tokens; None while there is no room. What is kept of `prompt`
        is the place's before others make room, so that it counts once: as `reuse` finds it.
        """
        needed = -(-tokens // self.page)
        if not self._free_places or not self._fits(needed, tokens):
            return None
        source, count = self._longest(prompt, self._kept)
        begun = self._shared(source.pages) if source else []
        over = source is not None and count == source.tokens
        if source is not None:
            self._kept.remove(source)
            if over:
                self._let_go(source.pages)
            else:
                self._kept.append(source)
        pages = begun + self._claim(0 if over else needed, tokens)
        if begun and not over:
            self._copies.append((pages[0], *self._shared(pages[1:]), count))
            pages = pages[1:]
        place = heapq.heappop(self._free_places)
        self._taken[place] = _Held([], tokens, Prefix(prompt, count) if prompt and count else None)
        self._append(place, pages)
        return place

    def grow(self, place: int, tokens: int) -> bool:
        """Whether a place can hold so many tokens; it takes the pages that it lacks."""
        lacks = self.lacks(place, tokens)
        if not self._fits(lacks, lacks * self.page):
            return False
        self._append(place, self._claim(lacks, lacks * self.page))
        return True

    def give_back(self, place: int, keep: bool = False) -> None:
        """End the use of a place; `keep` what prefill wrote. What runs on the device already may still write behind
        that, nothing after it.
        """
        held = self._taken.pop(place)
        heapq.heappush(self._free_places, place)
        if keep and held.prefix is not None and held.prefix.count:
            self._keep(held, held.prefix)
        else:
            self._let_go(held.pages)

    def wrote(self, place: int, prefix: Prefix) -> None:
        """Prefill has written, or is about to before anything that is begun from now on."""
        self._taken[place].prefix = prefix

    def reuse(self, place: int, prompt: Prompt) -> int:
        """Begin a place with what the pages hold of its prompt: how many tokens, not all, in whole pieces."""
        mine = self._taken[place]
        source, count = self._longest(prompt, [*self._taken.values(), *self._kept, mine])
        if source is None or source is mine:
            return count
        kept = source in self._kept
        if kept:
            self._kept.remove(source)
            self._kept.append(source)
        if self.grows:
            assert not mine.pages
            assert count % self.page == 0
            self._append(place, self._shared(source.pages[: count // self.page]))
        elif kept and count == source.tokens:
            self._kept.remove(source)
            self._let_go(mine.pages)
            mine.pages.clear()
            self._append(place, source.pages)
        else:
            self._copies.append((*self._shared(source.pages), *self._shared(mine.pages), count))
        mine.prefix = Prefix(prompt, count)
        return count

    def forget(self) -> None:
        """Keep no prefix any longer."""
        while self._kept:
            self._let_go(self._kept.pop().pages)

    def swap_out(self, place: int, tokens: int) -> Swapped:
        """Give a place back whose sequence, of so many tokens, goes on later. `save` it before anything is begun."""
        held = self._taken[place]
        pages = held.pages[: -(-tokens // self.page)]
        self.give_back(place)
        return Swapped(place, pages, held.prefix)

    def save(self, swapped: Swapped) -> None:
        """Copy the pages to the host, in the device's order of work."""
        pinned = self._data.device.type == "cuda"
        swapped.copy = [torch.empty_like(self._data[0], device="cpu", pin_memory=pinned) for _ in swapped.pages]
        for page, copy in zip(swapped.pages, swapped.copy, strict=True):
            copy.copy_(self._data[page], non_blocking=True)

    def restore(self, place: int, swapped: Swapped) -> None:
        """Copy what was saved to the pages of a place."""
        held = self._taken[place]
        assert swapped.copy is not None
        for page, copy in zip(held.pages, swapped.copy, strict=False):
            self._data[page].copy_(copy, non_blocking=True)
        held.prefix = swapped.prefix

    def of(self, places: Sequence[int] | slice) -> tuple[PagedKV, ...]:
        """Each layer's pages, with the rows of the table for these places: a view of it for a slice."""
        self._copy()
        if isinstance(places, slice):
            return self._layers(self.table[places], self._arrived[places])
        chosen = tuple(places)
        if chosen != self._of[0]:
            self._of = chosen, self._layers(self.table[list(chosen)], self._arrived[: len(chosen)])
        return self._of[1]

    def _layers(self, table: Tensor, arrived: Tensor) -> tuple[PagedKV, ...]:
        layers = range(self._data.shape[1])
        return tuple(PagedKV(self._data[:, i, 0], self._data[:, i, 1], table, arrived) for i in layers)

    def _fits(self, count: int, tokens: int) -> bool:
        """Whether there are so many pages that no place has; on the CPU, whether so many tokens can be promised."""
        return count <= self.room and (self.grows or self.used + tokens <= self.tokens)

    def _claim(self, count: int, tokens: int) -> list[int]:
        """So many pages for so many tokens, which fit. As few prefixes go as can be."""
        promised = 0 if self.grows else self.used + tokens
        while self._kept and (count > len(self._free_pages) or (not self.grows and promised + self.kept > self.tokens)):
            self._let_go(self._kept.pop(0).pages)
        if count > len(self._free_pages):
            self._copy()
        return self._shared([heapq.heappop(self._free_pages) for _ in range(count)])

    def _longest(self, prompt: Prompt | None, among: Sequence[_Held]) -> tuple[_Held | None, int]:
        """Who has most of what a prompt begins with, the last of several, and how many tokens."""
        best: tuple[_Held | None, int] = None, 0
        for held in among if prompt else ():
            count = held.prefix.common(prompt) if held.prefix and prompt else 0
            if count and count >= best[1]:
                best = held, count
        return best

    def _shared(self, pages: list[int]) -> list[int]:
        for page in pages:
            self._holders[page] += 1
        return pages

    def _append(self, place: int, pages: list[int]) -> None:
        if not pages:
            return
        held = self._taken[place]
        begin, end = len(held.pages), len(held.pages) + len(pages)
        held.pages += pages
        for page in pages:
            self._promised[page] = max(self._promised[page], held.tokens)
        self._of = (), ()
        numbers = torch.tensor(pages, dtype=torch.int32, pin_memory=self.table.device.type == "cuda")
        self.table[place, begin:end].copy_(numbers, non_blocking=True)

    def _let_go(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                heapq.heappush(self._free_pages, page)
                if self._reserve is not None:
                    if not self._reserve.zeroes:  # attention multiplies by 0 what is behind the next one's tokens
                        self._data[page, ..., : self._promised[page], :] = 0
                    self._reserve.release(page)
                self._promised[page] = 0

    def _keep(self, held: _Held, prefix: Prefix) -> None:
        """Keep the pages of `prefix` instead of those of prefixes that are part of it, unless it is part of another."""
        longer = next((kept for kept in self._kept if kept.prefix and prefix.within(kept.prefix)), None)
        if longer is not None:
            self._kept.remove(longer)
            self._kept.append(longer)
            self._let_go(held.pages)
            return
        count = -(-prefix.count // self.page)
        self._let_go(held.pages[count:])
        if self._reserve is not None:
            heads, token = self._data[0, ..., 0, 0].numel(), self._data.shape[-1] * self._data.element_size()
            self._reserve.release(held.pages[0], heads, prefix.count * token)
        for kept in [kept for kept in self._kept if kept.prefix and kept.prefix.within(prefix)]:
            self._kept.remove(kept)
            self._let_go(kept.pages)
        self._kept.append(_Held(held.pages[:count], prefix.count, prefix))
        while self.kept > self._most_kept:
            self._let_go(self._kept.pop(0).pages)

    def _copy(self) -> None:
        """Do what `reuse` has put off: of one page's tokens the first, to another."""
        for source, target, count in self._copies:
            self._data[target, :, :, :, :count] = self._data[source, :, :, :, :count]
            self._let_go((source, target))
        self._copies.clear()
