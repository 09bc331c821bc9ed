"""Adapters as PEFT saves them, made by hand: a configuration, and a safetensors file whose data is zeros."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mistral_nb.checkpoints.adapter_tensors import MODULES
from mistral_nb.finetunes.adapter import CONFIG_FILE, WEIGHTS_FILE
from mistral_nb.finetunes.rules import MISTRAL_7B

CONFIG: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "mistralai/Mistral-7B-Instruct-v0.2",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_to_transform": None,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "model_type": "mistral",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
EMBEDDED = {"dim": 576, "q": 576, "kv": 192, "hidden": 1536}
"""The embedded model's features; it has 30 layers."""

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}

Shapes = dict[str, tuple[int, ...]]


def matrices(
    modules: Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    layers: int = 2,
    features: Mapping[str, int] = MISTRAL_7B,
) -> Shapes:
    """The shapes of all A and B by their names."""
    shapes = {}
    for layer in range(layers):
        for module in modules:
            into, out = (features[name] for name in MODULES[module])
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            shapes[f"{name}.lora_A.weight"] = (rank, into)
            shapes[f"{name}.lora_B.weight"] = (out, rank)
    return shapes


def write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A safetensors file of zeros, which take no room on most file systems."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_adapter(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    dtype: str = "BF16",
) -> Path:
    """An adapter in `folder`; keys of `config` replace those of `CONFIG`, and are left out where they are `...`."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {name: value for name, value in {**CONFIG, **(config or {})}.items() if value is not ...}
    (folder / CONFIG_FILE).write_text(json.dumps(merged, indent=2), encoding="utf-8")
    write_weights(folder / WEIGHTS_FILE, matrices() if shapes is None else shapes, dtype)
    return folder


def write_random(folder: Path, seed: int, modules: Sequence[str] = ("q_proj", "v_proj"), size: float = 0.05) -> Path:
    """An adapter of the embedded model whose matrices, of `size`, change what it says; in FP32."""
    shapes = matrices(modules, layers=30, features=EMBEDDED)
    config = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "model_type": "llama"}
    write_adapter(folder, {**config, "target_modules": list(modules)}, shapes, "F32")
    values = sum(math.prod(shape) for shape in shapes.values())
    data = np.random.default_rng(seed).normal(0, size, values).astype("<f4").tobytes()
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-len(data), 2)
        file.write(data)
    return folder
