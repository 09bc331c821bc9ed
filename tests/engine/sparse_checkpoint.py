"""A checkpoint as large as is asked for, that takes no room: zeros that no disk holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mistral_nb.checkpoints import ModelArgs
from mistral_nb.checkpoints.names import expected_tensors, hugging_face_name
from mistral_nb.hardware import host_memory
from tests.checkpoints.tiny import laid_out, packed

BYTES_A_LAYER = 436_000_000
"""In bf16; twice as many in fp32, and half as many in int8."""

LARGEST = 400_000_000_000
"""Bytes of memory that a test can exceed: four times as much is as many tensors as a header may name."""


def memory_to_exceed() -> int:
    """Bytes of the whole memory, of which at least 0.6 are free: what is free changes while other tests run."""
    memory = host_memory()
    if memory is None or memory.total > LARGEST or memory.free < 0.6 * memory.total:
        pytest.skip(f"needs a system that tells its memory, of at most {LARGEST / 1e9:.0f} GB and 60% free")
    return memory.total


def sparse_checkpoint(folder: Path, embedded: Path, layers: int) -> Path:
    """A model of so many layers, each like one of Mistral-7B, with the embedded model's tokenizer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded / name, folder)
    changes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers, "head_dim": 128}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = {**json.loads((embedded / "config.json").read_text()), **changes, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = expected_tensors(ModelArgs.from_config(config))
    header, size = laid_out({hugging_face_name(name): ("BF16", shape) for name, shape in tensors})
    start = packed(header, b"")
    (folder / "model.safetensors").write_bytes(start)
    os.truncate(folder / "model.safetensors", len(start) + size)
    return folder
