"""Code between fences at the top level while it grows: its lines are read once, and highlighted now and then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mistral_nb.rendering.blocks import Block
from mistral_nb.rendering.highlight import marks
from mistral_nb.rendering.markup import language_of
from mistral_nb.rendering.signs import visible

if TYPE_CHECKING:
    from markdown_it.token import Token

__all__ = ["OpenFence", "is_closed"]

# Highlighting starts again from the top, so it waits until the code has grown by this much, and by a quarter.
MARKED_EVERY = 600  # characters


def is_closed(token: Token, last_line: str) -> bool:
    """Whether a fence of which `last_line` is the last ends with it."""
    assert token.map
    return token.map[1] - token.map[0] > 1 and _closes(last_line, token.markup)


def _closes(line: str, markup: str) -> bool:
    sign = line.strip(" \t")
    indent = len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip(" "))
    return set(sign) == {markup[0]} and len(sign) >= len(markup) and indent < 4


class OpenFence:
    """Code whose fence is open, given the text after its first line piece by piece."""

    def __init__(self, token: Token, first_line: str) -> None:
        self._markup = token.markup
        self._indent = len(first_line) - len(first_line.lstrip(" "))
        self._language = language_of(token.info)
        self._body = ""  # these, with their ends
        self._line = ""  # the line that is not whole
        self._marks = ""
        self._marked = 0  # characters of the body that were highlighted

    def feed(self, text: str) -> str | None:
        """Takes more text. The text after the closing fence once that is there, else None."""
        *lines, self._line = (self._line + text).split("\n")
        fresh: list[str] = []
        for index, line in enumerate(lines):
            if _closes(line, self._markup):
                self._body += "".join(fresh)
                rest = "\n".join([*lines[index + 1 :], self._line])
                self._line = ""
                return rest
            fresh.append(self._code(line) + "\n")
        self._body += "".join(fresh)
        return None

    def _code(self, line: str) -> str:
        """The line less as many columns of its indentation as the first line has."""
        column = at = 0
        while at < len(line) and column < self._indent and line[at] in " \t":
            column += 4 - column % 4 if line[at] == "\t" else 1
            at += 1
        return visible(" " * max(0, column - self._indent) + line[at:])

    def block(self, *, whole: bool = False) -> Block:
        """The code so far; `whole` where it will not grow, so that all of it is highlighted."""
        body = self._body
        if self._line.strip(" \t") and not _closes(self._line, self._markup):
            body += self._code(self._line)
        body = body.removesuffix("\n")
        if whole:
            self._marks = marks(body, self._language)
        elif len(self._body) >= self._marked + max(MARKED_EVERY, self._marked // 4):
            self._marked = len(self._body)
            self._marks = marks(self._body, self._language)
        return Block("code", body, self._language, self._marks)
