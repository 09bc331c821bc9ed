"""What the tests on a GPU share: NVIDIA's sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def sanitize() -> Callable[[str], None]:
    """Runs a program under compute-sanitizer, which is to find nothing.

    With torch's own cache of memory off, so that every tensor has bounds. What torch asks the driver for in vain, as it
    does of newer functions, is no fault of the kernels.
    """

    def run(program: str) -> None:
        sanitizer = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
        if sanitizer is None:
            pytest.skip("no compute-sanitizer on the PATH or in /usr/local/cuda/bin")
        result = subprocess.run(
            [sanitizer, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": str(ROOT / "kernels")},
        )
        said = result.stdout[-2000:] + result.stderr[-2000:]
        summary = re.search(r"ERROR SUMMARY: (\d+) error", result.stdout)
        if summary is None:
            pytest.skip(f"compute-sanitizer cannot run here: {said}")
        assert (summary[1], result.returncode) == ("0", 0), said

    return run
