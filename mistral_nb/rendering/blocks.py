"""The top-level blocks of a text: code by itself, and everything else as markup that holds nothing that acts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mistral_nb.rendering.highlight import marks
from mistral_nb.rendering.markup import code_of, language_of, markup
from mistral_nb.rendering.parsing import parse
from mistral_nb.rendering.signs import clean

if TYPE_CHECKING:
    from markdown_it.token import Token

__all__ = ["Block", "block_of", "blocks", "groups"]


@dataclass(frozen=True, slots=True)
class Block:
    """One top-level block. `html` blocks are markup that holds nothing that acts; `code` blocks are plain text."""

    kind: Literal["html", "code"]
    body: str
    language: str = ""
    """Of code: one plain word, or ""."""
    marks: str = ""
    """Of code: highlighting as runs, see `mistral_nb.rendering.highlight.marks`."""


def blocks(text: str) -> list[Block]:
    """The blocks of a whole text. Takes time linear in its length, whatever it holds."""
    return [block_of(group) for group in groups(parse(clean(text), {}, growing=False))]


def groups(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """The tokens of each top-level block."""
    start = depth = 0
    for index, token in enumerate(tokens):
        depth += token.nesting
        if depth == 0:
            yield tokens[start : index + 1]
            start = index + 1


def block_of(group: Sequence[Token]) -> Block:
    """The block that the tokens of one top-level block make."""
    first = group[0]
    if first.type not in ("fence", "code_block"):
        return Block("html", markup(group))
    code, language = code_of(first), language_of(first.info)
    return Block("code", code, language, marks(code, language))
