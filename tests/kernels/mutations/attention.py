"""Mutants of RoPE, decode and prefill attention."""

from __future__ import annotations

from tests.kernels.mutations.mutant import Mutant


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
