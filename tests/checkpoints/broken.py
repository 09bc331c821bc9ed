"""A checkpoint that is broken in one way, with what must be said of it; and the tools to break one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"
PAYLOAD = b"cos\nsystem\n(S'touch PAYLOAD_RAN'\ntR."
LONG_AGO = 1_600_000_000


@dataclass(frozen=True)
class Broken:
    """`make` makes the whole checkpoint that `spoil` spoils; the message says `says` and names `names`."""

    name: str
    make: Callable[[Path], Path]
    spoil: Callable[[Path], object]
    says: str
    names: str

    def build(self, folder: Path) -> Path:
        """Files are as if written long ago, but for a case that is about fresh ones."""
        self.make(folder)
        self.spoil(folder)
        for path in folder.iterdir():
            if path.is_file() and not path.is_symlink() and "fresh" not in self.name:
                os.utime(path, (LONG_AGO, LONG_AGO))
        return folder


Spoil = Callable[[Path], object]


def collector(table: list[Broken]) -> Callable[..., Callable[[Spoil], None]]:
    """A decorator `(name, says, names, make)` that puts the function under it into `table`."""

    def broken(
        name: str, says: str, names: str = WEIGHTS, make: Callable[[Path], Path] = tiny.hugging_face
    ) -> Callable[[Spoil], None]:
        def put(spoil: Spoil) -> None:
            table.append(Broken(name, make, spoil, says, names))

        return put

    return broken


def shorten(path: Path, size: int) -> None:
    os.truncate(path, size)


def change_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def replace_tensor(path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Write the file anew with one tensor changed, or added."""
    path.write_bytes(tiny.safetensors({**tensors_but(path, name), name: (dtype, shape)}))


def drop_tensor(path: Path, name: str) -> None:
    path.write_bytes(tiny.safetensors(tensors_but(path, name)))


def tensors_but(path: Path, name: str) -> tiny.Tensors:
    header = tiny.unpacked(path)[0]
    return {
        key: (entry["dtype"], tuple(entry["shape"]))
        for key, entry in header.items()
        if key not in ("__metadata__", name)
    }


def only(folder: Path, name: str, content: bytes) -> None:
    """Weights under another name instead of model.safetensors."""
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
