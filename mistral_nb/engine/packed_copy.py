"""A packed copy of a model: its int8 or int4 matrices as the engine has them in memory, so that they are read as such.

One safetensors file for each precision and way of laying it out, in a folder of its own beside the checkpoint. It holds
what was converted; what was not is read from the checkpoint as before. Its metadata tell what it was made of and for,
and one that was made of or for anything else is as good as none. It is written once the engine serves, in the
background: a little at a time while anybody waits for tokens, under another name until it is whole, and not at all
where the disk is short of room.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mistral_nb.checkpoints.checkpoint import Checkpoint, TensorInfo
from mistral_nb.checkpoints.header import RawTensor, read_header, read_metadata
from mistral_nb.checkpoints.memory import Precision, int4_group
from mistral_nb.checkpoints.untrusted import readable
from mistral_nb.engine.device import device_kind, side_stream
from mistral_nb.engine.model import Weights
from mistral_nb.engine.reading import DTYPES, ReadError
from mistral_nb.errors import ModelError
from mistral_nb_kernels.packed import Dense, Int8Cpu, Weight

__all__ = ["CopyFolder", "CopyWriter", "PackedCopy", "copy_folder", "packed_tensors"]

log = logging.getLogger(__name__)

FORMAT = "1"
"""Of the file and of how weights are quantised: another one for every change of either."""

MARGIN = 2_000_000_000
"""Bytes of the disk that a copy leaves free."""

PIECE = 1 << 22
"""Bytes that are written at a time."""

SYNCED = 1 << 26
"""Bytes after which it is waited until they are on the disk: at 200 MB/s a third of a second, for all that is left to
wait for when the copy is to stop, or whole.
"""

DELAY = 5.0
"""Seconds after loading that the first answer has to itself."""

BUSY_SHARE = 0.1
"""Share of the time that writing takes while the engine computes."""

ABANDONED = 86_400.0
"""Seconds after which an unfinished copy is nobody's, where no lock tells."""

_UNFINISHED = ".part"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class PackedCopy:
    """A copy that is of this model, and what is in it."""

    path: Path
    _tensors: dict[str, RawTensor]

    def find(self, name: str, place: Tensor) -> TensorInfo:
        """Where the tensor lies that goes to `place`. `ReadError` for one that would not fit there."""
        found, dtype = self._tensors.get(name), _NAMES[place.dtype]
        if found is None or (found.dtype, found.shape) != (dtype, tuple(place.shape)):
            raise ReadError(self.path, f"{self.path} lacks the tensor {name} as it should be")
        return TensorInfo(dtype, found.shape, self.path, found.start, found.end)

    def remove(self) -> None:
        """So that it is made again."""
        _remove(self.path)


def packed_tensors(key: str, matrix: Weight) -> list[tuple[str, Tensor]]:
    """The tensors of a matrix by their names in a copy; none for one that was not converted."""
    if isinstance(matrix, Dense):
        return []
    if isinstance(matrix, Int8Cpu):
        matrix = matrix.plain
    parts = ((f"{key}.{field.name}", getattr(matrix, field.name)) for field in fields(matrix))
    return [(name, part) for name, part in parts if isinstance(part, Tensor)]


class CopyFolder:
    """Where the copies of one checkpoint are, and what the one for a precision and a device must tell of itself.

    Copies that lie in different ways are side by side: those for GPUs and for the instructions of processors.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, precision: Precision, device: torch.device) -> None:
        self.folder = folder
        layout = _layout(device) if precision == "int4" else ""
        self.path = folder / f"{'-'.join(filter(None, (precision, layout)))}.safetensors"
        self.metadata = _metadata(checkpoint, precision, device)

    def open(self) -> PackedCopy | None:
        """The copy, if there is one that is as it should be. Another one goes; the log tells why."""
        if not self.path.is_file():
            return None
        try:
            found = read_metadata(self.path)
            wrong = [name for name in self.metadata if found.get(name) != self.metadata[name]]
            if not wrong:
                return PackedCopy(self.path, read_header(self.path))
            log.info("the packed copy %s is of another %s; it is made again", self.path, ", ".join(wrong))
        except ModelError as error:
            log.warning("the packed copy cannot be used: %s; it is made again", error)
        _remove(self.path)
        return None

    def write(self, weights: Weights, busy: Callable[[], bool]) -> CopyWriter | None:
        """Begin to write a copy of `weights` where there is none."""
        return None if self.path.exists() else CopyWriter(weights, self, busy)


def copy_folder(
    folder: Path | None, checkpoint: Checkpoint, precision: Precision, device: torch.device
) -> CopyFolder | None:
    """Where copies are, if there is a folder for them and the precision is one that weights are converted to. What
    writers that were killed left in the folder goes.
    """
    if folder is None:
        return None
    _clear(folder)
    if precision not in ("int8", "int4"):
        return None
    return CopyFolder(folder, checkpoint, precision, device)


class CopyWriter:
    """Writes a copy of `weights` in a thread of its own, of the lowest priority.

    `busy` says whether the engine computes. Nothing is raised: the log tells what went wrong.
    """

    def __init__(self, weights: Weights, place: CopyFolder, busy: Callable[[], bool]) -> None:
        self._weights: Weights | None = weights
        self._place = place
        self._busy = busy
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mistral-nb packed copy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give up what is not written, and let the weights go."""
        self._stopped.set()
        self._thread.join()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            if not self._stopped.wait(DELAY):
                self._write()
        except (OSError, RuntimeError) as error:
            log.warning("no packed copy was written: %s", str(error).partition("\n")[0])
        finally:
            self._weights = None

    def _write(self) -> None:
        assert self._weights is not None
        path, folder = self._place.path, self._place.folder
        tensors = list(_tensors_of(self._weights))
        head = _head(self._place.metadata, tensors)
        size = len(head) + sum(_bytes(tensor) for _, tensor in tensors)
        folder.mkdir(exist_ok=True)
        if path.exists() or any(folder.glob(f"{path.name}.*{_UNFINISHED}")):
            log.info("no packed copy is written: another engine is writing %s, or has", path)
            return
        room = shutil.disk_usage(folder).free
        if room < size + MARGIN:
            log.info("no packed copy is written: it takes %.2f GB of the %.2f that are free", size / 1e9, room / 1e9)
            return
        _lowest_priority()
        began = time.monotonic()
        unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_UNFINISHED}")
        try:
            with unfinished.open("xb") as file:
                if _lock(file) is False or not self._write_to(file, head, tensors):
                    return
            unfinished.replace(path)
        finally:
            _remove(unfinished)
        log.info("wrote the packed copy %s: %.2f GB in %.1f s", path, size / 1e9, time.monotonic() - began)

    def _write_to(self, file: BinaryIO, head: bytes, tensors: Sequence[tuple[str, Tensor]]) -> bool:
        """Whether all was written, and is on the disk, before it was to stop."""
        unsynced = file.write(head)
        with _own_stream(tensors[0][1].device):
            for piece in _pieces(tensors):
                began = time.monotonic()
                unsynced += file.write(piece.cpu().numpy().data)
                if unsynced >= SYNCED:
                    _sync(file)
                    unsynced = 0
                took = time.monotonic() - began
                if self._stopped.wait(took * (1 / BUSY_SHARE - 1) if self._busy() else 0):
                    return False
        _sync(file)
        return True


def _tensors_of(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    for index, layer in enumerate(weights.layers):
        for name in ("wqkv", "wo", "w13", "w2"):
            yield from packed_tensors(f"layers.{index}.{name}", getattr(layer, name))
    yield from packed_tensors("output", weights.output)


def _pieces(tensors: Sequence[tuple[str, Tensor]]) -> Iterator[Tensor]:
    for _, tensor in tensors:
        flat = tensor.view(-1).view(torch.uint8)
        yield from (flat[start : start + PIECE] for start in range(0, len(flat), PIECE))


def _head(metadata: dict[str, str], tensors: Sequence[tuple[str, Tensor]]) -> bytes:
    """Of a safetensors file, padded so that the tensors begin at a multiple of 64 bytes."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + _bytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


def _layout(device: torch.device) -> str:
    """Of int4: torch packs it for the instructions of the processor."""
    kind = device_kind(device)
    return kind if kind == "cuda" else f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}"


def _metadata(checkpoint: Checkpoint, precision: Precision, device: torch.device) -> dict[str, str]:
    """What a copy is made of and for: all that its bytes depend on."""
    metadata = {"format": FORMAT, "precision": precision, "checkpoint": _fingerprint(checkpoint)}
    if precision == "int4":
        kind = device_kind(device)
        metadata |= {"group": str(int4_group(checkpoint.args, kind)), "layout": _layout(device)}
        if kind == "cpu":
            metadata["torch"] = torch.__version__  # whose order is its own, and may change
    return metadata


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Of the names, sizes and times of change of the checkpoint's files."""
    with readable(checkpoint.folder):
        status = [(path.name, path.stat()) for path in checkpoint.files]
    told = [[name, each.st_size, each.st_mtime_ns] for name, each in status]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _clear(folder: Path) -> None:
    """Remove what writers that were killed left of their copies: the system has taken their locks from them. On a disk
    that knows no locks, what nobody has written to for a day.
    """
    for unfinished in folder.glob(f"*{_UNFINISHED}"):
        with suppress(OSError):
            with unfinished.open("r+b") as file:
                abandoned = _lock(file)
            if abandoned is None:
                abandoned = time.time() - unfinished.stat().st_mtime > ABANDONED
            if abandoned:
                _remove(unfinished)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _lowest_priority() -> None:
    """Of this thread alone, where the system has such; its disk's priority goes with it."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


@contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """A GPU's steps do not wait for copies on another stream."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(side_stream(device)):
        yield


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


if sys.platform == "win32":

    def _lock(file: BinaryIO) -> bool | None:
        """What anybody has open cannot be removed there."""
        return True

else:
    import fcntl

    def _lock(file: BinaryIO) -> bool | None:
        """Hold the file until it is closed; False where another does, None on a disk that knows no locks."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True
