"""Products with weights, plain and quantized, in torch."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_nb_kernels.packed import Int4Cpu, Int8, Lora, LoraRows, Norm, Weight, dequantize
from mistral_nb_kernels.reference.layers import in_type, rms_norm, swiglu, wider
from mistral_nb_kernels.reference.lora import Adapting, lora_expand

__all__ = ["linear", "linear_int4_cpu", "linear_int8", "quantize_int8"]

INT8_MAX = 127


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
    `linear_int8`, `Int4Cpu` through `linear_int4_cpu`; `Int4` is for GPUs, and dequantised whole at each call.
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
