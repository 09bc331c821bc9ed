"""`mistral-nb bench load`: the checkpoint that it makes, and what it reports of a small one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mistral_nb import bench_load
from mistral_nb.bench_load import conclusions, drop, make_checkpoint, run
from mistral_nb.bench_report import Measurement
from mistral_nb.checkpoints import open_checkpoint
from mistral_nb.cli import main
from mistral_nb.errors import ConfigurationError

SMALL = {"_DIM": 256, "_HIDDEN": 512, "_HEADS": 4, "_KV_HEADS": 2, "_HEAD_DIM": 64, "_VOCABULARY": 512}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 1.2 MB, and shards of four of them."""
    for name, value in {**SMALL, "SHARD": 5_000_000}.items():
        monkeypatch.setattr(bench_load, name, value)


def test_the_checkpoint_is_whole_and_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    size = make_checkpoint(tmp_path / "made", 9_000_000)
    checkpoint = open_checkpoint(tmp_path / "made")
    assert checkpoint.bytes == size
    assert abs(size - 9_000_000) < 1_200_000
    assert len(checkpoint.files) == 2 + 2, "config, index, two shards"


def test_every_reading_and_loading_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each loading in a process of its own, of which int8's stand for int4's."""
    monkeypatch.setattr(bench_load, "PRECISIONS", ("bf16", "int8"))
    monkeypatch.setattr(bench_load, "PACKED", ("int8",))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    report = tmp_path / "load.json"
    assert run(0.009, 1, report, tmp_path) == 0
    printed = capsys.readouterr().out
    found = json.loads(report.read_text())
    speeds = {each["name"]: each["median"] for each in found["measurements"]}
    assert {"read, 1 thread, cached", "load as bf16, cached", "load as int8, cached"} <= set(speeds)
    assert "load as int8, packed copy, cached" in speeds or "Not every packed copy is measured" in printed
    assert all(speed > 0 for speed in speeds.values())
    assert re.search(r"^load as bf16, cached: (holds|misses) its bar; \d+% of ", printed, re.MULTILINE)
    from_disk = "load as bf16, from disk" in speeds
    assert from_disk != ("Nothing is measured from disk: " in printed)
    assert "% of read, 1 thread, cached" in printed


@pytest.mark.parametrize(("loading", "word"), [(7.0, "holds"), (6.9, "misses")])
@pytest.mark.parametrize("place", ["cached", "from disk"])
def test_loading_as_bf16_is_held_against_one_thread_that_reads_from_the_same_place(
    place: str, loading: float, word: str
) -> None:
    other = "from disk" if place == "cached" else "cached"
    values = {
        f"read, 1 thread, {place}": 10.0,
        f"read, 1 thread, {other}": 1.0,
        f"read, 2 threads, {place}": 90.0,
        f"load as bf16, {place}": loading,
    }
    measured = [Measurement.of(name, "GB/s", [value], "") for name, value in values.items()]
    [line] = conclusions(measured, {}, 1)
    assert line.startswith(f"load as bf16, {place}: {word} its bar; {loading / 10:.0%} of read, 1 thread, {place}; ")


def test_files_in_memory_cannot_be_dropped_from_there(tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or not os.access(memory, os.W_OK):
        pytest.skip("no folder is known here that is in memory")
    with tempfile.NamedTemporaryFile(dir=memory) as file:
        file.write(bytes(1 << 20))
        file.flush()
        assert not drop([Path(file.name)])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked to forget files")
def test_files_on_a_disk_can(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(1 << 20))
        os.fsync(file.fileno())
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout
    if not kind.startswith(("ext", "xfs", "btrfs")):
        pytest.skip(f"temporary files are on {kind.strip() or 'something'}, of which nothing is known")
    assert drop([path])


def test_a_folder_without_room_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigurationError, match=rf"{tmp_path} has .* free, .* takes 1000000000\.0 GB; give --folder"):
        run(1e9, 1, folder=tmp_path)
    assert main(["bench", "load", "--size-gb", "0.25", "--runs", "1", "--folder", str(tmp_path / "none")]) == 1
    assert "No such file or directory); give --folder another folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
