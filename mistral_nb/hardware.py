"""What this machine has for a model: CPUs, and the memory that is free on their side and on each NVIDIA GPU.

Asks the kernel's files and NVML, not CUDA: it needs no torch, and a process that has initialised CUDA cannot fork
workers that use it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

__all__ = [
    "PROC",
    "Memory",
    "available_cpus",
    "compute_capability",
    "control_groups",
    "cpu_flags",
    "gpu_memories",
    "host_memory",
    "nvidia_gpus",
]

PROC = Path("/proc")
_NAME_LENGTH = 96


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one `device`, `name` in words; `free` of `total` bytes."""

    device: Literal["cpu", "cuda"]
    name: str
    free: int
    total: int


def host_memory(proc: Path = PROC) -> Memory | None:
    """The machine's memory, cut by the limits of the control groups that this process is in, as a container sets them;
    None where the system does not tell.

    Page cache counts as free, since the system gives it up for whoever needs memory.
    """
    found = _from_meminfo(proc / "meminfo") or _from_sysconf()
    if found is None:
        return None
    free, total = found
    for group in control_groups("memory", proc):
        limited = _from_group(group)
        if limited:
            free, total = min(free, limited[0]), min(total, limited[1])
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


def _from_group(folder: Path) -> tuple[int, int] | None:
    """What a control group, version 2 or 1, leaves free, and its limit; None where it sets none."""
    for limit, used, before, dirty, writeback in (
        ("memory.max", "memory.current", "", "file_dirty", "file_writeback"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_", "total_dirty", "total_writeback"),
    ):
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            lines = (line.partition(" ") for line in (folder / "memory.stat").read_text().splitlines())
            stat = {name: int(value) for name, _, value in lines}
        except (OSError, ValueError):
            continue
        cache = stat.get(f"{before}active_file", 0) + stat.get(f"{before}inactive_file", 0)
        cache -= stat.get(dirty, 0) + stat.get(writeback, 0)
        return max(0, most - now + max(0, cache)), most
    return None


def control_groups(controller: str, proc: Path = PROC) -> list[Path]:
    """Folders of the control groups that limit this process's `memory` or `cpu`: its own and all above it, as far as
    they can be seen, in version 2 and in 1. Empty off Linux.
    """
    try:
        groups, mounts = (
            (proc / "self" / name).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
            for name in ("cgroup", "mountinfo")
        )
    except OSError:
        return []
    found: list[Path] = []
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers and controller not in controllers.split(","):
            continue
        for fields in map(str.split, mounts):
            kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
            if (kind == "cgroup" and controllers and controller in options) or (kind == "cgroup2" and not controllers):
                found += _upwards(PurePosixPath(path), *(_unescaped(field) for field in fields[3:5]))
    return found


def _upwards(group: PurePosixPath, root: str, mount: str) -> Iterator[Path]:
    """The folders of `group` and of those above it, where the group `root` is mounted on `mount`.

    A group outside of what is mounted, as a container may see its own, is taken to be the root.
    """
    inside = group.is_relative_to(root) and ".." not in group.parts
    parts = group.relative_to(root).parts if inside else ()
    for count in range(len(parts), -1, -1):
        yield Path(mount, *parts[:count])


def _unescaped(field: str) -> str:
    """A path of `mountinfo`, where a space is `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), field)


def resident_memory(proc: Path = PROC) -> int | None:
    """Bytes of this process that are in memory; None where the system does not tell."""
    try:
        return int((proc / "self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


@functools.cache
def cpu_flags(proc: Path = PROC) -> frozenset[str]:
    """What the first CPU says it can do, in Linux's words, such as "avx512_bf16"; nothing where the system does not
    tell.
    """
    try:
        lines = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


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


def nvidia_gpus() -> int:
    """How many NVIDIA GPUs the driver shows to this process; 0 without a driver."""
    with _nvml() as nvml:
        return len(_visible(nvml)) if nvml else 0


def compute_capability() -> tuple[int, int] | None:
    """Of the first NVIDIA GPU that this process may use; None without one."""
    with _nvml() as nvml:
        gpu = next(iter(_visible(nvml)), None) if nvml else None
        major, minor = ctypes.c_int(0), ctypes.c_int(0)
        if gpu is None or nvml.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor)) != 0:
            return None
        return major.value, minor.value


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
