"""Memory and CPUs: the host's by the system's files, GPUs by a driver library of the test's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_nb.hardware import Memory, available_cpus, cpu_flags, gpu_memories, host_memory, nvidia_gpus

ROOT = Path(__file__).resolve().parent.parent
GB = 1 << 30
MEMINFO = f"MemTotal: {16 * GB // 1024} kB\nMemFree: 1024 kB\nMemAvailable: {12 * GB // 1024} kB\nHugePages_Total: 0\n"


V2, V1 = "0::{}\n", "4:memory:{}\n3:cpu,cpuacct:/elsewhere\n"


def host(tmp_path: Path, group: str = V2.format("/"), root: str = "/", **files: str) -> Memory | None:
    """The memory by a `meminfo` and by the files of control groups of both versions, mounted in folders with a space in
    their names. In the files' names __ stands for a dot and ___ for a slash; v1_ is for version 1.
    """
    (tmp_path / "self").mkdir(exist_ok=True)
    (tmp_path / "meminfo").write_text(files.pop("meminfo", MEMINFO))
    (tmp_path / "self" / "cgroup").write_text(group)
    mounts = [
        "23 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw",
        "24 23 0:1 / /none rw - tmpfs  rw",
        rf"32 31 0:29 {root} {tmp_path}/the\040cpus rw,relatime - cgroup cgroup rw,cpu,cpuacct",
        rf"35 31 0:32 {root} {tmp_path}/version\0401 rw,relatime shared:2 - cgroup cgroup rw,memory",
        rf"41 31 0:38 {root} {tmp_path}/version\0402 rw,relatime - cgroup2 cgroup2 rw",
    ]
    (tmp_path / "self" / "mountinfo").write_text("\n".join(mounts) + "\n")
    for name, content in files.items():
        folder = tmp_path / ("version 1" if name.startswith("v1_") else "version 2")
        file = folder / name.removeprefix("v1_").replace("___", "/").replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return host_memory(tmp_path)


def test_the_flags_of_the_first_cpu(tmp_path: Path) -> None:
    cpu = "processor\t: {}\nvendor_id\t: A\nflags\t\t: fpu {}\nvmx flags\t: other\n\n"
    (tmp_path / "cpuinfo").write_text(cpu.format(0, "avx2 avx512_bf16") + cpu.format(1, "avx2"))
    assert cpu_flags(tmp_path) == {"fpu", "avx2", "avx512_bf16"}
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert cpu_flags(tmp_path / "arm") == cpu_flags(tmp_path / "none") == frozenset()


def test_page_cache_is_free(tmp_path: Path) -> None:
    assert host(tmp_path) == Memory("cpu", "CPU", 12 * GB, 16 * GB)


def test_a_container_limit_counts_with_its_page_cache_free(tmp_path: Path) -> None:
    """Active page cache too, as of a checkpoint that was read twice; what is to be written first is not free."""
    stat = f"anon 5\nactive_file {GB}\ninactive_file {GB}\nfile_dirty {GB // 4}\nfile_writeback {GB // 4}\n"
    found = host(tmp_path, memory__max=f"{4 * GB}\n", memory__current=f"{3 * GB}\n", memory__stat=stat)
    assert found == Memory("cpu", "CPU", 5 * GB // 2, 4 * GB)


def test_a_container_limit_of_version_1(tmp_path: Path) -> None:
    file = f"total_active_file {GB}\ntotal_inactive_file {GB}\n"
    found = host(
        tmp_path,
        V1.format("/"),
        v1_memory__limit_in_bytes=str(4 * GB),
        v1_memory__usage_in_bytes=str(3 * GB),
        v1_memory__stat=f"inactive_file 7\n{file}total_dirty {GB // 4}\ntotal_writeback {GB // 4}\n",
    )
    assert found == Memory("cpu", "CPU", 5 * GB // 2, 4 * GB)


NESTED = {
    "user__slice___job___memory__max": "max\n",
    "user__slice___job___memory__current": "1",
    "user__slice___job___memory__stat": "",
    "user__slice___memory__max": str(8 * GB),
    "user__slice___memory__current": str(7 * GB),
    "user__slice___memory__stat": "",
    "memory__max": str(6 * GB),
    "memory__current": str(GB),
    "memory__stat": "",
}


def test_the_smallest_limit_and_the_least_free_of_all_groups_above_count(tmp_path: Path) -> None:
    assert host(tmp_path, V2.format("/user.slice/job"), **NESTED) == Memory("cpu", "CPU", GB, 6 * GB)


def test_nested_groups_of_version_1(tmp_path: Path) -> None:
    limit = {"limit_in_bytes": str(2 * GB), "usage_in_bytes": str(GB), "stat": "total_active_file 0\n"}
    files = {f"v1_docker___one___memory__{name}": value for name, value in limit.items()}
    assert host(tmp_path, V1.format("/docker/one"), **files) == Memory("cpu", "CPU", GB, 2 * GB)


@pytest.mark.parametrize(
    ("group", "root"),
    [
        ("/docker/one/user.slice/job", "/docker/one"),  # the host's names, with only the container's part mounted
        ("/user.slice/job", "/"),
    ],
)
def test_a_group_is_looked_for_in_what_is_mounted(tmp_path: Path, group: str, root: str) -> None:
    assert host(tmp_path, V2.format(group), root, **NESTED) == Memory("cpu", "CPU", GB, 6 * GB)


@pytest.mark.parametrize("group", ["/../other", "/elsewhere"])
def test_of_a_group_outside_of_what_is_mounted_the_root_counts(tmp_path: Path, group: str) -> None:
    assert host(tmp_path, V2.format(group), "/docker", **NESTED) == Memory("cpu", "CPU", 5 * GB, 6 * GB)


def test_a_line_of_no_controller_of_memory_is_none(tmp_path: Path) -> None:
    assert host(tmp_path, "3:cpu,cpuacct:/\n", **NESTED) == Memory("cpu", "CPU", 12 * GB, 16 * GB)


@pytest.mark.parametrize("most", ["max", str(1 << 62)])
def test_no_limit_is_none(tmp_path: Path, most: str) -> None:
    found = host(tmp_path, memory__max=most, memory__current="1", memory__stat="inactive_file 1\n")
    assert found == Memory("cpu", "CPU", 12 * GB, 16 * GB)


def test_a_limit_beyond_what_is_free_does_not_add_to_it(tmp_path: Path) -> None:
    found = host(tmp_path, memory__max=str(15 * GB), memory__current="0", memory__stat="inactive_file 0\n")
    assert found == Memory("cpu", "CPU", 12 * GB, 15 * GB)


def test_without_those_files_the_system_is_asked(tmp_path: Path) -> None:
    found = host(tmp_path, meminfo="nothing of use\n")
    assert found
    assert 0 < found.free <= found.total
    assert abs(found.total - os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")) < GB


def test_this_machine() -> None:
    memory = host_memory()
    assert memory
    assert 0 < memory.free <= memory.total


@pytest.mark.gpu
def test_the_memory_of_this_gpu_is_what_torch_says() -> None:
    import torch

    memories = gpu_memories()
    assert nvidia_gpus() == len(memories) == torch.cuda.device_count()
    free, total = torch.cuda.mem_get_info(0)
    assert memories[0].device == "cuda"
    assert memories[0].name == torch.cuda.get_device_name(0)
    assert abs(memories[0].total - total) < 0.05 * total
    assert abs(memories[0].free - free) < 0.05 * total


# Three GPUs of NVML's interface, of which the third does not tell its memory.
_NVML = """
#include <stdio.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
static int open_count;
static char *gpus[] = {"GPU-aaaa-0", "GPU-bbbb-1", "GPU-cccc-2"};
int nvmlInit_v2(void) { open_count++; return 0; }
int nvmlShutdown(void) { open_count--; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return open_count == 1 ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **gpu) { if (i > 2) return 2; *gpu = &gpus[i]; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    for (int i = 0; i < 3; i++) if (!strcmp(uuid, gpus[i])) { *gpu = &gpus[i]; return 0; }
    return 6;
}
int nvmlDeviceGetUUID(void *gpu, char *uuid, unsigned size) { snprintf(uuid, size, "%s", *(char **)gpu); return 0; }
int nvmlDeviceGetName(void *gpu, char *name, unsigned n) { snprintf(name, n, "Card %s", *(char **)gpu); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *gpu, int *major, int *minor) {
    *major = 9 - ((char **)gpu - gpus); *minor = 5; return (char **)gpu - gpus == 2 ? 3 : 0;
}
int nvmlDeviceGetMemoryInfo(void *gpu, memory *info) {
    unsigned long long i = (char **)gpu - gpus;
    if (i == 2) return 3;
    info->total = (80ull + i) << 30; info->free = (70ull + i) << 30; info->used = 10ull << 30;
    return 0;
}
"""
_ASK = """
import json
from mistral_nb.hardware import compute_capability, gpu_memories, nvidia_gpus
first = [(each.device, each.name, each.free >> 30, each.total >> 30) for each in gpu_memories()]
print(json.dumps([nvidia_gpus(), first, compute_capability()]))
"""
A, B = ["cuda", "Card GPU-aaaa-0", 70, 80], ["cuda", "Card GPU-bbbb-1", 71, 81]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a library of the driver's name."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler here: a driver library cannot be made")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "nvml.c").write_text(_NVML)
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "nvml.c"], check=True)
    return folder


@pytest.mark.parametrize(
    ("visible", "count", "memories", "capability"),
    [
        (None, 3, [A, B], [9, 5]),
        ("1,0", 2, [B, A], [8, 5]),
        (" GPU-bbbb-1 ", 1, [B], [8, 5]),
        ("GPU-aa", 1, [A], [9, 5]),
        ("0,7,1", 1, [A], [9, 5]),
        ("0,GPU-none,1", 1, [A], [9, 5]),
        ("", 0, [], None),
        ("-1", 0, [], None),
        ("2", 1, [], None),
    ],
)
def test_gpus_by_the_driver(
    driver: Path, visible: str | None, count: int, memories: list[list[object]], capability: list[int] | None
) -> None:
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    env |= {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(ROOT)}
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run([sys.executable, "-c", _ASK], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [count, memories, capability]


def test_without_a_driver_there_is_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("no library")
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _ASK], env=env, capture_output=True, text=True, check=True)
    if json.loads(done.stdout) != [0, [], None]:
        pytest.skip("this machine has a driver, which is found all the same")


AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
IN_V2, IN_V1 = "0::/a/b\n", "3:cpu,cpuacct:/a/b\n4:memory:/\n"


@pytest.mark.parametrize(
    ("group", "files", "cpus"),
    [
        (IN_V2, {}, AFFINITY),
        (IN_V2, {"cpu.max": "max 100000\n"}, AFFINITY),
        (IN_V2, {"cpu.max": "100000 100000\n"}, 1),
        (IN_V2, {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        (IN_V2, {"a/b/cpu.max": "100000 100000\n"}, 1),
        (IN_V2, {"a/b/cpu.max": "99900000 100000\n"}, AFFINITY),
        (IN_V2, {"cpu.max": "nonsense\n"}, AFFINITY),
        (IN_V1, {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, AFFINITY),
        (IN_V1, {"a/b/cpu.cfs_quota_us": "100000\n", "a/b/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:memory:/\n", {"cpu.cfs_quota_us": "100000\n", "cpu.cfs_period_us": "100000\n"}, AFFINITY),
        ("", {"cpu.max": "100000 100000\n"}, AFFINITY),
    ],
)
def test_available_cpus(group: str, files: dict[str, str], cpus: int, tmp_path: Path) -> None:
    kind, options = ("cgroup2", "rw") if group == IN_V2 else ("cgroup", "rw,cpu,cpuacct")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(group)
    (tmp_path / "self" / "mountinfo").write_text(f"32 31 0:29 / {tmp_path} rw - {kind} {kind} {options}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == cpus
