"""What is measured: an op on one set of inputs, and the configs of an op that are worth timing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mistral_nb_kernels.configs import Config

__all__ = ["Case", "Device", "Maker", "Tunable", "size", "tensors"]

Device = torch.device | str
TOLERANCE = 2e-2
"""Of a row of a result, its distance from the reference's row over that one's norm: a gate, not the proof."""
USUAL = 3
"""Times the root mean square of its row that a number counts as, beside its own size: sums are off by that of their
row. In bf16 the reference is off by up to 0.4 of what that allows (int4 weights, gated), elsewhere by less. A row's
largest would allow more: a tenth of SwiGLU's numbers and more are within 0.02 of it.
"""


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

    def copied(self) -> Case:
        """The same with inputs of its own."""
        inputs, keywords = copy.deepcopy((self.inputs, self.keywords))
        return replace(self, inputs=inputs, keywords=keywords)

    def wrong(self, function: Callable[..., Any]) -> str:
        """What `function` does otherwise than the reference, in its result or in its inputs; empty if nothing."""
        return self.wrong_as(lambda case: case.call(function))

    def wrong_as(
        self, bind: Callable[[Case], Callable[[], Any]], result: Callable[[Case, Any], Any] | None = None
    ) -> str:
        """The same of what `bind` gives for a copy of the case; `result` makes the op's result of what that gives."""
        mine, its = self.copied(), self.copied()
        got = bind(mine)()
        if result is not None:
            got = result(mine, got)
        expected = its.call(its.reference)()
        if type(got) is not type(expected):
            return f"{self.op}: the result is a {type(got).__name__}, not a {type(expected).__name__}"
        strange = next((x for x in tensors(got) if type(x) is not Tensor), None)
        if strange is not None:
            return f"{self.op}: a result is a {type(strange).__name__}, not a plain tensor"
        many, right = (len(list(tensors(out))) for out in (got, expected))
        if many != right:
            return f"{self.op}: {many} tensors came out, not {right}"
        after = (tensors((out, case.inputs, case.keywords)) for out, case in ((got, mine), (expected, its)))
        offs = (_off(*pair) for pair in zip(*after, strict=True))
        return next((f"{self.op}: tensor {index} {off}" for index, off in enumerate(offs) if off), "")


def _off(got: Tensor, right: Tensor) -> str:
    """What is wrong with a tensor beside the right one."""
    if got.dtype != right.dtype:
        found, expected = (str(x.dtype).removeprefix("torch.") for x in (got, right))
        return f"has the dtype {found}, not {expected}"
    if got.shape != right.shape:
        return f"has the shape {list(got.shape)}, not {list(right.shape)}"
    if torch.equal(got, right):
        return ""
    off = _rows_off(got, right) if right.is_floating_point() else (got != right).reshape(-1, *got.shape[-1:]).any(-1)
    return f"is off in {int(off.sum())} of {off.numel()} rows" if off.any() else ""


def _rows_off(got: Tensor, right: Tensor) -> Tensor:
    """Which rows are off, as a whole or in one of their numbers."""
    error, true = got.float() - right.float(), right.float()
    whole: Tensor = error.norm(dim=-1) <= TOLERANCE * true.norm(dim=-1)
    return ~(whole & (error.abs() <= allowed(true)).all(-1))


def allowed(right: Tensor) -> Tensor:
    """What each number of a result may be off by, of the reference's."""
    usual = right.square().mean(-1, keepdim=True).sqrt()
    return TOLERANCE * (right.abs() + USUAL * usual)


def tensors(x: Any) -> Iterator[Tensor]:
    """Those in tuples, mappings and dataclasses, in their order."""
    return (tensor for _, tensor in named_tensors("", x))


def named_tensors(name: str, x: Any) -> Iterator[tuple[str, Tensor]]:
    """The same with where each is in what is called `name`: kv.k, result[1], or its key in a mapping."""
    if isinstance(x, Tensor):
        yield name, x
    elif isinstance(x, tuple):
        for index, each in enumerate(x):
            yield from named_tensors(f"{name}[{index}]", each)
    elif isinstance(x, Mapping):
        for key, each in x.items():
            yield from named_tensors(str(key), each)
    elif is_dataclass(x):
        for field in fields(x):
            yield from named_tensors(f"{name}.{field.name}", getattr(x, field.name))


def size(*x: Any) -> int:
    """Bytes of the tensors in it."""
    return sum(tensor.nbytes for tensor in tensors(x))


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
