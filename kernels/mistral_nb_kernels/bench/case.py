"""What is measured: an op on one set of inputs, and the configs of an op that are worth timing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from mistral_nb_kernels.configs import Config

__all__ = ["Case", "Device", "Maker", "Tunable", "size"]

Device = torch.device | str
TOLERANCE = 2e-2
"""Of a row of a result, its distance from the reference's row over that one's norm: a gate, not the proof."""


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one set of random inputs: its reference, which takes them, its FLOPs, and the least bytes it moves."""

    op: str
    inputs: tuple[Any, ...]
    reference: Callable[..., Any]
    flops: int
    bytes: int
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def call(self, function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: function(*self.inputs, **self.keywords)

    def wrong(self, function: Callable[..., Any]) -> str:
        """What `function` does otherwise than the reference, in its result or in its inputs; empty if nothing."""
        got, expected = self._ran(function), self._ran(self.reference)
        for index, (ours, right) in enumerate(zip(_tensors(got), _tensors(expected), strict=True)):
            if torch.equal(ours, right):
                continue
            error = (ours.float() - right.float()).norm(dim=-1)
            off = ~(error <= TOLERANCE * right.float().norm(dim=-1))
            if off.any() or not right.is_floating_point():
                return f"{self.op}: tensor {index} is off in {int(off.sum())} of {off.numel()} rows"
        return ""

    def _ran(self, function: Callable[..., Any]) -> tuple[Any, ...]:
        """Its result, and its inputs as it leaves them."""
        inputs, keywords = copy.deepcopy((self.inputs, self.keywords))
        return function(*inputs, **keywords), inputs, keywords


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple):
        for each in x:
            yield from _tensors(each)
    elif isinstance(x, Mapping):
        yield from _tensors(tuple(x.values()))
    elif is_dataclass(x):
        yield from _tensors(tuple(getattr(x, field.name) for field in fields(x)))


def size(*x: Any) -> int:
    """Bytes of the tensors in it."""
    return sum(tensor.nbytes for tensor in _tensors(x))


Maker = Callable[[int, torch.dtype, Device], Case]
"""A case of one shape, from the width of a row of the table, the type and the device."""


@dataclass(frozen=True, slots=True)
class Tunable:
    """An op of the table of configs, and where its rows are looked for.

    `kernel` binds what is timed for the op to a config on an architecture. The configs `first` are timed at the first
    of `shapes`; of each of the best the `variants`, at every shape: numbers whose best value depends on the shape.
    """

    op: str
    widths: tuple[int, ...]
    kernel: Callable[[Config, int], Callable[..., Any]]
    shapes: tuple[Maker, ...]
    first: tuple[Config, ...]
    variants: Callable[[Config], Iterable[Config]] = lambda config: (config,)
    bits: int = 16
