"""The GPU part `bench` on the CPU: a small sweep by the same commands, and every test of the part.

A GPU's time is not for its slips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from mistral_nb_kernels.bench import record as records
from tests.gpu import test_bench as gpu

PLAIN = """
import torch

def swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    y = torch.nn.functional.silu(gate) * up
    return y
"""
OFF_BY_ONE = PLAIN.replace("    return y", "    y[..., -1] = 0\n    return y")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gpu.Sweep]:
    """Two subjects, by what a CPU has. Its rows become ours, of which a CPU has none."""
    with pytest.MonkeyPatch.context() as patch:
        small = ("norm", "swiglu", "--batch", "1", "--providers", "eager")
        values: dict[str, Any] = {"DEVICE": "cpu", "TIMER": "wall", "SWEEP": small, "AGAIN": small, "RIGHT": PLAIN}
        values |= {
            "RESULTS": tmp_path_factory.mktemp("results"),
            "WRONG": {"mask": OFF_BY_ONE, "cache": gpu.cached(PLAIN)},
        }
        for name, value in values.items():
            patch.setattr(gpu, name, value)
        yield gpu.swept(tmp_path_factory.mktemp("bench"))


def test_results_are_kept(sweep: gpu.Sweep) -> None:
    [kept] = gpu.RESULTS.rglob("bench.json")
    assert kept.read_bytes() == sweep.path.read_bytes()
    assert {path.suffix for path in (kept.parent / "bench").iterdir()} == {".png"}


def test_every_test_of_the_part_runs(sweep: gpu.Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A CPU's times are not what is tested here: they get steady, and long."""
    gpu.test_everything_is_measured_in_eight_minutes(sweep, capsys)
    gpu.test_the_figures_show_the_record(sweep)
    rows = tuple(replace(row, us=1e6, p20=1e6, p80=1e6, timer="wall") for row in sweep.record.rows)
    ours = replace(sweep.record, rows=tuple(replace(row, provider="ours") for row in rows))
    gpu.test_ours_is_timed_in_graphs_and_no_faster_than_memory(replace(sweep, record=ours))
    steady = replace(sweep, path=tmp_path / "steady.json", record=replace(sweep.record, rows=rows))
    records.write(steady.record, steady.path)
    gpu.test_what_is_slower_by_a_tenth_is_told(steady, tmp_path)
    gpu.test_a_second_run_is_no_slower(steady)


@pytest.mark.usefixtures("sweep")
def test_candidates_are_told_apart() -> None:
    gpu.test_a_right_candidate_is_timed_beside_ours()
    for name in gpu.WRONG:
        gpu.test_a_wrong_candidate_is_refused(name)
