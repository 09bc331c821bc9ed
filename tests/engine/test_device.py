"""How many CPUs the engine takes, by the files that a container's limits stand in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mistral_nb.engine.device import available_cpus, choose_device, choose_precision, free_memory
from mistral_nb.errors import ConfigurationError

AFFINITY = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, AFFINITY),
        ({"cpu.max": "max 100000\n"}, AFFINITY),
        ({"cpu.max": "100000 100000\n"}, 1),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "99900000 100000\n"}, AFFINITY),
        ({"cpu.max": "nonsense\n"}, AFFINITY),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, AFFINITY),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
    ],
)
def test_available_cpus(files: dict[str, str], cpus: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(tmp_path) == cpus


def test_choices_on_the_cpu() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_precision("auto", cpu) == "int8"
    assert choose_precision("fp32", cpu) == "fp32"
    with pytest.raises(ConfigurationError, match="int8 runs on the CPU only"):
        choose_precision("int8", torch.device("cuda"))
    free = free_memory(cpu)
    assert free is None or free > 1 << 20
