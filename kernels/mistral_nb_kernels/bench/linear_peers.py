"""Who else runs linear layers, norms, SwiGLU and sampling: torch's products, Liger, FlashInfer, and torch's own ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mistral_nb_kernels.bench import sampling_cases
from mistral_nb_kernels.bench.case import Case, size
from mistral_nb_kernels.bench.linear_cases import product
from mistral_nb_kernels.bench.providers import Absent, Provider, device_of, gpu_package
from mistral_nb_kernels.packed import Dense

__all__ = ["LINEAR", "NORM", "SAMPLE", "SWIGLU"]


def _product_of(case: Case) -> Case:
    """Of a case of `linear_case` the product alone."""
    x, weight = case.inputs
    traffic = size(x, weight) + len(x) * weight.shape[0] * x.itemsize
    return replace(case, keywords={}, bytes=traffic)


def _product(device: str, case: Case) -> Callable[[], Any]:
    """Of dense weights, by the BLAS of a device."""
    if device_of(case).type != device:
        raise Absent("for CPUs only" if device == "cpu" else "for NVIDIA GPUs only")
    if not isinstance(case.inputs[1], Dense):
        raise Absent
    return product(*case.inputs)[1]


def _packed(name: str, case: Case) -> Callable[[], Any]:
    """Of packed weights, by torch's op for them."""
    its, call = product(*case.inputs)
    if its != name:
        raise Absent
    return call


def _liger_norm(case: Case) -> Callable[[], Any]:
    ops = gpu_package("liger_kernel.ops.rms_norm", "liger-kernel", case)
    x, weight, eps = case.inputs
    return lambda: ops.LigerRMSNormFunction.apply(x, weight, eps)


def _liger_add_norm(case: Case) -> Callable[[], Any]:
    ops = gpu_package("liger_kernel.ops.fused_add_rms_norm", "liger-kernel", case)
    x, residual, weight, eps = case.inputs
    return lambda: ops.LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps)


def _flashinfer_norm(case: Case) -> Callable[[], Any]:
    norm = gpu_package("flashinfer.norm", "flashinfer-python", case)
    x, weight, eps = case.inputs
    return lambda: norm.rmsnorm(x, weight, eps)


def _flashinfer_add_norm(case: Case) -> Callable[[], Any]:
    """In place, on copies: they change with every call."""
    norm = gpu_package("flashinfer.norm", "flashinfer-python", case)
    x, residual, weight, eps = case.inputs
    x, residual = x.clone(), residual.clone()

    def call() -> tuple[Tensor, Tensor]:
        norm.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    return call


def _liger_swiglu(case: Case) -> Callable[[], Any]:
    ops = gpu_package("liger_kernel.ops.swiglu", "liger-kernel", case)
    gate, up = (x.contiguous() for x in case.inputs[0].chunk(2, dim=-1))
    return lambda: ops.LigerSiLUMulFunction.apply(gate, up)


def _flashinfer_swiglu(case: Case) -> Callable[[], Any]:
    activation = gpu_package("flashinfer.activation", "flashinfer-python", case)
    return lambda: activation.silu_and_mul(case.inputs[0])


def _race(case: Case) -> Case:
    """Draws without penalties by random numbers made beforehand: the token of the largest share over its number."""
    logits, parameters, penalties = case.inputs
    if penalties is not None:
        raise Absent
    race = torch.empty(logits.shape, device=logits.device).exponential_()
    return replace(case, inputs=(logits, parameters, race), reference=sampling_cases.raced)


def _torch_sample(case: Case) -> Callable[[], Any]:
    return sampling_cases.torch_sample(*case.inputs)


BARE, GPU = "the bare product", ("cuda",)
LINEAR = (
    Provider("cublas", functools.partial(_product, "cuda"), None, BARE, _product_of, on=GPU),
    Provider("blas", functools.partial(_product, "cpu"), None, BARE, _product_of, on=("cpu",)),
    Provider("torch int8", functools.partial(_packed, "torch int8"), None, BARE, _product_of),
    Provider("torch int4", functools.partial(_packed, "torch int4"), None, BARE, _product_of, on=GPU),
)
"""For cases of `linear_case`."""
NORM = (
    Provider("liger", _liger_add_norm, ops=("add_rms_norm",), on=GPU),
    Provider("liger", _liger_norm, ops=("rms_norm",), on=GPU),
    Provider("flashinfer", _flashinfer_add_norm, ops=("add_rms_norm",), on=GPU),
    Provider("flashinfer", _flashinfer_norm, ops=("rms_norm",), on=GPU),
)
"""For cases of `norm_case` and `rms_case`."""
SWIGLU = (
    Provider("liger", _liger_swiglu, partial="gate and up apart", on=GPU),
    Provider("flashinfer", _flashinfer_swiglu, on=GPU),
)
"""For cases of `swiglu_case`."""
SAMPLE = (Provider("torch", _torch_sample, None, "its random numbers made beforehand", _race),)
"""For cases of `sample_case`."""
