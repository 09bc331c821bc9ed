"""Who runs an op: ours, its reference, torch.compile, and how any other is bound to a case before it is timed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import mistral_nb_kernels
from mistral_nb_kernels.bench.case import Case, tensors
from mistral_nb_kernels.packed import Int4, Int8

__all__ = ["COMPILE", "EAGER", "OURS", "Absent", "Provider", "device_of", "gpu_package"]


class Absent(Exception):
    """Why a provider cannot run a case here, in words for the user: a package, a device, a type that it does not take.

    Without words it has nothing to do with such a case, which is not told.
    """


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to run an op.

    bind: from a case a call without arguments, which alone is timed; raises `Absent`. result: from the case that was
    bound and what the call gave, the op's result; None: it is the op's already. partial: what it leaves out of the op,
    in words; `does` makes the case of what it does then, whose reference it is held against and whose FLOPs and bytes
    count; `bind` and `result` are given that case. ops: the ops that it runs; empty: all. on: the types of devices
    where it is asked unless it is named.
    """

    name: str
    bind: Callable[[Case], Callable[[], Any]]
    result: Callable[[Case, Any], Any] | None = None
    partial: str = ""
    does: Callable[[Case], Case] | None = None
    ops: tuple[str, ...] = ()
    on: tuple[str, ...] = ("cpu", "cuda")


def device_of(case: Case) -> torch.device:
    """Where a case's inputs are."""
    return next(tensors(case.inputs)).device


def _ours(case: Case) -> Callable[[], Any]:
    """The kernel that an engine on this device would take."""
    *_, last = (x for x in case.inputs if isinstance(x, torch.Tensor))
    x = last if case.op == "lora_expand" else case.inputs[0]
    ops = mistral_nb_kernels.choose(x.device, x.shape[-1], x.dtype)
    kind = {Int8: " int8", Int4: " int4"}.get(type(case.inputs[1])) if case.op == "linear" else None
    choice = next(choice for choice in ops.choices if choice.op == case.op + (kind or ""))
    if choice.config is None:
        raise Absent(choice.why)
    return case.call(getattr(ops, case.op))


READS = {
    "prefill_attention": "where sequences end",
    "decode_attention": "lengths",
    "rope_decode_attention": "lengths",
    "lora_shrink": "slots",
    "lora_expand": "slots",
    "sample": "parameters",
}
"""What the references of some ops read on the host."""


def _compiled(case: Case) -> Callable[[], Any]:
    if case.op in READS:
        raise Absent(
            f"torch.compile has nothing to compile of {case.op}, whose reference reads {READS[case.op]} on the host"
        )
    if device_of(case).type != "cuda":
        if not (os.environ.get("CXX") or any(map(shutil.which, ("g++", "clang++")))):
            raise Absent("torch.compile finds no C++ compiler: install g++, or set CXX")
    elif importlib.util.find_spec("triton") is None:
        raise Absent("torch.compile needs triton, which is not installed")
    shapes = tuple((x.shape, x.stride(), x.dtype) for x in tensors((case.inputs, case.keywords)))
    return case.call(_compiled_for(case.reference, shapes))


@functools.lru_cache(maxsize=1)
def _compiled_for(function: Callable[..., Any], shapes: Hashable) -> Callable[..., Any]:
    """For these shapes alone: torch gives a function up that it has compiled for too many."""
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def gpu_package(name: str, pip: str, case: Case) -> ModuleType:
    """A package of kernels for NVIDIA GPUs. Raises `Absent` where it is not installed, or the case is elsewhere."""
    if device_of(case).type != "cuda":
        raise Absent(f"{pip} runs on NVIDIA GPUs only")
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        raise Absent(f"{pip} is not installed: pip install {pip}")
    return importlib.import_module(name)


OURS = Provider("ours", _ours)
EAGER = Provider("eager", lambda case: case.call(case.reference))
COMPILE = Provider("compile", _compiled, on=("cuda",))
"""On a CPU, where a compiler of C++ takes its time, only if it is named."""
