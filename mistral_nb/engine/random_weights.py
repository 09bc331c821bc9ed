"""A checkpoint of which there is only a config: random weights in its shape, made on the device, for measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mistral_nb.bench_peers import random_tensor
from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.checkpoint import Checkpoint, TensorInfo
from mistral_nb.checkpoints.names import expected_tensors, hugging_face_name
from mistral_nb.engine.reading import Part

__all__ = ["is_random", "make_parts", "random_checkpoint"]

MADE = 1 << 26
"""Bytes of rows that are handed on at a time."""


def random_checkpoint(folder: Path) -> Checkpoint:
    """As if the folder held bf16 files, each with the one tensor that it is named after."""
    args = ModelArgs.from_folder(folder)
    tensors = {
        name: TensorInfo("BF16", shape, Path(hugging_face_name(name)), 0, 2 * math.prod(shape))
        for name, shape in expected_tensors(args)
    }
    return Checkpoint(folder, "safetensors", args, tensors, False, (), {})


def is_random(checkpoint: Checkpoint) -> bool:
    """Whether it has no files."""
    return not checkpoint.files


def make_parts(
    parts: Sequence[Part], progress: Callable[[int, int], None], *, threads: int, device: torch.device
) -> None:
    """What `read_parts` does, of tensors that `random_tensor` makes, in this thread."""
    total = sum(part.info.end for part in parts)
    done = 0
    progress(done, total)
    for part in parts:
        made = random_tensor(str(part.info.file), part.info.shape, device)
        rows = made.view(-1, made.shape[-1])
        together = max(1, MADE // (2 * made.shape[-1] * part.step)) * part.step
        for first in range(0, len(rows), together):
            block = rows[first : first + together]
            if part.direct is None:
                part.put(first, block)
            else:
                part.direct.view(rows.shape)[first : first + together] = block
        done += part.info.end
        progress(done, total)
