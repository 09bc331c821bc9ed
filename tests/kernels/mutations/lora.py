"""Mutants of LoRA."""

from __future__ import annotations

from tests.kernels.mutations.mutant import Mutant


def lora(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "lora.py", "test_lora.py", old, new)


MUTANTS = (
    lora("scale forgotten, few rows", "tl.store(out, result * factor)", "tl.store(out, result)"),
    lora(
        "scale forgotten, many rows", "tl.store(out + place, total * factor[:, None],", "tl.store(out + place, total,"
    ),
    lora(
        "everyone has the first slot",
        "factor = tl.load(scale + row)\n",
        "factor = tl.load(scale + row)\n    slot *= 0\n",
    ),
    lora("scale of the slot, few rows", "tl.load(scale + row)", "tl.load(scale + slot)"),
    lora("scale of the slot, many rows", "tl.load(scale + row, mask", "tl.load(scale + slot, mask"),
    lora("rows without an adapter left unwritten", "        tl.store(out, 0.0)\n", ""),
    lora(
        "rows without an adapter left unwritten, in tiles",
        "factor[:, None], mask=(row < rows)[:, None] & there)",
        "factor[:, None], mask=(slot >= 0)[:, None] & there)",
    ),
    lora("norm's weight forgotten", "weight *= tl.load(norm", "weight += 0 * tl.load(norm"),
    lora("sum of squares with the norm's weight", "squares += value * value", "squares += value * value * weight"),
    lora("mean over the block", "square / IN + eps", "square / BLOCK + eps"),
    lora("norm forgotten, many rows", "x if norm is None else rms_norm(x, norm.weight, norm.eps, config=NORMED)", "x"),
    lora("a step of more than a split", "    assert SPLIT % config.block_k == 0\n", ""),
    lora("a split runs to the end", "tl.minimum(begin + SPLIT, IN)", "IN"),
    lora("the first to arrive adds up", "== tl.num_programs(2) - 1", "== 0"),
    lora("parts of one split", "partial + tl.program_id(2) * parts + place", "partial + place"),
    lora(
        "parts of rows without an adapter added",
        "mask=(slot >= 0)[:, None] & there, other=0.0)",
        "mask=there, other=0.0)",
    ),
    lora("no split of the inputs", "triton.cdiv(inputs, SPLIT)\n", "1\n"),
    lora("tiles wider than the outputs", "min(config.block_n, triton.next_power_of_2(outputs))", "config.block_n"),
    lora("shrunk values of fp16's range only", "unit, inverse = _unit(largest)", "pass"),
    lora("the last ranks' unit", "largest = tl.maximum(largest, tl.abs(value))", "largest = tl.abs(value)"),
    lora("a unit not taken back", "acc * unit)", "acc)"),
    lora("rows compiled in, to shrink", '["rows"])\ndef lora_shrink_rows', "[])\ndef lora_shrink_rows"),
    lora("rows compiled in, to expand", '["rows"])\ndef lora_expand_rows', "[])\ndef lora_expand_rows"),
    lora("another norm than the table's", "NORMED = Config(warps=32)", "NORMED = Config(warps=16)"),
    lora("a norm's weight of any stride", "and norm.weight.is_contiguous())", "and True)"),
    lora("a norm's weight of any length", "(norm.weight.shape == (inputs,) and", "(True and"),
    lora("no mask of inputs", "inside = feature < IN", "inside = feature < IN + BLOCK"),
    lora(
        "no mask of inputs in tiles",
        "inside = (at + feature < IN)[None, :]",
        "inside = (at + feature < IN + BLOCK_K)[None, :]",
    ),
    lora(
        "one slot a tile",
        "        tl.store(written, acc, mask=mine & there)\n        current = _following(slot, current)",
        "        tl.store(written, acc, mask=mine & there)\n        current = NONE",
    ),
    lora(
        "a tile's rows all get its last slot",
        "tl.store(written, acc, mask=mine & there)",
        "tl.store(written, acc, mask=(row < rows)[:, None] & there)",
    ),
    lora(
        "tiles cross parts",
        "return second.to(tl.int32) + third.to(tl.int32), begin + (index - before) * BLOCK, end",
        "return second.to(tl.int32) + third.to(tl.int32), index * BLOCK, end_2",
    ),
    lora(
        "third part of the second's factors",
        "second.to(tl.int32) + third.to(tl.int32), begin",
        "second.to(tl.int32), begin",
    ),
    lora(
        "no sum over steps of the rank",
        "total += weight.to(tl.float32) * value[None, :]",
        "total = weight.to(tl.float32) * value[None, :]",
    ),
    lora("no mask of ranks", "mask=mine & (rank < RANK), other=0.0", "mask=mine & (rank < RANK + STEP), other=0.0"),
    lora("expanded rows overwritten", "(old.to(tl.float32) + acc * unit)", "(acc * unit)"),
    lora(
        "rows of other slots written",
        "acc * unit).to(y.dtype.element_ty), mask=mine & inside[None, :])",
        "acc * unit).to(y.dtype.element_ty), mask=(row < rows)[:, None] & inside[None, :])",
    ),
    lora(
        "slots in 32 bits",
        "slot = tl.load(slots + row).to(tl.int64)\n    if slot < 0:\n        return\n    part",
        "slot = tl.load(slots + row)\n    if slot < 0:\n        return\n    part",
    ),
    lora(
        "slots in 32 bits, in tiles",
        "matrix = a + current.to(tl.int64) * stride_slot",
        "matrix = a + current * stride_slot",
    ),
)
