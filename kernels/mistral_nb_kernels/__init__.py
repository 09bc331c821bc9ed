"""The ops of the transformer, and the one rule that says which code runs them.

`choose` is asked once, when a model is loaded, and gives the ops bound to what runs them there; `str` of its answer is
for a status line. `reference` holds every op in torch. An op's kernel has the op's name, in the module that
`KERNELS` names, which is imported where it is chosen: without an NVIDIA GPU nothing needs triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config, config_for
from mistral_nb_kernels.packed import Dense, Int4, Int4Cpu, Int8, Int8Cpu, Lora, LoraRows, Norm, Weight
from mistral_nb_kernels.paged import PAGE, PagedKV, Rows
from mistral_nb_kernels.parameters import Parameters, Penalties

__all__ = [
    "PAGE",
    "Choice",
    "Dense",
    "Int4",
    "Int8",
    "Int8Cpu",
    "Lora",
    "LoraRows",
    "Norm",
    "Ops",
    "PagedKV",
    "Parameters",
    "Penalties",
    "Rows",
    "Weight",
    "choose",
    "compilation",
    "reference",
    "rule",
]


@dataclass(frozen=True, slots=True)
class Kernel:
    """Where an op's kernel is: its module, and its rows in the table of configs.

    `headed`: there is one for each head dimension. `matrix`: it is told whether the matrix unit takes `tl.dot`, which
    it does from 8.0 on. `bits` of the weights; None: of the activations.
    """

    module: str
    rows: str
    headed: bool = False
    matrix: bool = False
    bits: int | None = None


KERNELS = {
    "rope_write": Kernel("rope", "rope_write", headed=True),
    "prefill_attention": Kernel("attention", "prefill_attention", headed=True),
    "decode_attention": Kernel("decode_attention", "decode_attention", headed=True, matrix=True),
    "rope_decode_attention": Kernel("decode_attention", "decode_attention", headed=True, matrix=True),
    "rms_norm": Kernel("rms_norm", "rms_norm"),
    "add_rms_norm": Kernel("rms_norm", "rms_norm"),
    "swiglu": Kernel("swiglu", "swiglu"),
    "linear": Kernel("linear", "linear", matrix=True),
    "linear int8": Kernel("linear", "linear", matrix=True, bits=8),
    "linear int4": Kernel("linear", "linear", matrix=True, bits=4),
    "lora_shrink": Kernel("lora", "lora_shrink"),
    "lora_expand": Kernel("lora", "lora_expand"),
    "sample": Kernel("sampling", "sample"),
}
"""By op; `linear` has one for each kind of weights."""
WEIGHTS: dict[str, type] = {"linear": Dense, "linear int8": Int8, "linear int4": Int4}
AROUND = ("rms_norm", "swiglu", "lora_expand")
"""Whose kernels `linear` launches too, with the same configs."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs an op: its Triton kernel with `config`, or its torch reference, and why.

    `measured` says on what the config was timed; None: on nothing yet.
    """

    op: str
    config: Config | None
    why: str
    measured: str | None = None

    def __str__(self) -> str:
        if self.config is None:
            return f"torch ({self.why})"
        return f"Triton ({'measured on ' + self.measured if self.measured else 'unmeasured'})"


@dataclass(frozen=True, slots=True)
class Ops:
    """The ops, bound: called with the arguments of `reference`'s functions of the same names."""

    rope_write: Callable[..., Tensor]
    prefill_attention: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]
    rope_decode_attention: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    linear: Callable[..., Tensor]
    lora_shrink: Callable[..., Tensor]
    lora_expand: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    choices: tuple[Choice, ...]

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a decoding step; torch's attention and draws read numbers on the host."""
        return all(choice.config for choice in self.choices if choice.op in ("rope_decode_attention", "sample"))

    def __str__(self) -> str:
        """What runs which ops, such as "Triton (unmeasured): rope_write, sample; torch (...): prefill_attention"."""
        ops: dict[str, list[str]] = {}
        for choice in self.choices:
            ops.setdefault(str(choice), []).append(choice.op)
        if len(ops) == 1:
            return f"{next(iter(ops))}: all ops"
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in ops.items())


Asked = Literal["auto", "torch", "triton"]


def rule(
    arch: int | None, head_dim: int, dtype: torch.dtype, asked: Asked, absent: str = "no NVIDIA GPU with Triton"
) -> list[Choice]:
    """What runs each op on a compute capability such as 90; `arch` None where Triton runs on no GPU, `absent` why.

    Its kernel, where the table has a config for the architecture or an older one, the head dimension and the type;
    else torch, and prefill is SDPA then. The table holds what is worth running: no prefill on 7.5, whose `tl.dot` is
    not on the matrix units, and no bf16 there. Raises `ValueError` for "triton" where it cannot run every op, but for
    int8 and int4 weights beside activations of 32 bits: those are torch's whatever is asked for.
    """
    return [_chosen(op, kernel, arch, head_dim, dtype, asked, absent) for op, kernel in KERNELS.items()]


def _chosen(
    op: str, kernel: Kernel, arch: int | None, head_dim: int, dtype: torch.dtype, asked: Asked, absent: str
) -> Choice:
    if asked == "torch":
        return Choice(op, None, "as asked")
    bits = dtype.itemsize * 8
    kind = f"head_dim {head_dim} in {dtype}" if kernel.headed else str(dtype)
    why = absent
    if arch is not None:
        if kernel.bits is not None and bits != 16:
            return Choice(op, None, "activations of 16 bits only")
        row = config_for(kernel.rows, arch, head_dim if kernel.headed else 0, kernel.bits or bits)
        if row is not None and (arch >= 80 or dtype != torch.bfloat16):
            return Choice(op, row.config, "", row.measured)
        why = f"no kernel for {kind} on sm_{arch}"
    if asked == "triton":
        raise ValueError(f"triton was asked for, and {op} has no kernel here: {why}; ask for auto")
    return Choice(op, None, why)


def choose(device: torch.device, head_dim: int, dtype: torch.dtype, asked: Asked = "auto") -> Ops:
    """The ops for a model on `device` whose activations are `dtype`. Raises `ValueError` as `rule` does."""
    arch, absent = _triton_on(device)
    choices = tuple(rule(arch, head_dim, dtype, asked, absent))
    around = {choice.op: choice.config for choice in choices if choice.op in AROUND}
    bound = {choice.op: _bound(choice, arch, around) for choice in choices}
    by_weight = {kind: bound.pop(op) for op, kind in WEIGHTS.items()}
    linear = _by_weight({**by_weight, Int4Cpu: reference.linear, Int8Cpu: reference.linear})
    return Ops(**bound, linear=linear, choices=choices)


def _triton_on(device: torch.device) -> tuple[int | None, str]:
    """The compute capability where Triton can run on `device`; else None, and why."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None, "no NVIDIA GPU with Triton"
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return None, "Triton finds no C compiler: install gcc, or set CC"
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, ""


def _bound(choice: Choice, arch: int | None, around: Mapping[str, Config | None]) -> Callable[..., Any]:
    name = choice.op.partition(" ")[0]
    if choice.config is None:
        function: Callable[..., Any] = getattr(reference, name)
        return function
    kernel = KERNELS[choice.op]
    keywords: dict[str, Any] = {"config": choice.config}
    if kernel.matrix:
        keywords["dot"] = arch is not None and arch >= 80
    if name == "linear":
        keywords["around"] = around
    return functools.partial(getattr(importlib.import_module(f"mistral_nb_kernels.{kernel.module}"), name), **keywords)


def _by_weight(bound: Mapping[type, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """`linear` for every kind of weights."""

    def linear(x: Tensor, weight: Weight, **how: Any) -> Tensor:
        return bound[type(weight)](x, weight, **how)

    return linear


@contextlib.contextmanager
def compilation() -> Iterator[None]:
    """Around what launches kernels, which are compiled then: `RuntimeError` where that cannot be done here."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"Triton could not build its launchers, as the C compiler ended with exit status {error.returncode}: "
            "install gcc and Python's headers (python3-dev)"
        ) from error
    except _errors_of_triton() as error:
        raise RuntimeError(f"Triton could not compile a kernel ({type(error).__name__}: {error})") from error


def _errors_of_triton() -> tuple[type[Exception], ...]:
    errors = sys.modules.get("triton.errors")
    return () if errors is None else (errors.TritonError,)
