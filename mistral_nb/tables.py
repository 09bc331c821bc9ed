"""Plain text tables for a terminal and for a cell's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["indent", "table"]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in cells)


def indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
