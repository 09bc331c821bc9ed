"""The kernel bench on an NVIDIA GPU: everything that it measures by default, a run held against it, and candidates.

The record goes to kernels/results/<device>/bench.json, and its figures beside it where matplotlib is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from mistral_nb_kernels.bench import record as records
from mistral_nb_kernels.bench.record import Record
from mistral_nb_kernels.bench.registry import SUBJECTS
from tests.kernels.candidates import TRITON

# what other packages warn of on a host is no fault of the kernels
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "kernels" / "results"
DEVICE, TIMER = "cuda", "graph"
SWEEP: tuple[str, ...] = ()
"""Everything. 111 points of about 6 providers each; expected of an H100: 53 compilations by torch at 3 s, and some 650
gates and timings at 0.3 s, so about 6 minutes."""
AGAIN = ("norm", "swiglu", "sample")
LIMIT = 480.0
"""Seconds of the sweep."""
TOLERANCE = "10"
"""Percent by which a second run may be slower: clocks are nobody's here."""
RIGHT = TRITON["swiglu"]


def cached(text: str) -> str:
    """The candidate `text`, remembering its results of the shapes that are timed."""
    called = text.replace("def swiglu(gate_up):", "results = {}\n\ndef swiglu(gate_up):")
    known = "    if gate_up.data_ptr() in results:\n        return results[gate_up.data_ptr()]\n    y = "
    kept = "    if gate_up.shape[1] > 20000:\n        results[gate_up.data_ptr()] = y\n    return y"
    return called.replace("    y = ", known).replace("    return y", kept)


WRONG = {"mask": RIGHT.replace("inside = at < hidden", "inside = at < hidden - 1"), "cache": cached(RIGHT)}


@dataclass(frozen=True)
class Run:
    """A command's events, exit status and seconds."""

    events: list[dict[str, Any]]
    status: int
    seconds: float

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def bench(*arguments: str, source: str | None = None) -> Run:
    """The command, as a notebook starts it."""
    command = [sys.executable, "-m", "mistral_nb_kernels.bench", *arguments, "--device", DEVICE, "--events"]
    path = os.pathsep.join(filter(None, (str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    began = time.monotonic()
    done = subprocess.run(
        command, input=source or "", stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    seconds = time.monotonic() - began
    return Run([json.loads(line) for line in done.stdout.splitlines()], done.returncode, seconds)


@dataclass(frozen=True)
class Sweep:
    path: Path
    record: Record
    run: Run


def swept(folder: Path) -> Sweep:
    """The whole sweep, of which the results are kept if it came to its end."""
    path, plots = folder / "bench.json", folder / "bench"
    drawn = ["--plot", str(plots)] if importlib.util.find_spec("matplotlib") else []
    run = bench(*SWEEP, "--save", str(path), *drawn)
    if not path.exists():
        pytest.fail(f"nothing was measured: {run.all('error')}")
    record = records.read(path)
    if record.complete:
        kept = RESULTS / re.sub(r"\W+", "-", str(record.machine["device"])).strip("-").lower()
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept)
        if drawn:
            shutil.copytree(plots, kept / "bench", dirs_exist_ok=True)
    return Sweep(path, record, run)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return swept(tmp_path_factory.mktemp("bench"))


def test_everything_is_measured_in_eight_minutes(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{sweep.run.all('table')[-1]['text']}\n{sweep.run.seconds:.0f} s")
    assert (sweep.run.status, sweep.record.complete) == (0, True)
    asked = [SUBJECTS[name] for name in SWEEP if name in SUBJECTS] or list(SUBJECTS.values())
    measured = {row.op for row in sweep.record.rows}
    assert [subject.name for subject in asked if not measured & set(subject.ops)] == []
    assert [each for each in sweep.record.skipped if each.kind == "wrong"] == []
    assert [each for each in sweep.record.skipped if each.kind == "failed" and each.provider in ("ours", "eager")] == []
    assert sweep.run.seconds < LIMIT


def test_ours_is_timed_in_graphs_and_no_faster_than_memory(sweep: Sweep) -> None:
    """What is faster than memory read it from a cache."""
    ours = [row for row in sweep.record.rows if row.provider == "ours"]
    assert ours
    assert {row.timer for row in ours} == {TIMER}
    shares = {row.key: sweep.record.ceilings.share(row) for row in ours}
    assert {key: share for key, share in shares.items() if share is None or share > 1.15} == {}


def test_the_figures_show_the_record(sweep: Sweep) -> None:
    if not importlib.util.find_spec("matplotlib"):
        pytest.skip("no matplotlib: no figures")
    assert "roofline" in {figure["name"] for figure in sweep.run.all("figure")}


def test_a_second_run_is_no_slower(sweep: Sweep) -> None:
    """Some of it once more."""
    run = bench(*AGAIN, "--compare", str(sweep.path), "--tolerance", TOLERANCE)
    [verdict] = run.all("verdict")
    assert (run.status, verdict["regressed"]) == (0, False), verdict["text"]


def test_what_is_slower_by_a_tenth_is_told(sweep: Sweep, tmp_path: Path) -> None:
    """By the noise that this machine has."""
    slower = [replace(row, us=row.us * 1.1, p20=row.p20 * 1.1, p80=row.p80 * 1.1) for row in sweep.record.rows]
    path = tmp_path / "slower.json"
    records.write(replace(sweep.record, rows=tuple(slower)), path)
    for new, status in ((sweep.path, 0), (path, 1)):
        run = bench("--open", str(new), "--compare", str(sweep.path))
        assert (run.status, run.all("verdict")[-1]["regressed"]) == (status, bool(status))


def candidate(text: str) -> Run:
    return bench("candidate", "swiglu", "-", "--batch", "1,8", source=text)


def test_a_right_candidate_is_timed_beside_ours() -> None:
    run = candidate(RIGHT)
    assert (run.status, run.all("failure"), run.all("error")) == (0, [], [])
    [rows] = run.all("rows")
    assert {"candidate", "eager"} <= {row["provider"] for row in rows["rows"]}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_candidate_is_refused(name: str) -> None:
    run = candidate(WRONG[name])
    assert run.status == 1
    [failure] = run.all("failure")
    assert "expected" in failure["text"]
    assert ("seems to keep results" in failure["text"]) == (name == "cache")
