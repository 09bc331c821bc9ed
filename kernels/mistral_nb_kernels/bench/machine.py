"""What a number needs beside it: the device, its driver, the versions, and the processor."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mistral_nb_kernels.bench.case import Device

__all__ = ["busy", "machine"]


def machine(device: Device) -> dict[str, Any]:
    """device (its name), kind ("cuda" or "cpu"), driver, capability, torch, triton, cuda, python, cpu, cores (that this
    process may use), load (how many wanted them in the last minute), threads (torch's), memory (bytes of the device's).
    None where there is none of it.
    """
    gpu = torch.device(device).type == "cuda"
    properties = torch.cuda.get_device_properties(device) if gpu else None
    return {
        "device": _cpu() if properties is None else properties.name,
        "kind": "cpu" if properties is None else "cuda",
        "driver": _driver() if gpu else None,
        "capability": None if properties is None else f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "triton": _triton(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "memory": _memory() if properties is None else properties.total_memory,
    }


def busy(found: Mapping[str, Any]) -> tuple[str, ...]:
    """For a record's notes, where a CPU is measured of which others have much."""
    if found["kind"] != "cpu" or found["load"] is None or found["load"] <= found["cores"] / 2:
        return ()
    return (
        f"the machine was busy before: a load of {found['load']:.1f} on {found['cores']} cores; times may be others'",
    )


def _cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _memory() -> int | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver, by NVML, which comes with it."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        return None
    version = ctypes.create_string_buffer(80)
    if nvml.nvmlInit_v2() != 0:
        return None
    found = nvml.nvmlSystemGetDriverVersion(version, len(version)) == 0
    nvml.nvmlShutdown()
    return version.value.decode() if found else None
