"""What every benchmark reports: medians with their spread, and the machine, versions and revision that they are of."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mistral_nb.errors import ConfigurationError
from mistral_nb.hardware import available_cpus

__all__ = ["Measurement", "Quiet", "check_writable", "machine", "print_table", "write_report"]

PACKAGES = ("mistral-nb", "torch", "triton", "tokenizers", "safetensors", "numpy", "httpx")


@dataclass(frozen=True, slots=True)
class Measurement:
    """The median and the 20th and 80th percentile of `runs` measurements, in `unit`; `bar` is what is aimed at."""

    name: str
    unit: str
    median: float
    p20: float
    p80: float
    runs: int
    bar: str

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[float], bar: str) -> Measurement:
        cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
        return cls(name, unit, statistics.median(values), cuts[0], cuts[3], len(values), bar)

    def __str__(self) -> str:
        spread = f"{self.p20:.4g}..{self.p80:.4g}"
        return f"{self.name:<38} {self.median:>8.4g} {self.unit:<9} {spread:<16} {self.runs:>4}   {self.bar}"


def print_table(measurements: Sequence[Measurement]) -> None:
    print(f"{'':<38} {'median':>8} {'':<9} {'p20..p80':<16} runs   bar")
    print("\n".join(map(str, measurements)))


def write_report(report: Mapping[str, Any], measurements: Sequence[Any], path: Path | None) -> None:
    """`report` with the measurements, dataclasses, as JSON, to `path` or else to stdout."""
    text = json.dumps({**report, "measurements": [asdict(item) for item in measurements]}, indent=2)
    if path is None:
        print(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def check_writable(path: Path) -> None:
    """`ConfigurationError` unless a file can be written there. Leaves no new file."""
    try:
        with tempfile.TemporaryFile(dir=path.parent), path.open("ab") if path.exists() else nullcontext():
            return
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror or error}); give --json another file"
        ) from error


def machine() -> dict[str, Any]:
    """What a number needs beside it: command, versions and processor."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["mistral-nb", *sys.argv[1:]]),
        "platform": platform.platform(),
        "cpu": processor(),
        "cores": available_cpus(),
        "versions": versions,
        "revision": revision(),
    }


class Quiet:
    """How much of this machine's CPUs others take while something is measured."""

    def __init__(self) -> None:
        self._began = _busy()

    def taken_by_others(self) -> float | None:
        """Share of all CPUs since the making, that neither this process nor those that it has waited for took; None
        where the system does not tell.
        """
        if self._began is None or (now := _busy()) is None:
            return None
        wall, everybody, own = (end - start for start, end in zip(self._began, now, strict=True))
        return max(0.0, everybody - own) / (wall * (os.cpu_count() or 1))


def _busy() -> tuple[float, float, float] | None:
    """Seconds: by the clock, of all CPUs' work since the start, and of that this process's and its ended children's."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    fields = [int(field) for field in stat.read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), everybody, sum(os.times()[:4])


def revision() -> str | None:
    """The git revision of a checkout, with "+" where files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
