"""Breaks the kernels one line at a time and runs their tests: every mutant has to turn one red.

`make mutants` copies the kernels and their tests to folders of their own and changes one place there; with module names
(`make mutants ARGS="rope.py tiles.py"`) only in those. A mutant that survives, or whose line is not in the source once,
ends the run with 1.
"""

from __future__ import annotations

import concurrent.futures
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.kernels.mutations import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = Path("kernels/mistral_nb_kernels")
PATIENCE = 180
"""Seconds for one file of tests, which takes 10 to 30."""


def outcome(folder: Path, tests: str) -> int | None:
    """pytest's exit status: 0 green, 1 red, negative where the mutant killed it; None: twice it did not end."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/kernels/{tests}"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    for patience in (PATIENCE, 2 * PATIENCE):
        try:
            return subprocess.run(
                command, cwd=folder, capture_output=True, timeout=patience, env=environment
            ).returncode
        except subprocess.TimeoutExpired:
            continue
    return None


def complaint(mutant: Mutant, folder: Path) -> str:
    """What is wrong with the tests, in words; empty where one turns red, or where what is broken ends no more."""
    path = folder / PACKAGE / mutant.module
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return f"its line is in the source {source.count(mutant.old)} times, not once"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        status = outcome(folder, mutant.tests)
    finally:
        path.write_text(source)
    if status is None or status == 1 or status < 0:
        return ""
    return "no test turned red" if status == 0 else f"pytest ended with {status}"


def copied(folder: Path) -> Path:
    """`folder` with the kernels and their tests in it."""
    for part in (PACKAGE, Path("tests/kernels")):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / part, folder / part)
    return folder


def main(modules: list[str]) -> int:
    mutants = [mutant for mutant in MUTANTS if not modules or mutant.module in modules]
    workers = os.cpu_count() or 1
    with (
        tempfile.TemporaryDirectory(prefix="mutants-") as name,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for index in range(workers):
            folders.put(copied(Path(name) / str(index)))

        def judged(mutant: Mutant) -> bool:
            folder = folders.get()
            wrong = complaint(mutant, folder)
            folders.put(folder)
            verdict = f"ALIVE ({wrong})" if wrong else "red"
            print(f"{verdict}  {mutant.module}: {mutant.what}", flush=True)
            return not wrong

        def green(tests: str) -> bool:
            folder = folders.get()
            status = outcome(folder, tests)
            folders.put(folder)
            if status:
                print(f"{tests} is not green before anything is broken: run it by itself first")
            return status == 0

        if not all(pool.map(green, sorted({mutant.tests for mutant in mutants}))):
            return 1
        red = sum(pool.map(judged, mutants))
    print(f"{red} of {len(mutants)} mutants turned a test red")
    return int(red < len(mutants))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
