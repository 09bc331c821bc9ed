"""The hard cases of every op: odd sizes, sizes about those of blocks, strided rows between NaN, shuffled pages.

What a kernel must not read is NaN, or the largest integer: beside the rows of strided tensors, in pages outside of
sequences, in rows and slots without an adapter. All are small: Triton's interpreter takes seconds for an op's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.case import Case, Device, size
from mistral_nb_kernels.bench.record import dtype_name
from mistral_nb_kernels.packed import Dense, Int4, Int8, Lora, LoraRows, Norm, Weight, dequantize, quantize_int4
from mistral_nb_kernels.paged import PagedKV, Rows

__all__ = ["Hard", "doubled", "hard_cases"]

THETA = 1e4
WIDTHS = (1, 63, 64, 65, 129, 576, 1025, 4097)
"""Features of a row."""
ROWS = (*((3, width) for width in WIDTHS), (17, 40), (130, 24))
"""Rows and their features: one and two more than tiles of rows hold."""
LENGTHS, LONGER = (1, 0, 15, 16, 17, 63, 64, 65, 130), (257, 3, 1023, 1025, 2049)
"""Tokens of the sequences of a decoding step; 0: an empty place. The longer ones are some splits long."""
FIRST = ((1, 1), (15, 15), (16, 16), (17, 40))
CHUNKS, LONG = (*FIRST, (0, 7), (33, 33), (20, 75), (2, 66)), ((130, 130), (3, 1300), (17, 2049))
"""The newest rows of each prompt, and its tokens with them."""
SLOTS = (0, -1, 1, 3, 1, -1, 0)
"""Of rows; -1: no adapter. Slot 2 is nobody's."""
MANY = (*SLOTS, 3, 3, 3, -1, 0, 0, 1, 1, 1, 1, 0, 3)
"""More rows than a tile of 16."""
PROMPT = (SLOTS * 19)[:130]
"""Two more than tiles of rows hold, whatever their size."""
RANKS = (16, 5, 0, 3)


@dataclass(frozen=True, slots=True)
class Hard:
    """One hard case. rows: what each row of the result is, in words; undefined: those whose result does not count.

    dtype: the short name (bf16).
    """

    label: str
    case: Case
    rows: tuple[str, ...] = ()
    undefined: tuple[int, ...] = ()
    dtype: str = ""

    def doubled(self) -> Case:
        """The same in fp64, weights dequantised: its reference's result is the truth."""
        return replace(self.case, inputs=doubled(self.case.inputs), keywords=doubled(self.case.keywords))


def doubled(x: Any) -> Any:
    """What an op is given, in fp64 where it has floating point."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, Dense | Int8 | Int4):
        return Dense(dequantize(x, torch.float64))
    if isinstance(x, tuple):
        return tuple(map(doubled, x))
    if isinstance(x, dict):
        return {name: doubled(value) for name, value in x.items()}
    if is_dataclass(x) and not isinstance(x, type):
        return type(x)(**{field.name: doubled(getattr(x, field.name)) for field in fields(x)})
    return x


def hard_cases(op: str, dtype: torch.dtype, device: Device, seed: int = 0) -> Iterator[Hard]:
    """An op's hard cases in a type, the easiest first; the same for the same seed on a kind of device."""
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        cases = list(_MAKERS[op](_Inputs(dtype, device, seed)))
    yield from (replace(hard, dtype=dtype_name(dtype)) for hard in cases)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Random inputs of one type on one device."""

    dtype: torch.dtype
    device: Device
    seed: int

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype)

    def gain(self, dim: int) -> Tensor:
        return (torch.rand(dim, device=self.device) + 0.5).to(self.dtype)

    def ints(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def kv(self, lengths: Sequence[int], hkv: int, d: int, page: int, *, spare: int = 1) -> PagedKV:
        """Pages in random order; NaN outside of the sequences, all of page 0, which entries past a length name."""
        needed = [-(-length // page) for length in lengths]
        pool = torch.full((2, sum(needed) + 1, hkv, page, d), torch.nan, dtype=self.dtype, device=self.device)
        table = torch.zeros((len(lengths), max(needed) + spare), dtype=torch.int32)
        order = iter((torch.randperm(sum(needed)) + 1).tolist())
        for sequence, length in enumerate(lengths):
            for index in range(needed[sequence]):
                table[sequence, index] = number = next(order)
                used = min(page, length - index * page)
                pool[:, number, :, :used] = self.random(2, hkv, used, d)
        return PagedKV(pool[0], pool[1], table.to(self.device))

    def heads(self, n: int, hq: int, hkv: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as parts of one projection."""
        packed = self.random(n, hq + 2 * hkv, d)
        return packed[:, :hq], packed[:, hq : hq + hkv], packed[:, hq + hkv :]


def _between_nan(x: Tensor) -> Tensor:
    """The same rows with NaN, or the largest integer, on both sides of each; 16-byte aligned."""
    shape = (*x.shape[:-1], -(-x.shape[-1] // 8) * 8 + 24)
    poison = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = torch.full(shape, poison, dtype=x.dtype, device=x.device)
    view = wide[..., 8 : 8 + x.shape[-1]]
    return view.copy_(x)


def _case(op: str, *inputs: Any, **keywords: Any) -> Case:
    return Case(op, inputs, getattr(reference, op), 0, size(inputs, keywords), keywords)


def _strides() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """How rows may lie, in turn."""
    return itertools.cycle((("", lambda x: x), (", rows strided between NaN", _between_nan)))


def _pairs(first: str, second: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """How the rows of two tensors may lie, in turn: each strided alone, too."""
    plain, nan = (lambda x: x), "strided between NaN"
    ways = (
        ("", plain, plain),
        (f", {first} {nan}", _between_nan, plain),
        (f", {second} {nan}", plain, _between_nan),
        (f", both {nan}", _between_nan, _between_nan),
    )
    return itertools.cycle(ways)


def _rms_norm(new: _Inputs) -> Iterator[Hard]:
    for (how, lay), (n, dim), eps in zip(_strides(), ROWS, itertools.cycle((1e-5, 1e-5, 1e-6)), strict=False):
        sizes = torch.tensor([[1.0], [30.0], [1e-3]], device=new.device).repeat(-(-n // 3), 1)  # the last is near eps
        x = lay((new.random(n, dim) * sizes[:n]).to(new.dtype))
        yield Hard(f"{n} rows of {dim}{how}", _case("rms_norm", x, new.gain(dim), eps))


def _add_rms_norm(new: _Inputs) -> Iterator[Hard]:
    for (how, lay, lay_residual), (n, dim) in zip(_pairs("x", "residual"), ROWS, strict=False):
        x, residual = lay(new.random(n, dim)), lay_residual(new.random(n, dim) * 3)
        yield Hard(f"{n} rows of {dim}{how}", _case("add_rms_norm", x, residual, new.gain(dim), 1e-5))


def _swiglu(new: _Inputs) -> Iterator[Hard]:
    for (how, lay), (n, hidden) in zip(_strides(), ROWS, strict=False):
        packed = lay((new.random(n, 2 * hidden) * 3).to(new.dtype))
        yield Hard(f"{n} rows of 2 x {hidden}{how}", _case("swiglu", packed))
    gates = torch.tensor([[-1e4, -200.0, -89.0, -30.0, 0.0, 30.0, 89.0, 1e4]], device=new.device).to(new.dtype)
    yield Hard("gates from -10000 to 10000", _case("swiglu", torch.cat((gates, torch.ones_like(gates)), dim=1)))


def _rope_write(new: _Inputs) -> Iterator[Hard]:
    """The newest rows of sequences that have pages already; padding rows behind them in the second half."""
    counts, lengths = (1, 3, 18, 0, 2), (1, 17, 34, 5, 66)
    for (hq, hkv, d), page, padding in zip(
        ((1, 1, 64), (9, 3, 64), (4, 2, 128), (4, 1, 64)), (16, 64, 16, 16), (0, 0, 0, 3), strict=True
    ):
        rows = Rows.of(counts, lengths, new.device)
        if padding:
            behind = torch.full((padding,), -1, dtype=torch.int32, device=new.device)
            sequences = torch.cat((rows.sequences, torch.zeros_like(behind)))
            rows = replace(rows, sequences=sequences, positions=torch.cat((rows.positions, behind)))
        n = len(rows.positions)
        cos, sin = reference.rope_table(80, d, THETA, new.device)
        case = _case("rope_write", *new.heads(n, hq, hkv, d), cos, sin, rows, new.kv(lengths, hkv, d, page))
        label = f"{n} rows of 5 sequences, heads {hq}/{hkv} of {d}, pages of {page}"
        label += f", {padding} rows of padding" if padding else ""
        undefined = tuple(range(n - padding, n))
        yield Hard(label, case, _places(counts, lengths) + ("padding",) * padding, undefined)


def _places(counts: Sequence[int], lengths: Sequence[int]) -> tuple[str, ...]:
    return tuple(
        f"sequence {sequence}, position {position} of {length} tokens"
        for sequence, (count, length) in enumerate(zip(counts, lengths, strict=True))
        for position in range(length - count, length)
    )


ATTENTION = (
    (1, 1, 64, None, 64),
    (4, 2, 64, None, 16),
    (3, 1, 64, 20, 16),
    (4, 1, 128, None, 32),
    (2, 2, 64, 1, 16),
    (2, 1, 64, 33, 64),
    (2, 1, 64, None, 64),
)
"""Query heads, KV heads, their size, the window, the tokens of a page."""


def _shape(hq: int, hkv: int, d: int, window: int | None, page: int) -> str:
    return f"heads {hq}/{hkv} of {d}, pages of {page}{f', window {window}' if window else ''}"


def _prefill_attention(new: _Inputs) -> Iterator[Hard]:
    for at, (hq, hkv, d, window, page) in enumerate(ATTENTION):
        chunks = {0: FIRST, len(ATTENTION) - 1: LONG}.get(at, CHUNKS)
        counts, lengths = zip(*chunks, strict=True)
        n, label = sum(counts), _shape(hq, hkv, d, window, page)
        q = new.heads(n, hq, hkv, d)[0] if at % 2 else new.random(n, hq, d)
        case = _case(
            "prefill_attention", q, Rows.of(counts, lengths, new.device), new.kv(lengths, hkv, d, page), window
        )
        yield Hard(f"{n} rows of {len(counts)} sequences, {label}", case, _places(counts, lengths))


def _decoding() -> Iterator[tuple[tuple[int, ...], int, int, int, int | None, int, str, tuple[str, ...]]]:
    """Lengths and shapes of decoding steps, each in words, and what their rows are."""
    for at, (hq, hkv, d, window, page) in enumerate(ATTENTION):
        lengths = LONGER if at == len(ATTENTION) - 1 else LENGTHS
        label = f"{len(lengths)} sequences of up to {max(lengths)} tokens, {_shape(hq, hkv, d, window, page)}"
        rows = tuple(f"sequence {sequence} of {length} tokens" for sequence, length in enumerate(lengths))
        yield lengths, hq, hkv, d, window, page, label, rows


def _decode_attention(new: _Inputs) -> Iterator[Hard]:
    for at, (lengths, hq, hkv, d, window, page, label, rows) in enumerate(_decoding()):
        n = len(lengths)
        q = new.random(n, 2 * hq, d)[:, ::2] if at % 2 else new.random(n, hq, d)
        case = _case("decode_attention", q, new.ints(lengths), new.kv(lengths, hkv, d, page), window)
        yield Hard(label, case, rows)


def _rope_decode_attention(new: _Inputs) -> Iterator[Hard]:
    """The newest token's place in the pages holds NaN: nobody may read it before it is written."""
    for lengths, hq, hkv, d, window, page, label, rows in _decoding():
        kv = new.kv(lengths, hkv, d, page)
        for sequence, length in enumerate(lengths):
            if length:
                number, offset = kv.place(sequence, length - 1)
                kv.k[number, :, offset], kv.v[number, :, offset] = torch.nan, torch.nan
        angles = reference.rope_table(max(lengths) + 10, d, THETA, new.device)
        heads = new.heads(len(lengths), hq, hkv, d)
        case = _case("rope_decode_attention", *heads, *angles, new.ints(lengths), kv, window)
        yield Hard(label, case, rows)


def _weights(new: _Inputs, kind: str, outputs: int, inputs: int) -> Weight:
    """The first outputs of a matrix that has more of them; what is behind them is NaN where it can be."""
    matrix = new.random(outputs + 3, inputs, dtype=torch.float32) * inputs**-0.5
    if kind == "dense":
        return Dense(_between_nan(matrix.to(new.dtype))[:outputs])
    if kind == "int8":
        values, scale = reference.quantize_int8(matrix)
        scale[outputs:] = torch.nan
        return Int8(values[:outputs], scale[:outputs])
    packed = quantize_int4(matrix, int(kind.removeprefix("int4 g")))
    packed.affine[:, outputs:] = torch.nan
    return Int4(packed.packed[:outputs], packed.affine[:, :outputs], packed.group)


def _product(x: Tensor, weight: Weight, **keywords: Any) -> Case:
    """Held against weights that are dequantised, on every device: on the CPU int8's reference rounds x as well."""
    case = _case("linear", x, weight, **keywords)
    return replace(case, reference=_dequantised) if isinstance(weight, Int8) else case


def _dequantised(x: Tensor, weight: Weight, **keywords: Any) -> Tensor:
    return reference.linear(x, Dense(dequantize(weight, x.dtype)), **keywords)


LINEAR = (
    ("dense", ((1, 33, 65), (8, 32, 64), (3, 31, 63), (2, 130, 1025), (17, 65, 128))),
    ("int8", ((1, 33, 96), (8, 32, 64), (17, 65, 160))),
    ("int4 g32", ((1, 33, 64), (9, 31, 192))),
    ("int4 g64", ((2, 34, 128),)),
    ("int4 g128", ((1, 33, 256), (17, 65, 512))),
)
"""By kind of weights: rows, outputs, inputs."""


def _linear(new: _Inputs) -> Iterator[Hard]:
    for kind, shapes in LINEAR:
        for (how, lay), (n, outputs, inputs) in zip(_strides(), shapes, strict=False):
            x, label = lay(new.random(n, inputs)), f"{kind}, {n} rows of {inputs} to {outputs}{how}"
            yield Hard(label, _product(x, _weights(new, kind, outputs, inputs)))
        inputs = {"dense": 97, "int8": 96, "int4 g128": 256}.get(kind, 128)
        yield _fused(new, kind, 10, 71, inputs, gated=False)
        yield _fused(new, kind, 3, 17, inputs, gated=True)


def _fused(new: _Inputs, kind: str, n: int, hidden: int, inputs: int, gated: bool) -> Hard:
    """With everything before and after the product."""
    ends = (hidden, 2 * hidden) if gated else (hidden // 2, hidden - 1, hidden)
    slots = new.ints([(-1, 3, 0)[row % 3] for row in range(n)])
    shrunk = new.random(n, len(ends) * max(RANKS), dtype=torch.float32) * 0.3
    shrunk[slots < 0] = torch.nan
    keywords = {
        "norm": Norm(new.gain(inputs), 1e-5),
        "residual": _between_nan(new.random(n, hidden)),
        "gated": gated,
        "lora": LoraRows(_adapters(new, 1, ends), slots, shrunk),
    }
    weight = _weights(new, kind, hidden * (1 + gated), inputs)
    label = f"{kind}, {n} rows of {inputs} to {hidden}, norm, adapters{', gated' if gated else ''}, residual"
    case = _product(_between_nan(new.random(n, inputs)), weight, **keywords)
    return Hard(label, case, _slots(slots))


def _adapters(new: _Inputs, inputs: int, ends: tuple[int, ...], ranks: Sequence[int] = RANKS) -> Lora:
    """Slots of those ranks, padded with zeros to the largest; one of rank 0 is NaN."""
    a = new.random(len(ranks), len(ends), max(ranks), inputs) * inputs**-0.5
    b = new.random(len(ranks), ends[-1], max(ranks)) * max(ranks) ** -0.5
    for slot, own in enumerate(ranks):
        a[slot, :, own:], b[slot, :, own:] = 0, 0
        if own == 0:
            a[slot], b[slot] = torch.nan, torch.nan
    return Lora(a.flatten(1, 2), b, ends)


def _slots(slots: Tensor) -> tuple[str, ...]:
    return tuple("no adapter" if slot < 0 else f"slot {slot}" for slot in slots.tolist())


def _lora_shrink(new: _Inputs) -> Iterator[Hard]:
    few, many = ((16, 1), (1, 1), (15, 3), (64, 2)), ((17, 1), (33, 2), (513, 1))
    shapes = [(*shape, SLOTS) for shape in few] + [(*shape, MANY) for shape in many] + [(24, 1, PROMPT)]
    for (how, lay), (inputs, parts, values), normed in zip(
        _strides(), shapes, itertools.cycle((False, True, True)), strict=False
    ):
        lora, slots = _adapters(new, inputs, tuple(range(10, 10 * parts + 1, 10))), new.ints(values)
        scale = torch.where(slots < 0, torch.nan, 0.5 + torch.arange(len(slots), device=new.device) / 8)
        norm = Norm(new.gain(inputs), 1e-5) if normed else None
        case = _case("lora_shrink", lay(new.random(len(slots), inputs)), lora, slots, scale, norm=norm)
        label = f"{len(slots)} rows of {inputs}, {parts} parts{', norm' if normed else ''}{how}"
        yield Hard(label, case, _slots(slots))


def _lora_expand(new: _Inputs) -> Iterator[Hard]:
    shapes = (
        ((31,), SLOTS),
        ((32, 33), SLOTS),
        ((33, 65, 96), MANY),
        ((8, 9, 50), MANY),
        ((64,), SLOTS),
        ((24,), PROMPT),
    )
    for (how, lay, lay_y), (ends, values), ranks in zip(
        _pairs("shrunk", "y"), shapes, itertools.cycle((RANKS, (65, 5, 0, 64), (1, 1, 0, 1))), strict=False
    ):
        lora, slots = _adapters(new, 4, ends, ranks), new.ints(values)
        shrunk = new.random(len(slots), len(ends) * max(ranks), dtype=torch.float32)
        shrunk[slots < 0] = torch.nan
        case = _case("lora_expand", lay(shrunk), lora, slots, lay_y(new.random(len(slots), ends[-1])))
        yield Hard(f"{len(slots)} rows to {ends[-1]}, rank {max(ranks)}{how}", case, _slots(slots))


def _sample(new: _Inputs) -> Iterator[Hard]:
    from mistral_nb_kernels.bench.sampling_cases import mixed_case

    source = random.Random(new.seed)
    for n, vocab in ((9, 64), (4, 1), (12, 7), (9, 63), (9, 65), (15, 200), (2, 32000)):
        case = mixed_case(n, vocab, source, dtype=new.dtype, device=new.device)
        yield Hard(f"{n} rows of {vocab} scores, each with its own parameters, penalties", case)
        if vocab in (65, 200):
            bare = replace(case, inputs=(*case.inputs[:2], None))
            yield Hard(f"{n} rows of {vocab} scores, each with its own parameters", bare)


_MAKERS: dict[str, Callable[[_Inputs], Iterator[Hard]]] = {
    "rope_write": _rope_write,
    "prefill_attention": _prefill_attention,
    "decode_attention": _decode_attention,
    "rope_decode_attention": _rope_decode_attention,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": _swiglu,
    "linear": _linear,
    "lora_shrink": _lora_shrink,
    "lora_expand": _lora_expand,
    "sample": _sample,
}
