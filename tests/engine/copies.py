"""Packed copies of a small model: where they are, loading with them, and waiting until one is written."""

from __future__ import annotations

from pathlib import Path

import torch

from mistral_nb.checkpoints import Precision, open_checkpoint
from mistral_nb.engine.model import Weights
from mistral_nb.engine.packed_copy import CopyFolder, copy_folder
from mistral_nb.engine.weights import load_weights

CPU = torch.device("cpu")
TIMEOUT = 180


def place_of(model: Path, precision: Precision = "int4", device: torch.device = CPU) -> CopyFolder:
    found = copy_folder(model / "packed", open_checkpoint(model), precision, device)
    assert found
    return found


def load(model: Path, precision: Precision = "int4") -> tuple[Weights, int]:
    """With whatever copy is there; and the bytes that were read."""
    read: list[int] = []
    copy = place_of(model, precision).open()
    made = load_weights(
        open_checkpoint(model), precision, CPU, lambda done, total: read.append(total), packed_copy=copy
    )
    return made, read[-1]


def write(made: Weights, place: CopyFolder) -> Path:
    writer = place.write(made, lambda: False)
    assert writer
    assert writer.wait(TIMEOUT)
    return place.path
