"""What the engine runs on: device, precision, threads, and how much of the memory the KV cache may take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.memory import Precision, int8_runs
from mistral_nb.errors import ConfigurationError
from mistral_nb.hardware import PROC, control_groups, host_memory

__all__ = ["available_cpus", "choose_device", "choose_precision", "free_memory"]


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` is an NVIDIA GPU where torch sees one, else the CPU. `ConfigurationError` for a GPU that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda was asked for, and torch sees no NVIDIA GPU; use cpu or auto")
    return torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")


def choose_precision(asked: Precision | Literal["auto"], device: torch.device, args: ModelArgs) -> Precision:
    """`auto` is int8 on the CPU, bf16 on a GPU, fp16 on one before compute capability 8.0.

    For a model that int8 cannot run it is bf16 on the CPU too. Of a model of 1 G weights a token took 128 ms in it and
    195 ms in fp32 (AMD EPYC, one thread), and as much less where the processor has no bf16 of its own.
    """
    if device.type == "cpu":
        return ("int8" if int8_runs(args) else "bf16") if asked == "auto" else asked
    if asked == "int8":
        raise ConfigurationError("precision int8 runs on the CPU only; use bf16, fp16 or auto on a GPU")
    if asked == "auto":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return asked


def available_cpus(proc: Path = PROC) -> int:
    """CPUs that this process may use: its affinity, cut by the quotas of the control groups that it is in, which
    `proc` tells; at least 1.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = (_quota(folder) for folder in control_groups("cpu", proc))
    return max(1, min([cpus, *(int(quota) for quota in quotas if quota is not None)]))


def _quota(group: Path) -> float | None:
    """CPUs by a control group's quota, version 2 or 1; None where there is none."""
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) < 0 else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on `device`; None where the system does not tell. On the CPU page cache counts as free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    memory = host_memory()
    return memory.free if memory else None
