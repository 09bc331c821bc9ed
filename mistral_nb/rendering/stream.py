"""Blocks of a text that grows, given on as patches."""

from __future__ import annotations

from mistral_nb.rendering.blocks import Block, blocks
from mistral_nb.rendering.growing import Growing
from mistral_nb.rendering.patches import Patch, difference
from mistral_nb.rendering.signs import clean

__all__ = ["BlockStream"]


class BlockStream:
    """Takes a growing text and gives what changed in its blocks, in time linear in its length; not thread-safe."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        """What the receiver of all patches has now."""
        self._growing = Growing()
        self._text: list[str] = []
        self._fresh: list[str] = []
        self._settled = 0  # blocks that the receiver has and that stay

    def add(self, text: str) -> None:
        """Takes more of the text."""
        if text:
            self._text.append(text)
            self._fresh.append(text)

    def patch(self) -> Patch | None:
        """What changed since the last patch; None if nothing did."""
        fresh = "".join(self._fresh)
        # Half of a line end, or of a sign of two units, waits for its other half.
        held = fresh[-1] if fresh and (fresh[-1] == "\r" or "\ud800" <= fresh[-1] <= "\udbff") else ""
        self._fresh = [held] if held else []
        fresh = fresh.removesuffix(held)
        if not fresh:
            return None
        self._growing.add(clean(fresh))
        patch = self._to([*self._growing.settled, *self._growing.rest], self._settled)
        self._settled = len(self._growing.settled)
        return patch

    def end(self) -> Patch | None:
        """The last patch, to the blocks of the whole text: links that were defined late, all code highlighted."""
        self._fresh, self._settled = [], 0
        return self._to(blocks("".join(self._text)), 0)

    def _to(self, new: list[Block], start: int) -> Patch | None:
        patch = difference(self.blocks, new, start)
        self.blocks = new
        return patch
