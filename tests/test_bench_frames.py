"""`mistral-nb bench frames`: what it reports of a few frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mistral_nb import bench_frames


def test_both_kinds_of_body_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "frames.json"
    assert bench_frames.run(runs=3, path=report, frames=20_000) == 0
    found = json.loads(report.read_text())
    assert found["frames"] == 20_000
    assert {item["name"]: item["runs"] for item in found["measurements"]} == {
        "own HTTP chunks, processor's time": 3,
        "own HTTP chunks, clock": 3,
        "one body, processor's time": 3,
        "one body, clock": 3,
    }
    busy = [item["median"] for item in found["measurements"] if "processor" in item["name"]]
    assert min(busy) > 0
    assert "one core" in capsys.readouterr().out
