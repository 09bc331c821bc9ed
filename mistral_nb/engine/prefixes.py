"""Prompts as they are cut into what is read at a time, and what of them another one can begin with."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

__all__ = ["Cut", "Prefix", "Prompt"]


@dataclass(frozen=True, slots=True)
class Cut:
    """Pieces of `long` tokens while more than that are left, then of `short` ones, the last of what remains.

    Products round by their number of rows, so pieces go by the prompt's length alone, whatever of it is reused: the
    text is the prompt's. The shorter the last ones, the less is read again; the more of them, the more often the
    weights are.
    """

    long: int
    short: int

    def tail(self, length: int) -> int:
        """Where the short ones begin; 0 where all are alike."""
        return 0 if self.short >= self.long else max(0, length - 1) // self.long * self.long

    def end(self, begin: int, length: int) -> int:
        """Where the piece ends that begins there."""
        size = self.long if begin < self.tail(length) else min(self.short, self.long)
        return min(begin + size, length)

    def whole(self, count: int, length: int) -> int:
        """How many of the first `count` tokens are in pieces that are as long as they are meant to be."""
        tail = self.tail(length)
        begin, size = (0, self.long) if count < tail else (tail, min(self.short, self.long))
        return begin + (count - begin) // size * size


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to be read. What `variant` stands for, as an adapter, is part of every key and value."""

    variant: Hashable
    ids: list[int]
    cut: Cut

    @property
    def tail(self) -> int:
        return self.cut.tail(len(self.ids))


@dataclass(frozen=True, slots=True)
class Prefix:
    """What prefill wrote of a prompt: whole pieces, the first `count` tokens."""

    prompt: Prompt
    count: int

    def common(self, prompt: Prompt) -> int:
        """How many tokens another prompt begins with in the same pieces; not all of its own."""
        mine, ids, same = self.prompt.ids, prompt.ids, 0
        alike = self._alike(prompt)
        while prompt.variant == self.prompt.variant:
            end = prompt.cut.end(same, len(ids))
            if end > alike or end == len(ids) or mine[same:end] != ids[same:end]:
                break
            same = end
        return same

    def within(self, other: Prefix) -> bool:
        """Whether the other one begins with all of it, in the same pieces."""
        same = self.prompt.variant == other.prompt.variant and self.count <= min(other.count, self._alike(other.prompt))
        return same and self.prompt.ids[: self.count] == other.prompt.ids[: self.count]

    def _alike(self, prompt: Prompt) -> int:
        """How many of its tokens are cut as the other prompt is."""
        tails = self.prompt.tail, prompt.tail
        return self.count if tails[0] == tails[1] else min(self.count, *tails)
