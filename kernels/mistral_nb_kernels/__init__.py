"""The ops of the transformer, and the one rule that says which code runs them.

`choose` is asked once, when a model is loaded, and gives the attention ops bound to what runs them there; `str` of its
answer is for a status line. `reference` holds every op in torch. An op's kernel has the op's name, in the module of
that name, which is imported where it is chosen: without an NVIDIA GPU nothing needs triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config, config_for
from mistral_nb_kernels.paged import PagedKV, Rows

__all__ = ["Choice", "Ops", "PagedKV", "Rows", "choose", "kernels_in_use", "reference", "rule"]

MODULES = {
    "rope_write": "rope",
    "prefill_attention": "attention",
    "decode_attention": "decode_attention",
    "rope_decode_attention": "decode_attention",
}
"""Each op with a kernel, and its module."""
TABLE = {"rope_decode_attention": "decode_attention"}
"""Ops that share another's rows in the table of configs."""


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
    """The attention ops, bound: called with the arguments of `reference`'s functions of the same names."""

    rope_write: Callable[..., torch.Tensor]
    prefill_attention: Callable[..., torch.Tensor]
    decode_attention: Callable[..., torch.Tensor]
    rope_decode_attention: Callable[..., torch.Tensor]
    choices: tuple[Choice, ...]

    def __str__(self) -> str:
        """What runs which ops, such as "Triton (unmeasured): rope_write, decode_attention"."""
        ops: dict[str, list[str]] = {}
        for choice in self.choices:
            ops.setdefault(str(choice), []).append(choice.op)
        return "; ".join(f"{what}: {', '.join(names)}" for what, names in ops.items())


Asked = Literal["auto", "torch", "triton"]


def rule(arch: int | None, head_dim: int, dtype: torch.dtype, asked: Asked) -> list[Choice]:
    """What runs each op on a compute capability such as 90; `arch` None where no NVIDIA GPU runs Triton.

    Its kernel, where the table has a config for the architecture or an older one, the head dimension and the type;
    else torch, and prefill is SDPA then. The table holds what is worth running: no prefill on 7.5, whose `tl.dot` is
    not on the matrix units, and no bf16 there. Raises `ValueError` for "triton" where it cannot run every op.
    """
    chosen = []
    for op in MODULES:
        row = None if arch is None else config_for(TABLE.get(op, op), arch, head_dim, dtype.itemsize * 8)
        if asked == "torch":
            chosen.append(Choice(op, None, "as asked"))
        elif arch is None:
            chosen.append(Choice(op, None, "no NVIDIA GPU with Triton"))
        elif row is None or (arch < 80 and dtype == torch.bfloat16):
            chosen.append(Choice(op, None, f"no kernel for head_dim {head_dim} in {dtype} on sm_{arch}"))
        else:
            chosen.append(Choice(op, row.config, "", row.measured))
        if asked == "triton" and chosen[-1].config is None:
            raise ValueError(f"triton was asked for, and {op} has no kernel here: {chosen[-1].why}; ask for auto")
    return chosen


def choose(device: torch.device, head_dim: int, dtype: torch.dtype, asked: Asked = "auto") -> Ops:
    """The attention ops for a model on `device`. Raises `ValueError` as `rule` does."""
    arch = None
    if device.type == "cuda" and torch.version.hip is None and importlib.util.find_spec("triton") is not None:
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    choices = rule(arch, head_dim, dtype, asked)
    return Ops(**{choice.op: _bound(choice, arch) for choice in choices}, choices=tuple(choices))


def _bound(choice: Choice, arch: int | None) -> Callable[..., torch.Tensor]:
    if choice.config is None:
        function: Callable[..., torch.Tensor] = getattr(reference, choice.op)
        return function
    keywords: dict[str, Any] = {"config": choice.config}
    if TABLE.get(choice.op, choice.op) == "decode_attention":
        keywords["dot"] = arch is not None and arch >= 80
    module = importlib.import_module(f"mistral_nb_kernels.{MODULES[choice.op]}")
    return functools.partial(getattr(module, choice.op), **keywords)


def kernels_in_use() -> str:
    """What runs the engine's ops, in words for a status line."""
    return "torch reference"
