"""Token ids to text, one at a time: what is shown never has to be taken back."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Literal

__all__ = ["Detokenizer", "Errors", "Piece"]

Piece = str | bytes
"""A token's text, with SentencePiece's mark for a space, or its bytes, which may be part of a character."""

Errors = Literal["replace", "mistral_nb.each_byte"]
"""How bytes that make no character are shown: one U+FFFD for each run of them, or for each byte (SentencePiece)."""

SPACE = "\u2581"


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("mistral_nb.each_byte", _each_byte)


class Detokenizer:
    """Turns the ids of one answer into text.

    `pieces` gives a token's piece; bytes are held back until they make a character, and a text piece ends them.
    `drop_space`: the first text piece loses one leading space. What was pushed and flushed, joined, is
    `Tokenizer.decode` of the ids.
    """

    def __init__(self, pieces: Callable[[int], Piece], *, errors: Errors, drop_space: bool) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._drop_space = drop_space

    def push(self, token: int) -> str:
        """The text that `token` completes; empty for a control token and in the middle of a character."""
        piece = self._pieces(token)
        if isinstance(piece, bytes):
            text = self._decoder.decode(piece)
        else:
            text = self._decoder.decode(b"", True)
            if self._drop_space and not text and piece.startswith(SPACE):
                piece = piece[1:]
                self._drop_space = False
            text += piece.replace(SPACE, " ")
        if text:
            self._drop_space = False
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", True)
