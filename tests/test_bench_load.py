"""`mistral-nb bench load`: the checkpoint that it makes, and what it reports of a small one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mistral_nb.bench_load import make_checkpoint
from mistral_nb.checkpoints import open_checkpoint


def test_the_checkpoint_is_whole_and_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    size = make_checkpoint(tmp_path / "made", 700_000_000)
    checkpoint = open_checkpoint(tmp_path / "made")
    assert checkpoint.bytes == size
    assert abs(size - 700_000_000) < 80_000_000
    assert len(checkpoint.files) == 2 + 2, "config, index, two shards"


def test_every_reading_and_loading_is_reported(tmp_path: Path) -> None:
    report = tmp_path / "load.json"
    command = [sys.executable, "-m", "mistral_nb", "bench", "load", "--size-gb", "0.4", "--runs", "1"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([*command, "--json", str(report)], capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    speeds = {each["name"]: each["median"] for each in found["measurements"]}
    assert {"read, 1 thread, cached", "load as bf16, cached", "load as int8, cached"} <= set(speeds)
    assert all(speed > 0 for speed in speeds.values())
    assert "load as bf16, cached: " in done.stdout
    assert "% of read, 1 thread, cached" in done.stdout
