"""What the engine runs on: device, precision, threads, and how much of the memory the KV cache may take."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Literal

import torch

from mistral_nb.checkpoints.checkpoint import Checkpoint
from mistral_nb.checkpoints.memory import Device, Precision, Selection, runs, select
from mistral_nb.engine.quantise import four_bit_blocks
from mistral_nb.errors import ConfigurationError
from mistral_nb.hardware import host_memory

__all__ = [
    "choose_device",
    "choose_precision",
    "device_kind",
    "free_memory",
    "give_back",
    "keep_freed_memory",
    "plain_dtype",
    "side_stream",
]

_FAST_INT4 = ("AVX2", "AVX512")
"""Instructions for which torch has written its int4 product: with AVX2 a token takes as long as in int8, with AVX-512
half as long, and in plain code twice as long (AMD EPYC, one thread).
"""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT, _LARGE = 64 << 20, 8 << 20
"""Bytes: freed ones at a heap's end that are kept, and a block that the system is asked for, and has back, alone."""
_PLAIN: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is an NVIDIA GPU where torch sees one, else the CPU. `ConfigurationError` for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda was asked for, and torch sees no NVIDIA GPU; use cpu or auto")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")


def device_kind(device: torch.device) -> Device:
    return "cuda" if device.type == "cuda" else "cpu"


def choose_precision(
    asked: Precision | Literal["auto"], device: torch.device, checkpoint: Checkpoint, context: int | None = None
) -> Selection:
    """The precision and the context, in tokens, to load a checkpoint with; None for `context` is all of the model's.

    `auto` is bf16 on a GPU, fp16 on one before compute capability 8.0, and int8 on the CPU; int4 there for weights that
    are 4-bit blocks already, of which it loses nothing, where it is no slower. What does not fit into the memory that
    is free gives way to int8, then to int4, at last with less context unless one is asked for. For a model that int8
    cannot run it is bf16 on the CPU too: of a model of 1 G weights a token took 128 ms in it and 195 ms in fp32 (AMD
    EPYC, one thread), and as much less where the processor has no bf16 of its own.
    """
    args, kind = checkpoint.args, device_kind(device)
    if asked != "auto":
        return Selection(asked, min(context or args.context, args.context))
    order: tuple[Precision, ...] = (_half(device), "int8", "int4")
    if kind == "cpu":
        order = ("int8", "int4") if runs(args, "int8", kind) else ("bf16",)
        fast = torch.backends.cpu.get_cpu_capability() in _FAST_INT4
        if fast and runs(args, "int4", kind) and four_bit_blocks(checkpoint):
            chosen = select(args, ("int4",), kind, free_memory(device), context=context)
            return replace(chosen, why=chosen.why or "int4, since its weights are 4-bit blocks already")
    return select(args, order, kind, free_memory(device), context=context)


def plain_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of embeddings, norms and activations, and of matrices where they are not int8 or int4."""
    if precision in _PLAIN:
        return _PLAIN[precision]
    return torch.float32 if device.type == "cpu" else _PLAIN[_half(device)]


def _half(device: torch.device) -> Precision:
    """The 16 bits of a device: bf16 where a GPU has it."""
    return "fp16" if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0) else "bf16"


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on `device`; None where the system does not tell.

    On the CPU page cache counts as free, on a GPU what torch keeps for later, which is given back first; 0 where a GPU
    has not even room for CUDA itself.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        try:
            return torch.cuda.mem_get_info(device)[0]
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            return 0
    memory = host_memory()
    return memory.free if memory else None


def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Of a GPU, for copies that its steps do not wait for.

    Its priority is high for one reason: torch has 32 streams of the usual one and hands them out in turn, so that
    sooner or later it would be the stream on which it captures graphs, and waiting for it would end the capture.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


def keep_freed_memory() -> None:
    """On Linux, have the C library keep for the next step on the CPU what the last one has freed.

    It gives it back to the system otherwise, which hands it out again page by page: the scores of 8 sequences cost a
    step of 20 ms one more. The process keeps the thresholds (mallopt(3)); what is larger is given back as before.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def give_back(device: torch.device) -> None:
    """Let others have the memory that nobody uses any more: torch, or the C library, keeps it for itself otherwise."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # of a GPU that has failed
            torch.cuda.empty_cache()
    elif sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
