"""Products with weights, plain and quantized, in torch."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_nb_kernels.packed import Int4Cpu, Int8, Int8Cpu, Lora, LoraRows, Norm, Weight, dequantize
from mistral_nb_kernels.reference.layers import in_type, one_thread, rms_norm, swiglu, wider
from mistral_nb_kernels.reference.lora import Adapting, lora_expand

__all__ = ["blocked_int8", "linear", "linear_int4_cpu", "linear_int8", "linear_int8_cpu", "quantize_int8"]

INT8_MAX = 127

MIDDLE = 128
"""What 0 is where int8 goes as uint8: oneDNN's quick products take the activations so."""


def linear(
    x: Tensor,
    weight: Weight,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    lora: LoraRows | tuple[Adapting, Lora] | None = None,
) -> Tensor:
    """norm(x) [n, in] @ weight [out, in]^T, with adapters, gated, and added to a residual -> [n, out].

    `lora` is what `lora_shrink` made, or what makes the whole of an update here, from x after its norm.
    `gated` halves the outputs: silu of the first half times the second. The norm and the product are rounded to x's
    type, as torch's own ops are; what follows the product is in fp32 and rounded once. On the CPU int8 goes through
    `linear_int8`, `Int8Cpu` through `linear_int8_cpu`, `Int4Cpu` through `linear_int4_cpu`; `Int4` is for GPUs, and
    dequantised whole at each call.
    """
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    y = _product(x, weight)
    if lora is not None or gated or residual is not None:
        y = in_type(y, wider(x.dtype))
    if isinstance(lora, LoraRows):
        y = lora_expand(lora.shrunk, lora.lora, lora.slots, y)
    elif lora is not None:
        y = lora[0].update(x, lora[1], y)
    if gated:
        y = swiglu(y)
    if residual is not None:
        y = residual + y
    return in_type(y, x.dtype)


def _product(x: Tensor, weight: Weight) -> Tensor:
    if isinstance(weight, Int4Cpu) and x.dtype != torch.float64:
        return linear_int4_cpu(x, weight)
    if isinstance(weight, Int8Cpu) and x.dtype != torch.float64:
        return linear_int8_cpu(x, weight)
    if isinstance(weight, Int8) and x.device.type == "cpu" and x.dtype != torch.float64:
        return linear_int8(x, weight.values, weight.scale)
    return F.linear(x, dequantize(weight, x.dtype))


def quantize_int8(x: Tensor, *, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale a row: x [rows, in] -> (int8 [rows, in], fp32 [rows]), x ~ values * scale[:, None].

    With `out` they go there, and an fp32 `x` is overwritten with the quotients: nothing of its size is allocated.
    """
    largest = torch.maximum(x.amax(dim=-1, keepdim=True), x.amin(dim=-1, keepdim=True).neg())
    scale = largest.float().clamp_min_(1e-12).mul_(1 / INT8_MAX)
    if out is None:
        return (x / scale).round_().to(torch.int8), scale[:, 0]
    values, scales = out
    scales.copy_(scale[:, 0])
    values.copy_(x.div_(scale).round_())
    return out


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [n, in] @ (weight * scale[:, None])^T for int8 weight [out, in] and fp32 scale [out] -> fp32 [n, out]. CPU.

    x and the sums are rounded to bf16, 2.4e-3 of the result in all against fp64, where rounding the weights to int8
    costs 7e-3; the sums themselves are made in fp32, in an order that does not depend on the number of rows. On
    2 cores a decoding step takes 0.8 of the time that the same weights take with activations in two int8 halves
    through `torch._int_mm`, at the same perplexity. `in` is a multiple of 32: past that torch's op reads out of bounds.
    It takes rows for contiguous, too: strided ones, which are in bf16 already, are copied.
    """
    assert weight.shape[1] % 32 == 0
    return torch._weight_int8pack_mm(x.to(torch.bfloat16).contiguous(), weight, _ones(len(weight))) * scale


def linear_int8_cpu(x: Tensor, weight: Int8Cpu) -> Tensor:
    """x [n, in] @ weight [out, in]^T -> fp32 [n, out]. CPU.

    Each row of x is made of two int8 rows, the second of what rounding to the first leaves: 2e-5 of the result against
    fp64. Their sums are whole numbers, so that neither the number of rows nor that of threads changes a bit. 49152
    outputs of 576 take 1.5 ms of one row and 1.9 ms of eight, and through `linear_int8` 2.3 and 6.4 (2 cores of AMD
    EPYC, with VNNI).
    """
    wide = x.float()
    scale = torch.maximum(wide.amax(dim=-1, keepdim=True), wide.amin(dim=-1, keepdim=True).neg())
    scale = scale.clamp_min_(1e-30).mul_(1 / INT8_MAX)
    rest = wide / scale
    first = rest.round()
    second = rest.sub_(first).mul_(2 * INT8_MAX).round_()
    sums = _exact_product(torch.cat((first, second)), weight.blocked, weight.scale)
    return sums[: len(x)].add_(sums[len(x) :], alpha=1 / (2 * INT8_MAX)).mul_(scale)


def _exact_product(whole: Tensor, blocked: Tensor, scale: Tensor) -> Tensor:
    """Whole numbers of -128 .. 127 [n, in] @ blocked [in, out] * scale [out] -> fp32 [n, out]; the sums are int32."""
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(
        whole.add_(MIDDLE).to(torch.uint8),
        1.0,
        MIDDLE,
        blocked,
        scale,
        _zero(),
        None,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )
    return sums


def blocked_int8(weight: Int8) -> Int8 | Int8Cpu:
    """An int8 matrix on the CPU in the order of oneDNN's product; as it is where that would be slow or not exact.

    One thread does it: a pool of threads that the caller's thread had would slow those of all other threads down.
    """
    if not _sums_are_exact():
        return weight
    with one_thread():
        return Int8Cpu(torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), None), weight.scale)


@functools.cache
def _sums_are_exact() -> bool:
    """Whether oneDNN's products of int8 are of instructions that add up in 32 bits: before VNNI they cut sums of two to
    16 bits, and some processors have none at all.
    """
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (known.get("avx512_vnni") or known.get("avx_vnni")):
        return False
    values = torch.full((64, 64), INT8_MAX, dtype=torch.int8)
    values[::2] = -INT8_MAX
    x = torch.full((2, 64), float(INT8_MAX))
    try:
        with one_thread():
            found = _exact_product(x.clone(), torch.ops.onednn.qlinear_prepack(values, None), torch.ones(64))
            return torch.equal(found, x @ values.t().float())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


@functools.cache
def _zero() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def linear_int4_cpu(x: Tensor, weight: Int4Cpu) -> Tensor:
    """x [n, in] @ weight [out, in]^T -> bf16 [n, out]. CPU.

    x, scales, middles and the result are rounded to bf16: 3.0e-3 of the result against fp64, where int8 costs 7e-3;
    the sums are made in fp32, in an order that depends neither on the number of rows nor on that of threads. A step of
    the embedded model's matrices takes 4.0 ms on one thread, and 7.4 ms in int8 (AMD EPYC). torch's op takes what it
    is given for contiguous, so that some outputs of a matrix have their scales and middles copied at each call.
    """
    rounded, affine = x.to(torch.bfloat16).contiguous(), weight.affine.contiguous()
    return torch._weight_int4pack_mm_for_cpu(rounded, weight.packed, weight.group, affine)


@functools.cache
def _ones(n: int) -> Tensor:
    return torch.ones(n, dtype=torch.bfloat16)
