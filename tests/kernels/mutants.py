"""Breaks the kernels one line at a time and runs their tests: every mutant has to turn one red.

`make mutants` copies the kernels and their tests to a folder of its own and changes one place there. A mutant that
survives, or whose line is no longer in the source, ends the run with 1.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = Path("kernels/mistral_nb_kernels")
PATIENCE = 120
"""Seconds for one file of tests, which takes about 10."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old`, found once in the module, becomes `new`; `tests` are the module's."""

    what: str
    module: str
    tests: str
    old: str
    new: str


def rope(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "rope.py", "test_rope.py", old, new)


def decode(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "decode_attention.py", "test_decode_attention.py", old, new)


def prefill(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "attention.py", "test_prefill_attention.py", old, new)


def tiles(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "tiles.py", "test_prefill_attention.py", old, new)


MUTANTS = (
    rope("turned the other way", "(first * cos[None, :] - second", "(first * cos[None, :] + second"),
    rope("halves swapped", "x + head * stride_x + feature,", "x + head * stride_x + HALF - 1 - feature,"),
    rope("no mask of padded heads", "inside = head < HEADS", "inside = head < PADDED"),
    rope("one position late", "angle = position.to(tl.int64) * stride", "angle = (position + 1).to(tl.int64) * stride"),
    rope("padding rows written", "if position < 0:", "if position < -1:"),
    rope("the page without its place in it", "position % PAGE * stride_token", "0 * stride_token"),
    rope("sequence ignored", "tl.load(sequences + row).to(tl.int64) * stride_table", "0 * stride_table"),
    rope("offsets in 32 bits", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    rope(
        "v at k's stride", "v + row * stride_v + head * stride_v_head", "v + row * stride_v + head * stride_k_head * 2"
    ),
    decode("wrong KV head", "k += kv_head * stride_page_head", "k += 0 * stride_page_head"),
    decode("wrong query heads", "heads = kv_head * GROUP + member", "heads = kv_head * PADDED + member"),
    decode("scale forgotten", "d**-0.5 * math.log2(math.e)", "math.log2(math.e)"),
    decode(
        "window off by one",
        "lowest = tl.maximum(length - window, 0)\n    begin",
        "lowest = tl.maximum(length - window - 1, 0)\n    begin",
    ),
    decode("window's mask dropped", "visible = visible & (at + column >= lowest)", "visible = visible"),
    decode("length's mask dropped", "visible = at + column < stored", "visible = at + column < at + BLOCK_N"),
    decode("last split skipped", "last = tl.cdiv(length, SPLIT)", "last = length // SPLIT"),
    decode("a split that ends on the length left out", "if (begin >= length)", "if (end >= length)"),
    decode(
        "splits weighed alike",
        'weight = tl.load(lse + row, mask=split < last, other=float("-inf"))',
        'weight = tl.load(lse + row, mask=split < last, other=float("-inf")) * 0',
    ),
    decode(
        "splits before the window combined",
        "for at in tl.range(lowest // SPLIT, last, BLOCK):",
        "for at in tl.range(0, last, BLOCK):",
    ),
    decode(
        "newest token not counted",
        "total = total * decay + tl.sum(p, axis=1)\n            acc = acc * decay[:, None] + p",
        "acc = acc * decay[:, None] + p",
    ),
    decode("newest token written by its neighbour", "if stored < end:", "if stored <= end:"),
    decode("RoPE halves swapped", "tl.where(feature < D // 2, -1.0, 1.0)", "tl.where(feature < D // 2, 1.0, -1.0)"),
    decode("an empty place divides by zero", "tl.where(total == 0.0, 1.0, total)", "total"),
    prefill(
        "causal mask off by one",
        "visible = (at + column)[None, :] <= position[:, None]",
        "visible = (at + column)[None, :] < position[:, None] + 2",
    ),
    prefill("window off by one", "> position[:, None] - window", ">= position[:, None] - window"),
    prefill("scale forgotten", "d**-0.5 * math.log2(math.e)", "math.log2(math.e)"),
    prefill(
        "a tile too many unmasked",
        "diagonal = (first + 1) // BLOCK_N * BLOCK_N",
        "diagonal = (first + BLOCK_M) // BLOCK_N * BLOCK_N",
    ),
    prefill(
        "window's edge unmasked",
        "clear = tl.cdiv(tl.maximum(first + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N",
        "clear = begin",
    ),
    prefill("positions from the chunk's start", "first = length - rows + top", "first = top"),
    prefill("wrong KV head", "v += (head // GROUP) * stride_page_head", "v += 0 * stride_page_head"),
    prefill(
        "padding keys loaded",
        "inside = (at + column < length)[:, None]",
        "inside = (at + column < length + BLOCK_N)[:, None]",
    ),
    prefill(
        "rows of the next sequence written", "inside = (row < rows)[:, None]", "inside = (row < rows + 1)[:, None]"
    ),
    prefill("offsets in 32 bits", "(first_row + row).to(tl.int64)[:, None]", "(first_row + row)[:, None]"),
    prefill(
        "last tile of rows left out",
        "triton.cdiv(rows.longest, config.block_m)",
        "max(1, rows.longest // config.block_m)",
    ),
    tiles(
        "page table ignored",
        "page = tl.load(table + tl.maximum(tl.minimum(at, last), 0) // PAGE)",
        "page = tl.load(table)",
    ),
    tiles("old sums not rescaled", "tl.exp2(m - pivot)", "tl.exp2(m - m)"),
    rope(
        "pages in 32 bits",
        "position // PAGE).to(tl.int64)",
        "position // PAGE)",
    ),
    tiles("pages in 32 bits", "page.to(tl.int64) * stride_page", "page * stride_page"),
)


def outcome(folder: Path, tests: str) -> int:
    """pytest's exit status: 0 green, 1 red, negative where the mutant killed it or, writing anywhere, hung it."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/kernels/{tests}"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=PATIENCE, env=environment).returncode
    except subprocess.TimeoutExpired:
        return -1


def complaint(mutant: Mutant, folder: Path) -> str:
    """What is wrong with the tests, in words; empty where one turns red."""
    path = folder / PACKAGE / mutant.module
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return f"its line is in the source {source.count(mutant.old)} times, not once"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        status = outcome(folder, mutant.tests)
    finally:
        path.write_text(source)
    return "" if status == 1 or status < 0 else "no test turned red" if status == 0 else f"pytest ended with {status}"


def main() -> int:
    alive = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        for part in (PACKAGE, Path("tests/kernels")):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "tests/conftest.py"):
            shutil.copy(ROOT / part, folder / part)
        for tests in sorted({mutant.tests for mutant in MUTANTS}):
            if outcome(folder, tests):
                print(f"{tests} is not green before anything is broken: run it by itself first")
                return 1
        for mutant in MUTANTS:
            wrong = complaint(mutant, folder)
            alive += bool(wrong)
            verdict = f"ALIVE ({wrong})" if wrong else "red"
            print(f"{verdict}  {mutant.module}: {mutant.what}", flush=True)
    print(f"{len(MUTANTS) - alive} of {len(MUTANTS)} mutants turned a test red")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
