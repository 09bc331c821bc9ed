"""How each kernel is cut up on each architecture: a table that the tuner writes, and no search while serving.

`configs.json` has one row for each op, architecture, width and number of bits. A row says on what it was measured;
`measured` null is a choice by reasoning that nobody has timed, and users are told so. What a sequence gets depends on
these numbers, so they never depend on a batch or a length.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["ARCHITECTURES", "HEAD_DIMS", "PATH", "Config", "Row", "config_for", "read", "write"]

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Compute capabilities that the table has rows for; another one takes those of the next lower."""
HEAD_DIMS = (64, 128)
PATH = Path(__file__).with_name("configs.json")


@dataclass(frozen=True, slots=True)
class Config:
    """Warps of a program, stages of its loads; a tile's rows, its columns (keys; outputs), a split, all in tokens or
    outputs; block_k: what a product adds at a time. 0 is unused.
    """

    warps: int
    stages: int = 1
    block_m: int = 0
    block_n: int = 0
    split: int = 0
    block_k: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    width: the head dimension of the attention ops, 0 for ops that run at any width. bits: of an element, or of a weight
    where the op has weights; 16 for fp16 and bf16, 32 for fp32. measured: device, versions; None: nobody has.
    """

    op: str
    arch: int
    width: int
    bits: int
    config: Config
    measured: str | None = None


def read(path: Path = PATH) -> tuple[Row, ...]:
    """The table."""
    return tuple(Row(**{**row, "config": Config(**row["config"])}) for row in json.loads(path.read_text()))


def write(rows: tuple[Row, ...], path: Path = PATH) -> None:
    """One row a line, so that a change of one is a change of one line."""
    lines = [json.dumps(asdict(row)) for row in sorted(rows, key=lambda r: (r.op, r.arch, r.width, r.bits))]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


@functools.cache
def _table() -> tuple[Row, ...]:
    return read()


def config_for(op: str, arch: int, width: int, bits: int) -> Row | None:
    """The row of `op` for a compute capability such as 90, else the next lower one's, unmeasured; else None."""
    rows = [r for r in _table() if (r.op, r.width, r.bits) == (op, width, bits) and r.arch <= arch]
    if not rows:
        return None
    row = max(rows, key=lambda r: r.arch)
    return row if row.arch == arch else Row(op, arch, width, bits, row.config)
