"""Mutants of RoPE, decode and prefill attention."""

from __future__ import annotations

from tests.kernels.mutations.mutant import Mutant


def rope(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "rope.py", "test_rope.py", old, new)


def decode(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "decode_attention.py", "test_decode_attention.py", old, new)


def code(what: str, old: str, new: str) -> Mutant:
    """What only the machine code shows."""
    return Mutant(what, "decode_attention.py", "test_compile_report.py", old, new)


def prefill(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "attention.py", "test_prefill_attention.py", old, new)


def tiles(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "tiles.py", "test_prefill_attention.py", old, new)


MUTANTS = (
    rope("turned the other way", "(first * cos[None, :] - second", "(first * cos[None, :] + second"),
    rope("halves swapped", "at = x + head * stride + tl", "at = x + head * stride + HALF - 1 - tl"),
    rope(
        "no mask of padded heads",
        "second * sin[None, :]).to(y.dtype.element_ty), mask=head < HEADS",
        "second * sin[None, :]).to(y.dtype.element_ty), mask=head < PADDED",
    ),
    rope("one position late", "angle = position.to(tl.int64) * stride", "angle = (position + 1).to(tl.int64) * stride"),
    rope("padding rows written", "if position < 0:", "if position < -1:"),
    rope("the page without its place in it", "position % PAGE * stride_token", "0 * stride_token"),
    rope("sequence ignored", "sequence * stride_table", "0 * stride_table"),
    rope("offsets in 32 bits", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    rope(
        "v at k's stride", "v + row * stride_v + head * stride_v_head", "v + row * stride_v + head * stride_k_head * 2"
    ),
    decode("wrong KV head", "k += kv_head * stride_page_head", "k += 0 * stride_page_head"),
    decode("wrong query heads", "(kv_head * GROUP + member)[:, None]", "(kv_head * PADDED + member)[:, None]"),
    decode("scale forgotten", "d**-0.5 * math.log2(math.e)", "math.log2(math.e)"),
    decode("window off by one", "tl.maximum(length - window, 0)", "tl.maximum(length - window - 1, 0)"),
    decode("window's mask dropped", "visible = visible & (at + column >= lowest)", "visible = visible"),
    decode("length's mask dropped", "visible = at + column < length", "visible = at + column < at + BLOCK_N"),
    decode("last split skipped", "tl.cdiv(length, SPLIT)", "tl.maximum(length // SPLIT, 1)"),
    decode("a split without its end", "tl.minimum(split * SPLIT + SPLIT, length)", "length"),
    decode(
        "a program's splits skipped",
        "tl.range(first + program, last, programs)",
        "tl.range(first + program, last, programs + 1)",
    ),
    decode("the next split's page is another's", "(split + programs) * SPLIT", "(split + 1) * SPLIT"),
    decode(
        "the window's first page is the split's",
        "begin = tl.maximum((first + program) * SPLIT, lowest_tile)",
        "begin = (first + program) * SPLIT",
    ),
    decode("a length past the capacity", "length = tl.minimum(asked, capacity)", "length = asked"),
    decode("a token past the capacity written over the last", "tl.where(asked <= capacity, D, 0)", "D"),
    decode("a batch larger than the table", "assert batch <= len(kv.table)", "assert batch"),
    decode("fewer lengths than rows", "assert len(lengths) == batch", "assert batch"),
    decode("query heads left over", "assert hq % kv.n_kv_heads == 0", "assert hq"),
    decode(
        "another model's k and v", "assert k.shape == v.shape == (len(q), kv.n_kv_heads, q.shape[-1])", "assert q.shape"
    ),
    Mutant(
        "an owner's counters ignored", "paged.py", "test_decode_attention.py", "if self.arrived is None:", "if True:"
    ),
    decode(
        "splits weighed alike",
        'tl.load(lse + row, mask=inside, other=float("-inf"))',
        'tl.where(inside, 0.0, float("-inf"))',
    ),
    decode(
        "splits before the window combined",
        "tl.range(first, last, BLOCK, num_stages=STAGES)",
        "tl.range(0, last, BLOCK, num_stages=STAGES)",
    ),
    decode("combined by the first to arrive", "== arriving - 1:", "== 0:"),
    decode("splits waited for", "tl.minimum(tl.maximum(last - first, 1), programs)", "tl.maximum(last - first, 1)"),
    decode("counter not reset", "tl.store(arrived + head, 0)", "tl.store(arrived + head, arriving)"),
    decode("counter of another head", "tl.atomic_add(arrived + head, 1", "tl.atomic_add(arrived + sequence, 1"),
    code("counted without a release", 'sem="acq_rel"', 'sem="relaxed"'),
    code("released to its own block", 'scope="gpu"', 'scope="cta"'),
    code("the newest token read before it is there", "tl.debug_barrier()  # this program", "pass  # this program"),
    decode("newest token written by a neighbour", "(last - 1 - first) % programs", "(last - first) % programs"),
    decode(
        "the newest key's halves swapped",
        "turned = _turned(tl.load(k_new + feature)",
        "turned = _turned(tl.load(k_new + partner)",
    ),
    decode("angles of the next position", "angle = tl.maximum(length - 1, 0)", "angle = tl.maximum(length, 0)"),
    decode("RoPE halves swapped", "tl.where(feature < half, -1.0, 1.0)", "tl.where(feature < half, 1.0, -1.0)"),
    decode("an empty place divides by zero", "tl.where(total == 0.0, 1.0, total)", "total"),
    prefill(
        "causal mask off by one",
        "visible = (at + column)[None, :] <= position[:, None]",
        "visible = (at + column)[None, :] < position[:, None] + 2",
    ),
    prefill("window off by one", "> position[:, None] - window", ">= position[:, None] - window"),
    prefill("tiles counted twice", "        begin = end\n", "        begin = begin\n"),
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
        "stored = (at + column < length)[:, None]",
        "stored = (at + column < length + BLOCK_N)[:, None]",
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
    *(
        Mutant(
            f"pages behind the table looked up in {op}",
            "tiles.py",
            f"test_{op}_attention.py",
            "tl.minimum(at, last)",
            "at",
        )
        for op in ("decode", "prefill")
    ),
    tiles("old sums not rescaled", "tl.exp2(m - pivot)", "tl.exp2(m - m)"),
    rope(
        "pages in 32 bits",
        "position // PAGE).to(tl.int64)",
        "position // PAGE)",
    ),
    tiles("pages in 32 bits", "page.to(tl.int64) * stride_page", "page * stride_page"),
)
