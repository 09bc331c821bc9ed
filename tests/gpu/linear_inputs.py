"""What the tests of linear layers on a GPU put in, between NaN, with adapters; what a graph gives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mistral_nb_kernels.bench import linear_cases
from mistral_nb_kernels.packed import Dense, Int4, Int8, Lora, LoraRows, Norm, Weight, dequantize

__all__ = [
    "KINDS",
    "SANITIZED",
    "Layer",
    "adapters",
    "between_nan",
    "captured",
    "doubled",
    "fused_layer",
    "on_the_cpu",
    "scales",
    "slots",
    "weights",
]

DEVICE = torch.device("cuda")
KINDS = {**linear_cases.KINDS, "int4 g64": functools.partial(linear_cases.int4, 64)}
SANITIZED = """
import torch
from mistral_nb_kernels import choose
from mistral_nb_kernels.bench import linear_cases as c, sampling_cases
device = torch.device("cuda")
dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
ops = choose(device, 128, dtype)
c.SHAPES = {
    "gate, up": c.Shape(512, (35, 70), norm=True, gated=True),
    "down": c.Shape(768, (99,), residual=True),
    "head": c.Shape(576, (321,), norm=True),
}
how = {"dtype": dtype, "device": device}
cases = [c.linear_case("head", 2, **how), c.norm_case(3, **how), c.swiglu_case(3, **how)]
for layer, kind in [("down", "dense"), *(("gate, up", kind) for kind in c.KINDS)]:
    cases += [c.linear_case(layer, rows, kind, slots=2, **how) for rows in (3, 9)]
for rows in (3, 70):
    cases += [make("gate, up", rows, 2, **how) for make in (c.shrink_case, c.expand_case)]
cases += [sampling_cases.sample_case(asked, 2, 1003, **how) for asked in sampling_cases.ASKED]
for case in cases:
    case.call(getattr(ops, case.op))()
x, _, weight, eps = cases[1].inputs
ops.rms_norm(x, weight, eps)
torch.cuda.synchronize()
"""


def between_nan(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, 16-byte aligned, with NaN on both sides."""
    wide = torch.full((*shape[:-1], shape[-1] + 24), torch.nan, dtype=dtype, device=DEVICE)
    wide[..., 8:-16] = torch.randn(shape, device=DEVICE)
    return wide[..., 8:-16]


def doubled(x: Any) -> Any:
    """The same in fp64, weights dequantised."""
    if isinstance(x, torch.Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, Dense | Int8 | Int4):
        return Dense(dequantize(x, torch.float64))
    if dataclasses.is_dataclass(x):
        return type(x)(**{field.name: doubled(getattr(x, field.name)) for field in dataclasses.fields(x)})
    return x


def on_the_cpu(x: Any) -> Any:
    """A copy of a dataclass of tensors."""
    return type(x)(**{field.name: getattr(x, field.name).to("cpu", copy=True) for field in dataclasses.fields(x)})


def weights(kind: str, outputs: int, inputs: int, dtype: torch.dtype) -> Weight:
    """Of at least so many inputs."""
    unit = 2 * int(kind.partition(" g")[2]) if kind.startswith("int4") else 1
    return KINDS[kind](outputs, -(-inputs // unit) * unit, dtype, DEVICE)


def adapters(inputs: int, ends: Sequence[int], ranks: Sequence[int], dtype: torch.dtype) -> Lora:
    """Slots of those ranks, padded with zeros to the largest; one of rank 0 is NaN."""
    rank, parts = max(ranks), len(ends)
    a = torch.randn(len(ranks), parts, rank, inputs, device=DEVICE) * inputs**-0.5
    b = between_nan(len(ranks), ends[-1], rank, dtype=dtype)
    for slot, own in enumerate(ranks):
        a[slot, :, own:], b[slot, :, own:] = 0, 0
        if own == 0:
            a[slot], b[slot] = torch.nan, torch.nan
    return Lora(a.flatten(1, 2).to(dtype), b, tuple(ends))


def scales(which: torch.Tensor) -> torch.Tensor:
    """Another for every row; NaN for a row without an adapter."""
    return torch.where(which < 0, torch.nan, 0.5 + torch.arange(len(which), device=DEVICE) / 8)


def slots(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer's call."""

    x: torch.Tensor
    weight: Weight
    norm: Norm
    residual: torch.Tensor
    gated: bool
    lora: LoraRows

    def __call__(self, linear: Callable[..., torch.Tensor]) -> torch.Tensor:
        how = {"norm": self.norm, "residual": self.residual, "gated": self.gated, "lora": self.lora}
        return linear(self.x, self.weight, **how)

    def of(self, rows: Any) -> Layer:
        lora = dataclasses.replace(self.lora, slots=self.lora.slots[rows], shrunk=self.lora.shrunk[rows])
        return dataclasses.replace(self, x=self.x[rows], residual=self.residual[rows], lora=lora)


def fused_layer(kind: str, n: int, hidden: int, inputs: int, dtype: torch.dtype, gated: bool) -> Layer:
    """With all that is fused; a slot that no row names and what rows without an adapter have is NaN."""
    weight = weights(kind, hidden * (1 + gated), inputs, dtype)
    x = between_nan(n, weight.shape[1], dtype=dtype)
    ends = (hidden, 2 * hidden) if gated else (hidden // 2, hidden - 1, hidden)
    which = slots(*((-1, 2, 0)[row % 3] for row in range(n)))
    shrunk = between_nan(n, 17 * len(ends), dtype=torch.float32)
    shrunk[which < 0] = torch.nan
    lora = LoraRows(adapters(1, ends, (17, 0, 17), dtype), which, shrunk)
    norm = Norm((torch.rand(x.shape[1], device=DEVICE) + 0.5).to(dtype), 1e-5)
    return Layer(x, weight, norm, between_nan(n, hidden, dtype=dtype), gated, lora)


def captured(call: Callable[[], tuple[torch.Tensor, ...]]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """`call` in a CUDA graph: its results as a replay leaves them."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> tuple[torch.Tensor, ...]:
        for x in out:
            x.fill_(torch.nan if x.is_floating_point() else -7)
        graph.replay()
        return tuple(x.clone() for x in out)

    return replay
