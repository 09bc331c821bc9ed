"""Mutants of sampling, and of its reference."""

from __future__ import annotations

from tests.kernels.mutations.mutant import Mutant


def kernel(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "sampling.py", "test_sampling.py", old, new)


def torch(what: str, old: str, new: str) -> Mutant:
    return Mutant(what, "reference/sampling.py", "test_sampling_reference.py", old, new)


MUTANTS = (
    kernel("the draw of the next position", "first, second = (position &", "first, second = (position + 1 &"),
    kernel("positions of 32 bits", "(position >> 32).to(tl.uint32)", "(position * 0).to(tl.uint32)"),
    kernel("the low half of the mass left out", "(total >> 32) + low.to(tl.int64)", "(total >> 32)"),
    kernel("the prompt's tokens not seen", "tl.where(seen, tl.where(", "tl.where(count > 0, tl.where("),
    kernel("negative scores divided", "score * repetition)", "tl.div_rn(score, repetition))"),
    kernel("presence for each time", "presence * (count > 0).to", "presence * count.to"),
    kernel("the token not counted", "counts + token, 1,", "counts + token, 0,"),
    kernel("counts of the row, not of its place", "counts += place * stride", "counts += row * stride"),
    kernel("places in 32 bits", "tl.load(places + row).to(tl.int64)", "tl.load(places + row)"),
    kernel("rows in 32 bits", "tl.program_id(0).to(tl.int64)", "tl.program_id(0)"),
    kernel("padding of a tile drawn", 'mask=inside, other=float("-inf")', "mask=inside, other=0.0"),
    kernel("NaN is a score", 'tl.where(score == score, score, float("inf"))', "score"),
    kernel("-0 below 0", "tl.where(key == _MINUS_ZERO, 0, key)", "key"),
    kernel("temperature 1", "tl.maximum(temperature, _COLDEST)", "tl.maximum(1.0, _COLDEST)"),
    kernel("greedy draws among equals", "tl.where(greedy, 0, _share", "tl.where(k < 0, 0, _share"),
    kernel("one token too few reaches a bound", "enough = at_middle >= needed", "enough = at_middle > needed"),
    kernel("the tile's k-th where k is more than a tile", "tl.where(k > BLOCK, _NEVER, kth)", "kth"),
    kernel("the lanes' k-th taken for everyone's", "& (count != k)", "& (count < k)"),
    kernel("top-p ends with two tokens between", "mass - above >= 2 * low", "mass - above >= 4 * low"),
    kernel("a middle past 32 bits", "low + ((high - low) >> 1)", "(low + high) >> 1"),
    kernel("a draw from what top-p dropped", "least, total = _bound_of_mass", "least, _ = _bound_of_mass"),
    kernel("tiles before not counted", "before + tl.cumsum", "tl.cumsum"),
    kernel("a token without weight drawn", "(cumulative <= target)", "(cumulative < target)"),
    kernel("octaves forgotten", ".to(tl.int32) >> whole.to(tl.int32)", ".to(tl.int32)"),
    kernel("parameters of any stride", "assert values.is_contiguous()", "pass"),
    kernel("parameters of any number of rows", "assert values.shape == (n,)", "pass"),
    kernel("machine code of each place's own", "values.data_ptr() % 16 == 0", "True"),
    kernel("places of any stride", "assert penalties.row.is_contiguous()", "pass"),
    torch("top-p off by one", "head[torch.searchsorted(mass, needed)]", "head[torch.searchsorted(mass, needed) - 1]"),
    torch("ties with the k-th dropped", "(scores >= scores.topk(top_k)", "(scores > scores.topk(top_k)"),
    torch("a coefficient left out", "for coefficient in EXP2[-2::-1]", "for coefficient in EXP2[-2:0:-1]"),
    torch("the draw one unit late", "cumulative, targets, right=True", "cumulative, targets, right=False"),
)
