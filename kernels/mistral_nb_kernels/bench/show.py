"""What a run of the bench tells, in a terminal: progress on the standard error, results on the standard output."""

from __future__ import annotations

import sys
from typing import Any

from mistral_nb_kernels.bench.events import KINDS

__all__ = ["Terminal"]

_CLEAR = "\r\x1b[K"
_WIDTH = 100


class Terminal:
    """The last table, and what comes after it, as text; where the standard error is a terminal, a line of progress."""

    fills = False

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._empty = True

    def send(self, event: str, **fields: Any) -> None:
        assert tuple(fields) == KINDS[event], (event, tuple(fields))
        if self._live:
            print(end=_CLEAR, file=sys.stderr, flush=True)
        if event == "doing" and self._live:
            share = f"{fields['done'] + 1}/{fields['total']} " if fields["total"] else ""
            print(end=f"{share}{fields['text']}"[:_WIDTH], file=sys.stderr, flush=True)
        elif event in ("table", "failure", "report", "verdict"):
            self._print(fields["text"])
        elif event == "note":
            self._print(f"Note: {fields['text']}")
        elif event == "figure" and fields["saved"]:
            self._print(f"Picture: {fields['saved']}")
        elif event == "end" and fields["saved"]:
            self._print(f"Results: {fields['saved']}")
        elif event == "error":
            print(f"{'' if self._empty else chr(10)}error: {fields['text']}", file=sys.stderr, flush=True)

    def holds(self) -> bool:
        return False

    def _print(self, text: str) -> None:
        """With an empty line before what has several."""
        gap = "" if self._empty else "\n" if "\n" in text else ""
        print(f"{gap}{text}", flush=True)
        self._empty = False
