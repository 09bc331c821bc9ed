"""Calls taken out of an answer's text as it comes."""

from __future__ import annotations

from typing import Any

from mistral_nb.functions import parse_calls

__all__ = ["CallScanner"]

_HEAD = '[{"name":'
_GAP_BEFORE = (0, 1, 2, 8)
"""Places in `_HEAD` before which JSON allows white space."""


class CallScanner:
    """Passes an answer's text through, and holds back one that begins as a list of calls (see `engine.grammar`)."""

    def __init__(self) -> None:
        self._matched = 0
        self._is_text = False
        self._held = ""

    def push(self, text: str) -> str:
        """What is certain to be text."""
        if self._is_text:
            return text
        self._held += text
        if any(self._leaves_head(character) for character in text):
            self._is_text = True
            text, self._held = self._held, ""
            return text
        return ""

    def finish(self) -> tuple[str, tuple[dict[str, Any], ...]]:
        """Once no more text comes: the calls, or the text that was held back because it might have become some."""
        calls = parse_calls(self._held) or ()
        text, self._held = "" if calls else self._held, ""
        return text, calls

    def _leaves_head(self, character: str) -> bool:
        """Whether with this character the text is no list of calls."""
        if self._matched == len(_HEAD):
            return False
        if character == _HEAD[self._matched]:
            self._matched += 1
            return False
        return not (character in " \t\r\n" and self._matched in _GAP_BEFORE)
