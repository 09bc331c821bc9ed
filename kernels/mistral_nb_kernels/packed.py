"""What linear layers are given: weights in three precisions, a norm before them, LoRA adapters beside them.

Int4 codes lie in blocks of two groups, 2 * group codes of one output in `group` bytes: byte j of a block has code j in
its low and code group + j in its high half. So the low halves of a load are codes of one group in their own order, as
the high ones are of the next, and a product over them is scaled once: the sum, not the weights. The scale and the
minimum of a group are neighbours, and groups come before outputs: what a tile of outputs needs for one group is
contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "GROUPS",
    "Dense",
    "Int4",
    "Int4Cpu",
    "Int8",
    "Int8Cpu",
    "Lora",
    "LoraRows",
    "Norm",
    "Weight",
    "dequantize",
    "pack_int4",
    "quantize_int4",
    "unpack_int4",
]

GROUPS = (32, 64, 128)
"""Codes that may share a scale."""


@dataclass(frozen=True, slots=True)
class Dense:
    """weight [out, in] in fp32, bf16 or fp16."""

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape


@dataclass(frozen=True, slots=True)
class Int8:
    """weight = values * scale: values [out, in] int8, scale [out] fp32."""

    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape


@dataclass(frozen=True, slots=True)
class Int8Cpu:
    """weight = values * scale, as oneDNN's product on the CPU takes it: made by `reference.blocked_int8`.

    blocked: the values, int8, transposed to [in, out] and in an order of oneDNN's own, which no other op of torch's
    reads; scale [out] fp32.
    """

    blocked: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.blocked.shape[1], self.blocked.shape[0]))

    @property
    def plain(self) -> Int8:
        """A copy of it in the order of rows."""
        return Int8(self.blocked.to_dense().t().contiguous(), self.scale)


@dataclass(frozen=True, slots=True)
class Int4:
    """weight = scale * code + minimum, a code of 0..15; made by `pack_int4`.

    packed [out, in / 2] uint8, affine [in / group, out, 2] fp16: a group's scale, then its minimum. `in` is a multiple
    of 2 * group. Blocks of Q4_1 are groups of 32, exactly.
    """

    packed: Tensor
    affine: Tensor
    group: int

    def __post_init__(self) -> None:
        assert self.group in GROUPS
        assert self.shape[1] % (2 * self.group) == 0
        assert self.affine.shape == (self.shape[1] // self.group, self.shape[0], 2)
        assert self.affine.dtype == torch.float16
        assert self.affine.stride()[1:] == (2, 1)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.packed.shape[0], 2 * self.packed.shape[1]))

    @property
    def scale(self) -> Tensor:
        """[out, in / group] fp16, a view."""
        return self.affine[..., 0].t()

    @property
    def minimum(self) -> Tensor:
        """[out, in / group] fp16, a view."""
        return self.affine[..., 1].t()


@dataclass(frozen=True, slots=True)
class Int4Cpu:
    """weight = scale * (code - 8) + middle, a code of 0..15, as torch's product on the CPU takes it.

    packed [out, in / 2] uint8: the codes as `torch._convert_weight_to_int4pack_for_cpu` orders them, which depends on
    the processor's instructions; outputs from a multiple of 64 up to the next are together and stand alone: there
    matrices are cut and joined. affine [in / group, out, 2] bf16: a group's scale, then its middle.
    """

    packed: Tensor
    affine: Tensor
    group: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.packed.shape[0], 2 * self.packed.shape[1]))


Weight: TypeAlias = Dense | Int8 | Int8Cpu | Int4 | Int4Cpu


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm of a layer's input: weight [in]."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Lora:
    """The adapters of all slots on one group of projections that share an input: an update of b a each.

    a [slots, parts * R, in] and b [slots, out, R] in the activations' type; `ends` are the parts' cumulative outputs,
    such as (4096, 5120, 6144). R is one rank for all slots: smaller ones are padded with zeros.
    `ranks`, where the host knows them, are the slots' own, r: a slot begins with a [parts * r, in] and b^T [r, out]
    then, unpadded, and what is behind them is nobody's. So torch reads each where it lies.
    """

    a: Tensor
    b: Tensor
    ends: tuple[int, ...]
    ranks: Sequence[int] | None = None

    @property
    def rank(self) -> int:
        return self.b.shape[2]


@dataclass(frozen=True, slots=True)
class LoraRows:
    """What a batch's rows add: slots [n] int32, -1 for none; shrunk [n, parts * R] fp32 by `lora_shrink`, scaled."""

    lora: Lora
    slots: Tensor
    shrunk: Tensor


def quantize_int4(weight: Tensor, group: int) -> Int4:
    """weight [out, in] to codes between each group's smallest and largest weight."""
    _check(weight.shape[1], group)
    groups = weight.float().reshape(len(weight), -1, group)
    minimum = groups.amin(dim=-1).half()
    scale = ((groups.amax(dim=-1) - minimum.float()) / 15).half()
    step = torch.where(scale > 0, scale, 1).float()[..., None]
    codes = ((groups - minimum.float()[..., None]) / step).round_().clamp_(0, 15)
    return pack_int4(codes.flatten(1).to(torch.uint8), scale, minimum, group)


def pack_int4(codes: Tensor, scale: Tensor, minimum: Tensor, group: int) -> Int4:
    """codes [out, in] uint8 of 0..15; scale, minimum [out, in / group] fp16."""
    _check(codes.shape[1], group)
    low, high = codes.reshape(len(codes), -1, 2, group).unbind(dim=2)
    packed = (low | high << 4).flatten(1).contiguous()
    affine = torch.stack((scale.t(), minimum.t()), dim=-1).contiguous()
    return Int4(packed, affine, group)


def _check(inputs: int, group: int) -> None:
    if inputs % (2 * group):
        raise ValueError(f"int4 in groups of {group} takes pairs of groups: {inputs} is no multiple of {2 * group}")


def unpack_int4(weight: Int4) -> Tensor:
    """The codes [out, in] uint8 that `pack_int4` was given."""
    blocks = weight.packed.reshape(len(weight.packed), -1, weight.group)
    return torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1)


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """[out, in]: the product and the sum in fp32 (fp64 for fp64), then rounded."""
    wide = torch.promote_types(dtype, torch.float32)
    if isinstance(weight, Dense):
        return weight.weight.to(dtype)
    if isinstance(weight, Int8Cpu):
        weight = weight.plain
    if isinstance(weight, Int8):
        return (weight.values.to(wide) * weight.scale.to(wide)[:, None]).to(dtype)
    if isinstance(weight, Int4Cpu):
        one = torch.eye(weight.shape[1])  # what undoes the order is the product
        product = torch._weight_int4pack_mm_for_cpu(one, weight.packed, weight.group, weight.affine.float())
        return product.t().to(dtype)
    codes = unpack_int4(weight).to(wide).reshape(len(weight.packed), -1, weight.group)
    return (codes * weight.scale.to(wide)[..., None] + weight.minimum.to(wide)[..., None]).flatten(1).to(dtype)
