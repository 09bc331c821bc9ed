"""What this machine has for a model: the memory that is free on the CPU's side and on each NVIDIA GPU.

Asks the kernel's files and NVML, not CUDA: it needs no torch, and a process that has initialised CUDA cannot fork
workers that use it.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["Memory", "gpu_memories", "host_memory", "nvidia_gpus"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_NAME_LENGTH = 96


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one `device`, `name` in words; `free` of `total` bytes."""

    device: Literal["cpu", "cuda"]
    name: str
    free: int
    total: int


def host_memory(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> Memory | None:
    """The machine's memory, cut by a container's limit where `cgroup` tells one; None where the system does not tell.

    Page cache counts as free, since the system gives it up for whoever needs memory.
    """
    found = _from_meminfo(meminfo) or _from_sysconf()
    if found is None:
        return None
    free, total = found
    limited = _from_cgroup(cgroup)
    if limited and limited[1] < total:
        free, total = min(free, limited[0]), limited[1]
    return Memory("cpu", "CPU", free, total)


def _from_meminfo(path: Path) -> tuple[int, int] | None:
    try:
        lines = (line.partition(":") for line in path.read_text(encoding="ascii").splitlines())
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in lines if rest.split()}
        return kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    except (OSError, ValueError, KeyError):
        return None


def _from_sysconf() -> tuple[int, int] | None:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    except (AttributeError, ValueError, OSError):
        return None


def _from_cgroup(folder: Path) -> tuple[int, int] | None:
    """What the control group, version 2 or 1, leaves free, and its limit; None where it sets none."""
    for limit, used, cached, part in (
        ("memory.max", "memory.current", "inactive_file ", folder),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ", folder / "memory"),
    ):
        try:
            most, now = int((part / limit).read_text()), int((part / used).read_text())
            cache = next(
                int(line.split()[1])
                for line in (part / "memory.stat").read_text().splitlines()
                if line.startswith(cached)
            )
        except (OSError, ValueError, StopIteration):
            continue
        return max(0, most - now + cache), most
    return None


def nvidia_gpus() -> int:
    """How many NVIDIA GPUs the driver shows to this process; 0 without a driver."""
    with _nvml() as nvml:
        return len(_visible(nvml)) if nvml else 0


def gpu_memories() -> list[Memory]:
    """The memory of each NVIDIA GPU that this process may use by `CUDA_VISIBLE_DEVICES`, in NVML's order.

    An index in that variable is taken as NVML's own, which is CUDA's under `CUDA_DEVICE_ORDER=PCI_BUS_ID` and on
    machines whose GPUs are all alike.
    """
    with _nvml() as nvml:
        if nvml is None:
            return []
        found = (_memory(nvml, handle) for handle in _visible(nvml))
        return [memory for memory in found if memory]


@contextmanager
def _nvml() -> Iterator[Any]:
    """NVML, initialised; None without a driver."""
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    except OSError:
        yield None
        return
    if nvml.nvmlInit_v2() != 0:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: Any) -> list[ctypes.c_void_p]:
    """Handles of the devices that `CUDA_VISIBLE_DEVICES` names; as in CUDA, not those behind an unknown one."""
    count = ctypes.c_uint(0)
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    words = map(str, range(count.value)) if named is None else (word.strip() for word in named.split(","))
    return list(itertools.takewhile(lambda handle: handle.value, (_handle(nvml, word, count.value) for word in words)))


def _handle(nvml: Any, word: str, count: int) -> ctypes.c_void_p:
    """The device of an index, a UUID or the beginning of a GPU's UUID; a null pointer where there is none."""
    handle = ctypes.c_void_p()
    if word.isascii() and word.isdigit():
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(word)), ctypes.byref(handle))
    elif nvml.nvmlDeviceGetHandleByUUID(word.encode(), ctypes.byref(handle)) != 0 and word.startswith("GPU-"):
        uuid = ctypes.create_string_buffer(_NAME_LENGTH)
        for index in range(count):
            other = _handle(nvml, str(index), count)
            if nvml.nvmlDeviceGetUUID(other, uuid, ctypes.c_uint(_NAME_LENGTH)) == 0 and uuid.value.startswith(
                word.encode()
            ):
                return other
    return handle


class _MemoryInfo(ctypes.Structure):
    """`nvmlMemory_t`, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _memory(nvml: Any, handle: ctypes.c_void_p) -> Memory | None:
    """None where the driver does not tell, as for a GPU that shares the host's memory."""
    info, name = _MemoryInfo(), ctypes.create_string_buffer(_NAME_LENGTH)
    if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info)) != 0:
        return None
    nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_LENGTH))
    return Memory("cuda", name.value.decode(errors="replace") or "NVIDIA GPU", info.free, info.total)
