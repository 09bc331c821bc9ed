"""Autotuned candidates where there is no GPU: under the interpreter their configs take turns, and each is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.candidates import AUTOTUNED

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent.parent


def told(text: str) -> tuple[int, list[str], list[str]]:
    """The exit status, notes and failures of the command: what interprets everything is not for this process."""
    command = [sys.executable, "-m", "mistral_nb_kernels.bench", "candidate", "swiglu", "-", "--device", "cpu"]
    path = os.pathsep.join(filter(None, (str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, "--dtype", "fp16", "--events"],
        input=text,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    events: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = ("note", "failure")
    notes, failures = ([event["text"] for event in events if event["event"] == kind] for kind in kinds)
    return done.returncode, notes, failures


def test_configs_take_turns() -> None:
    status, notes, failures = told(AUTOTUNED)
    assert (status, failures) == (0, [])
    [tuned] = [note for note in notes if "autotuned" in note]
    assert tuned.startswith("_swiglu is autotuned: 2 configs took turns, the last was BLOCK: ")


def test_a_config_that_is_wrong_is_told() -> None:
    """A grid for the larger tile: the smaller leaves something out where there is more than one."""
    status, notes, [failure] = told(AUTOTUNED.replace("meta['BLOCK']", "1024"))
    assert status == 1
    assert "NaN is in the memory" in failure
    [tuned] = [note for note in notes if "autotuned" in note]
    assert "the last was BLOCK: 512, num_warps: 4" in tuned
