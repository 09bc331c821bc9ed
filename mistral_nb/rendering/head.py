"""The settled items of a list that grows, or rows of a table, kept as markup so that only the last are parsed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mistral_nb.rendering.blocks import Block
from mistral_nb.rendering.markup import markup

if TYPE_CHECKING:
    from markdown_it.token import Token

__all__ = ["Cut", "Head", "cut"]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a list or table can be cut: before a token, which begins on a line; lines to be read again before it."""

    token: int
    line: int
    repeated: tuple[int, ...]


def cut(part: Sequence[Token], unfinished: int) -> Cut | None:
    """The last place of a block before which no line after `unfinished`, which is not whole, changes anything."""
    if part[0].type not in ("bullet_list_open", "ordered_list_open", "table_open"):
        return None
    kind, level, repeated = ("tr_open", 2, (0, 1)) if part[0].type == "table_open" else ("list_item_open", 1, ())
    first = _inside(part)[0]
    for index in range(len(part) - 1, first, -1):
        token = part[index]
        if token.type == kind and token.level == level and token.map and token.map[0] + 2 <= unfinished:
            assert part[0].map
            return Cut(index, token.map[0], tuple(part[0].map[0] + line for line in repeated))
    return None


def _inside(part: Sequence[Token]) -> tuple[int, int]:
    """Where the items or rows of the body begin and end."""
    if part[0].type != "table_open":
        return 1, len(part) - 1
    for index, token in enumerate(part):
        if token.type == "tbody_open":
            return index + 1, len(part) - 2
    return len(part) - 1, len(part) - 1


class Head:
    """Items or rows that are settled, and what stands around them."""

    def __init__(self, part: Sequence[Token]) -> None:
        first, last = _inside(part)
        self._opening, self._closing = markup(part[:first]), markup(part[last:])
        self._tokens: list[Token] = []
        self._markup = ""
        self._loose = False

    def take(self, part: Sequence[Token], end: int) -> None:
        """Settles the items or rows of `part` before token `end`."""
        tokens = part[_inside(part)[0] : end]
        self._tokens += tokens
        self._markup += markup(tokens)
        self._loose = self._loose or _is_loose(part)

    def block(self, part: Sequence[Token]) -> Block:
        """The whole block, where `part` is what was parsed of its rest."""
        if _is_loose(part) and not self._loose:
            self._loose = True
            _loosen(self._tokens)
            self._markup = markup(self._tokens)
        if self._loose:
            _loosen(part)
        first, last = _inside(part)
        return Block("html", f"{self._opening}{self._markup}{markup(part[first:last])}{self._closing}")


def _is_loose(part: Sequence[Token]) -> bool:
    """Whether the items of a list are paragraphs."""
    return any(token.type == "paragraph_open" and token.level == 2 and not token.hidden for token in part)


def _loosen(tokens: Sequence[Token]) -> None:
    for token in tokens:
        if token.type in ("paragraph_open", "paragraph_close") and token.level == 2:
            token.hidden = False
