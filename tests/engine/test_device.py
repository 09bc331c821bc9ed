"""How many CPUs the engine takes, by the files that a container's limits stand in."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from mistral_nb.checkpoints import ModelArgs
from mistral_nb.engine.device import available_cpus, choose_device, choose_precision, free_memory
from mistral_nb.errors import ConfigurationError

ARGS = ModelArgs(4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e6, 32768)
AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


V2, V1 = "0::/a/b\n", "3:cpu,cpuacct:/a/b\n4:memory:/\n"


@pytest.mark.parametrize(
    ("group", "files", "cpus"),
    [
        (V2, {}, AFFINITY),
        (V2, {"cpu.max": "max 100000\n"}, AFFINITY),
        (V2, {"cpu.max": "100000 100000\n"}, 1),
        (V2, {"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        (V2, {"a/b/cpu.max": "100000 100000\n"}, 1),
        (V2, {"a/b/cpu.max": "99900000 100000\n"}, AFFINITY),
        (V2, {"cpu.max": "nonsense\n"}, AFFINITY),
        (V1, {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, AFFINITY),
        (V1, {"a/b/cpu.cfs_quota_us": "100000\n", "a/b/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:memory:/\n", {"cpu.cfs_quota_us": "100000\n", "cpu.cfs_period_us": "100000\n"}, AFFINITY),
        ("", {"cpu.max": "100000 100000\n"}, AFFINITY),
    ],
)
def test_available_cpus(group: str, files: dict[str, str], cpus: int, tmp_path: Path) -> None:
    kind, options = ("cgroup2", "rw") if group == V2 else ("cgroup", "rw,cpu,cpuacct")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text(group)
    (tmp_path / "self" / "mountinfo").write_text(f"32 31 0:29 / {tmp_path} rw - {kind} {kind} {options}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == cpus


def test_choices_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_precision("auto", cpu, ARGS) == "int8"
    assert choose_precision("auto", cpu, dataclasses.replace(ARGS, hidden_dim=1000)) == "bf16"
    assert choose_precision("fp32", cpu, ARGS) == "fp32"
    with pytest.raises(ConfigurationError, match="int8 runs on the CPU only"):
        choose_precision("int8", torch.device("cuda"), ARGS)
    free = free_memory(cpu)
    assert free is None or free > 1 << 20
