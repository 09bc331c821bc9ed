"""The signs of a text: what is dropped before it is parsed, and how what remains is written into markup."""

from __future__ import annotations

import re

from mistral_nb.safe_markdown import plain_text

__all__ = ["attribute", "clean", "escape", "units", "visible"]

# Embeddings, overrides and isolates change the order in which other signs are shown.
_REORDERING = re.compile("[\u202a-\u202e\u2066-\u2069]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_MARKS = "[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]"
_PILE = re.compile(f"({_MARKS}{{4}}){_MARKS}+")
_SURROGATE = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """The text without control characters, its line ends newlines, its surrogates paired or replaced."""
    if not text.isascii() and _SURROGATE.search(text):
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return plain_text(text)


def visible(text: str) -> str:
    """The text with what would reorder or cover other signs shown by name or cut short."""
    text = _CONTROL.sub("\ufffd", text)
    if text.isascii():
        return text
    return _PILE.sub(r"\1", _REORDERING.sub(lambda sign: f"[U+{ord(sign[0]):04X}]", text))


def escape(text: str) -> str:
    """The text for the inside of an element."""
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def attribute(text: str) -> str:
    """The text for an attribute between double quotes."""
    return escape(text).replace('"', "&quot;")


def units(text: str) -> int:
    """The length in UTF-16 code units, by which JavaScript counts."""
    return len(text) if text.isascii() else len(text.encode("utf-16-le", "surrogatepass")) // 2
