"""A text that grows, and its blocks so far: what is settled is not parsed again.

A top-level block is settled once a later one begins that no further line can take back: two whole lines of that one
are there. Of a list or table that is the last block, the items or rows before the last are settled in the same way.
Words that only lengthen the last line are put into the markup that is there.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mistral_nb.rendering.blocks import Block, block_of, groups
from mistral_nb.rendering.fence import OpenFence, is_closed
from mistral_nb.rendering.head import Head, cut
from mistral_nb.rendering.parsing import MAX_INLINE, parse

if TYPE_CHECKING:
    from markdown_it.token import Token

__all__ = ["Growing"]

# A last block longer than this is parsed again only when it has grown by a part of it.
LONG = 3_000  # characters
PART = 30

_PLAIN = r"""[^\W_]|[ ,.'"?%=+-]"""
_WORDS = re.compile(f"(?:{_PLAIN})+")
_LAST_WORDS = re.compile(f"(?:{_PLAIN})*[^\\W_ ]$")
_STARTED = re.compile(r"[\s>*+\-#\d.)]*[^\W\d_]")
_ENDS = re.compile(r"(?:</(?:p|li|ul|ol|blockquote|h[3-6])>)+$")


class Growing:
    """Takes a text in pieces and gives its blocks so far."""

    def __init__(self) -> None:
        self.settled: list[Block] = []
        self.rest: list[Block] = []
        """The blocks after the settled ones."""
        self._references: dict[str, Any] = {}
        self._text = ""  # after the settled blocks
        self._parsed = 0  # how much of it the last parsing saw
        self._ends_in_words = False  # whether its last line is words at the end of the last block
        self._fence: OpenFence | None = None
        self._head: Head | None = None  # what of the first block of the text is settled

    def add(self, text: str) -> None:
        """Takes more of the text, cleaned, and brings `settled` and `rest` up to date."""
        if self._fence:
            self._grow_fence(self._fence, text)
        elif not self._lengthen(text):
            self._text += text
            grown = len(self._text) - self._parsed
            if self._parsed < LONG or grown > self._parsed // PART:
                self._parse()

    def _grow_fence(self, fence: OpenFence, text: str) -> None:
        after = fence.feed(text)
        if after is None:
            self.rest = [fence.block()]
            return
        self.settled.append(fence.block(whole=True))
        self._fence, self._text, self.rest = None, after, []
        self._parse()

    def _lengthen(self, text: str) -> bool:
        """Puts words that follow words into the markup, where that is all that parsing would do."""
        line = self._text[self._text.rfind("\n") + 1 :]
        last = self.rest[-1] if self.rest else None
        if (
            not (last and last.kind == "html" and self._ends_in_words and _WORDS.fullmatch(text))
            or len(self._text) > MAX_INLINE // 2
            or "/" in line.rpartition(" ")[2]
        ):
            return False
        ends = _ENDS.search(last.body)
        stripped = line.rstrip(" ")
        words = _LAST_WORDS.search(stripped)
        if not ends or not words or not last.body.endswith(words[0], 0, ends.start()):
            return False
        added = (line[len(stripped) :] + text).rstrip(" ")
        self.rest[-1] = Block("html", last.body[: ends.start()] + added + ends[0])
        self._text += text
        return True

    def _parse(self) -> None:
        text = self._text
        self._parsed = len(text)
        found: dict[str, Any] = {}
        parts = list(groups(parse(text, ChainMap(found, self._references), growing=True)))
        lines = text.split("\n")
        if self._open_fence(parts, lines, found):
            return
        count = _settled(parts, len(lines) - 1)
        for index, part in enumerate(parts[:count]):
            self.settled.append(self._block(part, index))
        if count:
            lines = self._drop(lines, _map(parts[count - 1])[1], found)
            self._head = None
        rest = parts[count:]
        self.rest = [self._block(part, index + count) for index, part in enumerate(rest)]
        self._ends_in_words = bool(
            rest and _map(rest[-1])[1] == text.count("\n") + 1 and _STARTED.match(lines[-1]) and "`" not in lines[-1]
        )
        if len(rest) == 1:
            offset = text.count("\n") + 1 - len(lines)
            self._cut_first(rest[0], lines, offset, found)

    def _block(self, part: Sequence[Token], index: int) -> Block:
        return self._head.block(part) if self._head and index == 0 else block_of(part)

    def _drop(self, lines: list[str], count: int, found: dict[str, Any]) -> list[str]:
        """Settles the first lines, and the links that they define."""
        for label, reference in found.items():
            if reference["map"][1] <= count:
                self._references.setdefault(label, reference)
        lines = lines[count:]
        self._text = "\n".join(lines)
        self._parsed = len(self._text)
        return lines

    def _open_fence(self, parts: list[Sequence[Token]], lines: list[str], found: dict[str, Any]) -> bool:
        """Whether the text ends in a fence that is open, whose first line is whole; everything before it settles."""
        if not parts or parts[-1][0].type != "fence":
            return False
        token = parts[-1][0]
        first, last = _map(parts[-1])
        if first >= len(lines) - 1 or is_closed(token, lines[last - 1]):
            return False
        self.settled += [self._block(part, index) for index, part in enumerate(parts[:-1])]
        self._head = None
        self._drop(lines, first + 1, found)
        self._fence = OpenFence(token, lines[first])
        text, self._text = self._text, ""
        self._grow_fence(self._fence, text)
        return True

    def _cut_first(self, part: Sequence[Token], lines: list[str], offset: int, found: dict[str, Any]) -> None:
        """Settles the items or rows of the only block left that no further line can change."""
        place = cut(part, offset + len(lines) - 1)
        if place is None:
            return
        if self._head is None:
            self._head = Head(part)
        self._head.take(part, place.token)
        repeated = [lines[line - offset] for line in place.repeated]
        for reference in found.values():
            reference["map"] = [line - offset for line in reference["map"]]
        lines = self._drop(lines, place.line - offset, found)
        self._text = "\n".join([*repeated, *lines])
        self._parsed = len(self._text)


def _map(part: Sequence[Token]) -> list[int]:
    lines = part[0].map
    assert lines
    return lines


def _settled(parts: list[Sequence[Token]], unfinished: int) -> int:
    """How many of the blocks are settled, where line `unfinished` is the last and not yet whole."""
    for index in range(len(parts) - 1, 0, -1):
        first, last = _map(parts[index])
        formula = parts[index][0] if parts[index][0].type == "math_block" else None
        may_fall_apart = formula and (formula.meta["open"] or last > unfinished)
        if first + 2 <= unfinished and not may_fall_apart:
            return index
    return 0
