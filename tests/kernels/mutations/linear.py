"""Mutants of the linear layer: its products, what is fused with them, packing and dequantising."""

from __future__ import annotations

from tests.kernels.mutations.mutant import Mutant


def linear(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "linear.py", "test_linear.py", old, new)


def products(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "products.py", "test_linear.py", old, new)


def rows(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "dequantize.py", "test_linear.py", old, new)


def reference(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "reference/linear.py", "test_packed.py", old, new)


def packed(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "packed.py", "test_packed.py", old, new)


MUTANTS = (
    linear("outputs' mask dropped", "existing = output < end", "existing = output < end + BLOCK_N"),
    linear("int8's scale forgotten", "y = tl.fma(y, scale, 0.0)", "y *= 1"),
    linear("the up projection at the gate's scale", "affine + outputs + output", "affine + output"),
    linear("eps forgotten", "tl.rsqrt(squares / inputs + eps)", "tl.rsqrt(squares / inputs)"),
    linear("the norm's factor left off the up projection", "        up = tl.fma(up, inverse, 0.0)\n", ""),
    linear("gate and up swapped", "y / (1 + tl.exp(-y)) * up", "up / (1 + tl.exp(-up)) * y"),
    linear("residual added before the gate", "y / (1 + tl.exp(-y)) * up", "(y + 1e-2) / (1 + tl.exp(-y)) * up"),
    linear("adapters of the first slot for all", "slot[None, :, None] * stride_slot", "0 * stride_slot"),
    linear("rows without an adapter read one", "mask=(slot >= 0)[:, None]", "mask=(slot >= -1)[:, None]"),
    linear(
        "the end of a rank left out", "tl.static_range(0, RANK, STEP)", "tl.static_range(0, RANK // STEP * STEP, STEP)"
    ),
    linear("the first ranks twice", "if at > 0 or BITS == 4", "if BITS == 4"),
    linear("a rank's mask dropped", "mask=(slot >= 0)[:, None] & (rank < RANK)", "mask=(slot >= 0)[:, None]"),
    linear(
        "b's mask of ranks dropped", "((slot >= 0)[:, None] & (rank < RANK))", "((slot >= 0)[:, None] & (rank >= 0))"
    ),
    linear(
        "tiles as if parts were one",
        "sum(triton.cdiv(end - begin, block_n) for begin, end in itertools.pairwise((0, *parts)))",
        "triton.cdiv(out.shape[1], block_n)",
    ),
    linear("shrunk of the first part for all", "far * stride_shrunk + part * RANK", "far * stride_shrunk"),
    linear(
        "shrunk of the gate for both", "up_factor, shrunk + RANK, slot, at, RANK", "up_factor, shrunk, slot, at, RANK"
    ),
    linear(
        "the up projection adapted as the gate",
        "(stride_slot, stride_output), output + outputs",
        "(stride_slot, stride_output), output",
    ),
    linear("int8's scale fused with what is added", "y = tl.fma(y, scale, 0.0)", "y *= scale"),
    linear("x times the norm's weight in fp16", "(many or (dot and x.dtype == torch.float16))", "many"),
    linear("the first group of rows for all", "tl.program_id(0) * N +", "0 * N +"),
    linear("int8's rows as int4's", "FEW_INT8, FEW_INT4 = 24, 32", "FEW_INT8, FEW_INT4 = 32, 32"),
    linear("many rows where a row is a program", "isinstance(weight, Dense) or not dot", "isinstance(weight, Dense)"),
    linear("a norm of any width", "norm.weight.shape == x.shape[1:] and ", ""),
    linear("adapters of any outputs", "ends[-1] == b.shape[1] == outputs", "b.shape[1] == outputs"),
    linear("gates of any number", "(not gated or ends == (outputs // 2, outputs))", "True"),
    linear("offsets of rows in 32 bits", "far = row.to(tl.int64)", "far = row"),
    linear(
        "offsets of b in 32 bits",
        "output.to(tl.int64)[:, None, None] * stride_output",
        "output[:, None, None] * stride_output",
    ),
    linear(
        "the last tile of weights skipped",
        "for first in range(0, outputs, size)",
        "for first in range(0, outputs - size, size)",
    ),
    products("mma: high codes not shifted back", "minimum += 8 * scale", "minimum += 7 * scale"),
    products("mma: the minimum forgotten", " + minimum[:, :, None] * total", ""),
    products(
        "mma: k's mask dropped",
        "inside = (first[:, None, None] + place[None, None, :]) < units",
        "inside = (first[:, None, None] + place[None, None, :]) < units + 1",
    ),
    products("mma: the next row read", "read = (row < rows)[None, :, None]", "read = (row < rows + 1)[None, :, None]"),
    products(
        "mma: x of the low codes for both",
        "first // GROUP * (2 * GROUP) + first % GROUP + half * GROUP",
        "first // GROUP * (2 * GROUP) + first % GROUP",
    ),
    products(
        "mma: scales of the first outputs",
        "affine + group + outputs, mask=known, other=0)\n            value = tl.load(x + feature[:, None, None]",
        "affine + group, mask=known, other=0)\n            value = tl.load(x + feature[:, None, None]",
    ),
    products("mma: squares after the gain", "squares += wide * wide\n", "squares += tl.abs(wide)\n"),
    products("mma: one slice left out", "tl.sum(acc, axis=0), ", "tl.sum(acc * (slice_ > 0)[:, None, None], axis=0), "),
    products("sums: k's mask dropped", "inside = at + place < units", "inside = at + place < units + 1"),
    products("sums: high codes twice", "(tile >> 4 * HALF) & 15", "(tile >> 4) & 15"),
    products(
        "sums: the second group's scale for both", "(at + chunk) // GROUP * 2 + half", "(at + chunk) // GROUP * 2 + 1"
    ),
    products("sums: the first row for all", "tl.sum(row, axis=0).to(tl.int64) * stride_x", "0 * stride_x"),
    products("x in 32 bits", "row.to(tl.int64)[None, :, None] * stride_x", "row[None, :, None] * stride_x"),
    products(
        "mma: weights in 32 bits",
        "output.to(tl.int64)[None, :, None] * stride_weight",
        "output[None, :, None] * stride_weight",
    ),
    products(
        "sums: weights in 32 bits",
        "output.to(tl.int64)[:, None, None] * stride_weight",
        "output[:, None, None] * stride_weight",
    ),
    rows("a piece too few", "triton.cdiv(values.shape[1], config.block_n)", "values.shape[1] // config.block_n - 1"),
    rows("groups swapped", "group = unit // GROUP * 2 + half", "group = unit // GROUP * 2 + 1 - half"),
    rows("the first output's scale", "stride_group + output, mask=inside", "stride_group, mask=inside"),
    reference("a part's scales taken for contiguous", "weight.affine.contiguous()", "weight.affine"),
    reference("x taken for contiguous", "x.to(torch.bfloat16).contiguous()", "x.to(torch.bfloat16)"),
    packed("a lone group packed", "_check(codes.shape[1], group)", "pass"),
    packed("a lone group quantised", "_check(weight.shape[1], group)", "pass"),
    packed("halves swapped", "packed = (low | high << 4)", "packed = (high | low << 4)"),
    packed("codes rounded down", ".round_().clamp_(0, 15)", ".clamp_(0, 15)"),
    packed("unpacked in another order", "(blocks & 15, blocks >> 4), dim=2)", "(blocks & 15, blocks >> 4), dim=3)"),
    packed("scale and minimum swapped", "(scale.t(), minimum.t())", "(minimum.t(), scale.t())"),
)
