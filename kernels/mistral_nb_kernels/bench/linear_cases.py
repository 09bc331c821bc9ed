"""The linear layers of Mistral-7B, one by one and a layer's in sequence, with adapters: cases and peers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.case import Case, Device, size
from mistral_nb_kernels.packed import Dense, Int4, Int8, Lora, LoraRows, Norm, Weight, unpack_int4

__all__ = [
    "KINDS",
    "LAYER",
    "SHAPES",
    "expand_case",
    "layer_case",
    "layer_peers",
    "linear_case",
    "linear_peers",
    "norm_case",
    "product",
    "rms_case",
    "run_layer",
    "shrink_case",
    "swiglu_case",
]

RANK = 16
EPS = 1e-5
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """One linear layer: weights [ends[-1], inputs], the cumulative outputs of its projections, and what is fused."""

    inputs: int
    ends: tuple[int, ...]
    norm: bool = False
    residual: bool = False
    gated: bool = False

    @property
    def outputs(self) -> int:
        """What comes out."""
        return self.ends[-1] // (1 + self.gated)


LAYER = {
    "qkv": Shape(4096, (4096, 5120, 6144), norm=True),
    "o": Shape(4096, (4096,), residual=True),
    "gate, up": Shape(4096, (14336, 28672), norm=True, gated=True),
    "down": Shape(14336, (4096,), residual=True),
}
SHAPES = {**LAYER, "head": Shape(4096, (32000,), norm=True)}


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer's weights, its norm and its adapters."""

    weight: Weight
    norm: Norm | None
    lora: Lora | None


def dense(outputs: int, inputs: int, dtype: torch.dtype, device: Device) -> Dense:
    return Dense(torch.randn(outputs, inputs, dtype=dtype, device=device) * inputs**-0.5)


def int8(outputs: int, inputs: int, dtype: torch.dtype, device: Device) -> Int8:
    values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device)
    return Int8(values, (torch.rand(outputs, device=device) + 0.5) * inputs**-0.5 / 64)


def int4(group: int, outputs: int, inputs: int, dtype: torch.dtype, device: Device) -> Int4:
    """Random codes, about as many weights above 0 as below it."""
    packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=device)
    scale = (torch.rand(inputs // group, outputs, device=device) + 0.5) * inputs**-0.5 / 4
    return Int4(packed, torch.stack((scale, -7.5 * scale), dim=-1).half(), group)


KINDS: dict[str, Callable[[int, int, torch.dtype, Device], Weight]] = {
    "dense": dense,
    "int8": int8,
    "int4 g128": functools.partial(int4, 128),
    "int4 g32": functools.partial(int4, 32),
}
"""Random weights [outputs, inputs]; outputs are about 1 for inputs of 1."""


def adapters(shape: Shape, slots: int, dtype: torch.dtype, device: Device) -> Lora:
    """Of rank `RANK` on every projection, an update a tenth of the outputs."""
    parts = len(shape.ends)
    a = torch.randn(slots, parts * RANK, shape.inputs, dtype=dtype, device=device) * shape.inputs**-0.5
    b = torch.randn(slots, shape.ends[-1], RANK, dtype=dtype, device=device) * RANK**-0.5
    return Lora(a, b, shape.ends)


def slots_of(rows: int, slots: int, device: Device) -> Tensor:
    return torch.arange(rows, dtype=torch.int32, device=device) % slots


def scales_of(rows: int, device: Device) -> Tensor:
    return torch.full((rows,), 0.1, device=device)


def norm_of(shape: Shape, dtype: torch.dtype, device: Device) -> Norm | None:
    return Norm((torch.rand(shape.inputs, device=device) + 0.5).to(dtype), EPS) if shape.norm else None


def linear_case(
    layer: str,
    rows: int,
    kind: str = "dense",
    *,
    slots: int = 0,
    dtype: torch.dtype = BF16,
    device: Device = "cuda",
) -> Case:
    """One of `SHAPES` with what is fused; `slots` adapters, one after another among the rows."""
    shape = SHAPES[layer]
    x = torch.randn(rows, shape.inputs, dtype=dtype, device=device)
    weight = KINDS[kind](shape.ends[-1], shape.inputs, dtype, device)
    keywords: dict[str, Any] = {"norm": norm_of(shape, dtype, device), "gated": shape.gated}
    if shape.residual:
        keywords["residual"] = torch.randn(rows, shape.outputs, dtype=dtype, device=device)
    traffic = size(x, weight, keywords) + rows * shape.outputs * dtype.itemsize
    if slots:
        lora = adapters(shape, slots, dtype, device)
        shrunk = torch.randn(rows, lora.a.shape[1], device=device) * 0.1
        keywords["lora"] = LoraRows(lora, slots_of(rows, slots, device), shrunk)
        traffic += size(lora.b, shrunk)
    return Case("linear", (x, weight), reference.linear, 2 * rows * shape.inputs * shape.ends[-1], traffic, keywords)


def layer_case(
    rows: int, kind: str = "dense", *, slots: int = 0, dtype: torch.dtype = BF16, device: Device = "cuda"
) -> Case:
    """The four products of a layer one after another, as a step runs them; `run_layer` binds them to ops."""
    x = torch.randn(rows, LAYER["down"].outputs, dtype=dtype, device=device)
    attended = torch.randn(rows, LAYER["o"].inputs, dtype=dtype, device=device)
    projections = tuple(
        Projection(
            KINDS[kind](shape.ends[-1], shape.inputs, dtype, device),
            norm_of(shape, dtype, device),
            adapters(shape, slots, dtype, device) if slots else None,
        )
        for shape in LAYER.values()
    )
    flops = sum(2 * rows * shape.inputs * shape.ends[-1] for shape in LAYER.values())
    adapted = (slots_of(rows, slots, device), scales_of(rows, device)) if slots else None
    inputs = (x, attended, projections, adapted)
    # every product's input and output, and the two residuals
    rows_of = sum(shape.inputs + shape.outputs * (1 + shape.residual) for shape in LAYER.values())
    traffic = size(projections) + rows * rows_of * dtype.itemsize
    return Case("layer", inputs, functools.partial(run_layer, reference), flops, traffic)


def run_layer(
    ops: Any,
    x: Tensor,
    attended: Tensor,
    projections: tuple[Projection, ...],
    adapted: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """q, k, v of x [n, dim], and the layer's result with `attended` [n, dim] for what attention makes of them.

    `adapted` has the slots and the scales of the rows.
    """
    qkv, o, gate_up, down = projections

    def project(x: Tensor, by: Projection, **how: Any) -> Tensor:
        rows = None
        if by.lora is not None and adapted is not None:
            rows = LoraRows(by.lora, adapted[0], ops.lora_shrink(x, by.lora, *adapted, norm=by.norm))
        out: Tensor = ops.linear(x, by.weight, norm=by.norm, lora=rows, **how)
        return out

    first = project(x, qkv)
    x = project(attended, o, residual=x)
    return first, project(project(x, gate_up, gated=True), down, residual=x)


def linear_peers(case: Case) -> dict[str, Callable[[], Any]]:
    """The bare product of a case of `linear_case` by what torch has, without what is fused."""
    name, call = product(*case.inputs)
    return {name: call}


def layer_peers(case: Case) -> dict[str, Callable[[], Any]]:
    """The four bare products of a case of `layer_case`, and for dense weights the same as torch's own ops."""
    x, _, projections, _ = case.inputs
    rows = [torch.randn(len(x), by.weight.shape[1], dtype=x.dtype, device=x.device) for by in projections]
    products = [product(row, by.weight) for row, by in zip(rows, projections, strict=True)]
    peers: dict[str, Callable[[], Any]] = {products[0][0]: lambda: [call() for _, call in products]}
    if isinstance(projections[0].weight, Dense):
        peers["torch"] = case.call(_torch_layer)
    return peers


def product(x: Tensor, weight: Weight) -> tuple[str, Callable[[], Tensor]]:
    """x [n, in] times the weights by what torch has for them: its name, and a call -> [n, out]."""
    if isinstance(weight, Dense):
        return "cublas", lambda: F.linear(x, weight.weight)
    if isinstance(weight, Int8):
        scale = weight.scale.to(x.dtype)
        return "torch int8", lambda: torch._weight_int8pack_mm(x, weight.values, scale)
    assert isinstance(weight, Int4)

    @functools.cache
    def packed() -> tuple[Tensor, Tensor]:
        even, odd = unpack_int4(weight).reshape(len(weight.packed), -1, 2).unbind(-1)
        scale, minimum = weight.affine.float().unbind(-1)
        affine = torch.stack((scale, minimum + 8 * scale), dim=-1).to(x.dtype)
        return torch._convert_weight_to_int4pack(even << 4 | odd, 8), affine

    def call() -> Tensor:
        codes, affine = packed()
        return torch._weight_int4pack_mm(x, codes, weight.group, affine)

    return "torch int4", call


def _torch_layer(x: Tensor, attended: Tensor, projections: tuple[Projection, ...], _: None) -> tuple[Tensor, Tensor]:
    """`run_layer` without adapters, unfused: cuBLAS's products and torch's norms, SiLU and additions."""
    layers: list[Any] = [(by.weight, by.norm) for by in projections]
    (wqkv, first_norm), (wo, _), (w13, second_norm), (w2, _) = ((weight.weight, norm) for weight, norm in layers)
    qkv = F.linear(F.rms_norm(x, x.shape[1:], first_norm.weight, first_norm.eps), wqkv)
    x = x + F.linear(attended, wo)
    gate, up = F.linear(F.rms_norm(x, x.shape[1:], second_norm.weight, second_norm.eps), w13).chunk(2, dim=-1)
    return qkv, x + F.linear(F.silu(gate) * up, w2)


def shrink_case(layer: str, rows: int, slots: int, *, dtype: torch.dtype = BF16, device: Device = "cuda") -> Case:
    """The adapters' first half for one of `SHAPES`."""
    shape = SHAPES[layer]
    x, norm = torch.randn(rows, shape.inputs, dtype=dtype, device=device), norm_of(shape, dtype, device)
    lora = adapters(shape, slots, dtype, device)
    traffic = size(x, lora.a, norm) + 4 * rows * lora.a.shape[1]
    inputs = (x, lora, slots_of(rows, slots, device).sort().values, scales_of(rows, device))
    flops = 2 * rows * shape.inputs * lora.a.shape[1]
    return Case("lora_shrink", inputs, reference.lora_shrink, flops, traffic, {"norm": norm})


def expand_case(layer: str, rows: int, slots: int, *, dtype: torch.dtype = BF16, device: Device = "cuda") -> Case:
    """The second half, added to a product."""
    shape = SHAPES[layer]
    lora = adapters(shape, slots, dtype, device)
    shrunk = torch.randn(rows, lora.a.shape[1], device=device) * 0.1
    y = torch.randn(rows, shape.ends[-1], dtype=dtype, device=device)
    traffic = size(shrunk, lora.b) + 2 * size(y)
    inputs = (shrunk, lora, slots_of(rows, slots, device).sort().values, y)
    return Case("lora_expand", inputs, reference.lora_expand, 2 * rows * RANK * shape.ends[-1], traffic)


def norm_case(rows: int, *, dtype: torch.dtype = BF16, device: Device = "cuda") -> Case:
    """The norm of a sum, which is more than the norm."""
    dim = SHAPES["head"].inputs
    x, residual = torch.randn(2, rows, dim, dtype=dtype, device=device)
    weight = (torch.rand(dim, device=device) + 0.5).to(dtype)
    traffic = 2 * size(x, residual) + size(weight)
    return Case("add_rms_norm", (x, residual, weight, EPS), reference.add_rms_norm, 5 * x.numel(), traffic)


def rms_case(rows: int, *, dtype: torch.dtype = BF16, device: Device = "cuda") -> Case:
    """The norm alone."""
    dim = SHAPES["head"].inputs
    x = torch.randn(rows, dim, dtype=dtype, device=device)
    weight = (torch.rand(dim, device=device) + 0.5).to(dtype)
    return Case("rms_norm", (x, weight, EPS), reference.rms_norm, 4 * x.numel(), 2 * size(x) + size(weight))


def swiglu_case(rows: int, *, dtype: torch.dtype = BF16, device: Device = "cuda") -> Case:
    gate_up = torch.randn(rows, SHAPES["gate, up"].ends[-1], dtype=dtype, device=device)
    return Case("swiglu", (gate_up,), reference.swiglu, 3 * gate_up.numel(), size(gate_up) * 3 // 2)
