"""Linear layers of few rows and of many, under Triton's interpreter."""

from __future__ import annotations

import importlib
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import choose, reference
from mistral_nb_kernels.configs import Config, config_for
from mistral_nb_kernels.packed import (
    Dense,
    Int4,
    Int8,
    Lora,
    LoraRows,
    Norm,
    Weight,
    dequantize,
    quantize_int4,
)

kernels = pytest.importorskip("mistral_nb_kernels.linear")
dequantizing = pytest.importorskip("mistral_nb_kernels.dequantize")

CONFIG = Config(warps=2, stages=2, block_n=32, block_k=32)
"""64 features, or 128 of int4, at a time."""
FORMS = [(torch.float16, True), (torch.float32, False), (torch.float16, False)]
KINDS = ["dense", "int8", 32, 64, 128]

Exact = Callable[[Tensor, Tensor, Tensor], None]


def padded(x: Tensor) -> Tensor:
    """x as a view, with what would break a sum all around it."""
    spoilt = torch.nan if x.is_floating_point() else 127 if x.dtype == torch.int8 else 255
    whole = torch.full([size + 3 for size in x.shape], spoilt, dtype=x.dtype)
    view = whole[tuple(slice(1, size + 1) for size in x.shape)]
    return view.copy_(x)


def weights(kind: str | int, outputs: int, inputs: int, dtype: torch.dtype) -> Weight:
    """The first outputs of a matrix that has more of them."""
    matrix = torch.randn(outputs + 3, inputs)
    if kind == "dense":
        return Dense(padded(matrix.to(dtype))[:outputs])
    if kind == "int8":
        values, scale = reference.quantize_int8(matrix)
        scale[outputs:] = torch.nan
        return Int8(padded(values)[:outputs], scale[:outputs])
    packed = quantize_int4(matrix, int(kind))
    packed.affine[:, outputs:] = torch.nan
    return Int4(padded(packed.packed)[:outputs], packed.affine[:, :outputs], packed.group)


@dataclass
class Layer:
    """One call, and the same in fp32 and fp64."""

    x: Tensor
    weight: Weight
    norm: Norm | None = None
    residual: Tensor | None = None
    gated: bool = False
    lora: LoraRows | None = None

    def __call__(self, op: Callable[..., Tensor], **keywords: Any) -> Tensor:
        fused = {"norm": self.norm, "residual": self.residual, "gated": self.gated, "lora": self.lora}
        return op(self.x, self.weight, **fused, **keywords)

    def rows(self, rows: slice) -> Layer:
        lora = self.lora and replace(self.lora, slots=self.lora.slots[rows], shrunk=self.lora.shrunk[rows])
        residual = None if self.residual is None else self.residual[rows]
        return replace(self, x=self.x[rows], residual=residual, lora=lora)

    def at(self, dtype: torch.dtype) -> Layer:
        def cast(x: Tensor) -> Tensor:
            return x.to(dtype)

        lora = self.lora
        if lora is not None:
            adapters = replace(lora.lora, a=cast(lora.lora.a), b=cast(lora.lora.b))
            lora = replace(lora, lora=adapters, shrunk=cast(lora.shrunk))
        return Layer(
            cast(self.x),
            Dense(dequantize(self.weight, dtype)),
            self.norm and replace(self.norm, weight=cast(self.norm.weight)),
            None if self.residual is None else cast(self.residual),
            self.gated,
            lora,
        )

    def check(self, exact: Exact, got: Tensor) -> None:
        """Against sums in fp32 that are rounded once: no type's own roundings widen what is allowed."""
        exact(got, self.at(torch.float32)(reference.linear).to(self.x.dtype), self.at(torch.float64)(reference.linear))


def adapters(n: int, ends: tuple[int, ...], rank: int, dtype: torch.dtype) -> LoraRows:
    """Three slots, of which the rows use none, the first and the last; the second is NaN."""
    b = padded(torch.randn(3, ends[-1], rank).to(dtype))
    b[1] = torch.nan
    slots = torch.tensor([(-1, 2, 0)[i % 3] for i in range(n)], dtype=torch.int32)
    shrunk = padded(torch.randn(n, len(ends) * rank))
    shrunk[slots < 0] = torch.nan
    return LoraRows(Lora(torch.zeros(3, len(ends) * rank, 1, dtype=dtype), b, ends), slots, shrunk)


def full(kind: str | int, n: int, hidden: int, inputs: int, dtype: torch.dtype, gated: bool) -> Layer:
    """With everything before and after the product."""
    norm = Norm(torch.rand(inputs).to(dtype) + 0.5, 1e-5)
    ends = (hidden, 2 * hidden) if gated else (hidden // 2, hidden - 1, hidden)
    lora = adapters(n, ends, 17, dtype)
    outputs = hidden * (1 + gated)
    x, residual = (padded(torch.randn(n, size).to(dtype)) for size in (inputs, hidden))
    return Layer(x, weights(kind, outputs, inputs, dtype), norm, residual, gated, lora)


@pytest.mark.parametrize(("dtype", "dot"), FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_at_any_size(exact: Exact, kind: str | int, dtype: torch.dtype, dot: bool) -> None:
    """A lone output in fp16 only: one sum in fp32 is as exact as its luck."""
    unit = 2 * kind if isinstance(kind, int) else 1
    lone = 1 if dtype == torch.float16 else 34
    for n, outputs, inputs in ((1, 33, 65), (8, 32, 64), (3, 31, 63), (2, lone, 129)):
        inputs = -(-inputs // unit) * unit
        rows = n if dot else min(n, 2)
        layer = Layer(padded(torch.randn(rows, inputs).to(dtype)), weights(kind, outputs, inputs, dtype))
        layer.check(exact, layer(kernels.linear, config=CONFIG, dot=dot))


@pytest.mark.parametrize(("dtype", "dot"), FORMS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["dense", "int8", 32])
def test_what_is_fused_is_what_stands_alone(
    exact: Exact, kind: str | int, gated: bool, dtype: torch.dtype, dot: bool
) -> None:
    """Also: rows without an adapter, and slots without a row, read nothing of theirs; a part takes several tiles."""
    layer = full(kind, 3, 17 if gated else 71, 128, dtype, gated)
    layer.check(exact, layer(kernels.linear, config=CONFIG, dot=dot))


@pytest.mark.parametrize(("dtype", "dot"), FORMS)
@pytest.mark.parametrize("kind", ["dense", 32])
def test_a_row_gets_the_same_in_any_batch(kind: str | int, dtype: torch.dtype, dot: bool) -> None:
    """The sums make a row a program: three of them tell."""
    n = 8 if dot else 3
    layer = full(kind, n, 16, 128, dtype, gated=True)
    together = layer(kernels.linear, config=CONFIG, dot=dot)
    for rows in (slice(0, 1), slice(n - 1, n), slice(1, n)):
        assert torch.equal(layer.rows(rows)(kernels.linear, config=CONFIG, dot=dot), together[rows])


@pytest.mark.parametrize(("x", "gain"), [(3e4, 4), (3e-3, 3e-3)])
@pytest.mark.parametrize("dot", [True, False])
def test_a_norm_s_input_may_have_any_size_that_its_type_holds(exact: Exact, x: float, gain: float, dot: bool) -> None:
    """fp16 ends at 65504 and loses bits below 6e-5: what comes of x times the gain is neither, only of the normed x."""
    one = (torch.rand(1, 128) + 1) * x / 2
    norm = Norm(torch.full((128,), gain).half(), 1e-5)
    layer = Layer(one.half(), weights("dense", 33, 128, torch.float16), norm)
    layer.check(exact, layer(kernels.linear, config=CONFIG, dot=dot))


@pytest.mark.parametrize(("kind", "few"), [("dense", 8), ("int8", 24), (32, 32)])
def test_rows_that_the_kernel_takes_get_the_same_as_alone(
    monkeypatch: pytest.MonkeyPatch, kind: str | int, few: int
) -> None:
    """To the most of them; one row more goes to cuBLAS, as it does where a row is a program."""
    layer = full(kind, few + 1, 9, 64, torch.float16, gated=False)
    most = layer.rows(slice(0, few))
    together = most(kernels.linear, config=CONFIG)
    for row in (0, 7, few - 1):
        one = slice(row, row + 1)
        assert torch.equal(layer.rows(one)(kernels.linear, config=CONFIG), together[one])
    many: list[int] = []
    monkeypatch.setattr(kernels, "_many", lambda x, *others: many.append(len(x)))
    layer(kernels.linear, config=CONFIG)
    layer.rows(slice(0, 9))(kernels.linear, config=CONFIG, dot=False)
    assert many == [few + 1, 9]


def compiled() -> str:
    """PTX of int8 with a residual; not under the interpreter, which rounds every product."""
    machine_code = importlib.import_module("mistral_nb_kernels.machine_code")
    weight = Int8(torch.zeros(64, 512, dtype=torch.int8), torch.zeros(64))
    x, residual = torch.zeros(8, 512).bfloat16(), torch.zeros(8, 64).bfloat16()
    with machine_code.compiling(90) as code:
        kernels.linear(x, weight, residual=residual, config=Config(4, 2, block_n=32, block_k=64))
    text: str = code[0].asm["ptx"]
    return text


@pytest.mark.usefixtures("compiling")
def test_the_scaled_sum_is_rounded_whatever_is_added_to_it() -> None:
    """Else a row gets other bits where its batch has adapters: they come between the scale and the residual."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        code = pool.submit(compiled).result()
    fused = re.findall(r"fma\.rn\.f32[^,]*,[^,]*,[^,]*,\s*(\S+);", code)
    assert fused
    assert set(fused) == {"0f00000000"}


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_what_runs_around_cublas_has_the_configs_of_the_table(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(kernels, "_many", lambda *given: given[-1])
    ops = choose(torch.device("cuda"), 64, torch.float16)
    around = ops.linear(torch.zeros(9, 64).half(), Dense(torch.zeros(3, 64).half()))
    for op in ("rms_norm", "swiglu", "lora_expand"):
        row = config_for(op, 10 * capability[0] + capability[1], 0, 16)
        assert row is not None
        assert around[op] == row.config


def test_what_does_not_fit_is_refused() -> None:
    """A kernel would read past it, or another's."""
    layer = full("dense", 2, 16, 64, torch.float32, gated=True)
    assert layer.norm is not None
    assert layer.lora is not None
    gain, lora = layer.norm.weight, layer.lora
    wrong = [
        {"norm": Norm(gain[:32], 1e-5)},
        {"norm": Norm(gain.repeat(2)[::2], 1e-5)},
        {"residual": torch.zeros(2, 32)},
        {"lora": replace(lora, lora=replace(lora.lora, ends=(8, 32)))},
        {"lora": replace(lora, lora=replace(lora.lora, b=lora.lora.b[:, :16]))},
        {"lora": replace(lora, slots=lora.slots[:1])},
        {"lora": replace(lora, shrunk=lora.shrunk[:, :17])},
    ]
    for change in wrong:
        with pytest.raises(AssertionError):
            replace(layer, **change)(kernels.linear, config=CONFIG)
    lora = adapters(2, (8, 16, 32), 17, torch.float32)
    lora = replace(lora, lora=replace(lora.lora, ends=(8, 16, 31)))
    with pytest.raises(AssertionError):
        replace(layer, gated=False, residual=None, lora=lora)(kernels.linear, config=CONFIG)


@pytest.mark.parametrize("kind", ["dense", "int8"])
@pytest.mark.parametrize("dot", [True, False])
def test_a_row_without_an_adapter_is_the_bare_layer(kind: str, dot: bool) -> None:
    layer = full(kind, 2, 17, 64, torch.float16, gated=False)
    assert layer.lora is not None
    layer.lora.slots.fill_(-1)
    bare = replace(layer, lora=None)(kernels.linear, config=CONFIG, dot=dot)
    assert torch.equal(layer(kernels.linear, config=CONFIG, dot=dot), bare)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["dense", "int8", 64])
def test_many_rows_go_to_cublas_by_tiles(
    monkeypatch: pytest.MonkeyPatch, exact: Exact, kind: str | int, gated: bool
) -> None:
    """Three outputs' weights at a time; the ops around the product round as torch's do."""
    monkeypatch.setattr(kernels, "BUFFER", 3 * 128 + 5)
    layer = full(kind, 9, 17, 128, torch.float32, gated)
    layer.check(exact, layer(kernels.linear, config=CONFIG))
    assert layer.residual is not None
    assert not layer.residual.isnan().any()


@pytest.mark.parametrize("kind", ["int8", 32, 128])
def test_a_tile_of_weights_is_dequantised_to_the_bit(kind: str | int) -> None:
    weight = weights(kind, 6, 512, torch.float32)
    out = padded(torch.zeros(3, 512))
    dequantizing.dequantize_rows(weight, 2, out, config=Config(4, block_n=128))
    assert torch.equal(out, dequantize(weight, torch.float32)[2:5])


def test_any_number_of_outputs_is_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid has 2^31 - 1 programs on its first axis, 65535 on the second."""
    kernel = MagicMock()
    monkeypatch.setattr(dequantizing, "dequantize_kernel", kernel)
    weight = Int8(torch.zeros(65536, 32, dtype=torch.int8), torch.zeros(65536))
    dequantizing.dequantize_rows(weight, 0, torch.zeros(65536, 32), config=Config(4, block_n=16))
    kernel.__getitem__.assert_called_once_with((65536, 2))


@pytest.mark.parametrize("dot", [True, False])
@pytest.mark.parametrize("gated", [False, True])
def test_rows_past_two_to_the_31_elements(exact: Exact, gated: bool, dot: bool) -> None:
    """Of weights, inputs, residual and b alike; only what is touched of the storage takes memory."""
    far = 2**31
    storage = torch.empty_strided((far + 2**12,), (1,), dtype=torch.float16)

    def distant(rows: int, columns: int, at: int) -> Tensor:
        view = storage.as_strided((rows, columns), (far // (rows - 1), 1), at)
        return view.copy_(torch.randn(rows, columns))

    outputs = 4 if gated else 3
    b = distant(outputs, 2, 2048)[None].expand(2, -1, -1)
    lora = Lora(torch.zeros(2, 4, 1), b, (2, outputs))
    layer = Layer(
        distant(3, 64, 0),
        Dense(distant(outputs, 64, 512)),
        residual=distant(3, 2 if gated else 3, 1024),
        gated=gated,
        lora=LoraRows(lora, torch.tensor([1, -1, 0], dtype=torch.int32), torch.randn(3, 4)),
    )
    layer.check(exact, layer(kernels.linear, config=CONFIG, dot=dot))


def test_no_rows_are_no_launch() -> None:
    weight = weights(32, 6, 64, torch.float32)
    assert kernels.linear(torch.randn(0, 64), weight, gated=True, config=CONFIG).shape == (0, 3)
