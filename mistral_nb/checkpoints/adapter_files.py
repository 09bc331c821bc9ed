"""A LoRA adapter's folder as whoever applies it reads it: its configuration, where its matrices lie, what is wrong."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from mistral_nb.checkpoints.adapter_tensors import MODULES, LoraTensors, read_tensors
from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.untrusted import quoted, read_object, readable, stay_inside
from mistral_nb.errors import AdapterError, ModelError
from mistral_nb.types import MOST_RANK

__all__ = [
    "CONFIG_FILE",
    "CONFIG_LIMIT",
    "RANK",
    "RANK_ON_CPU",
    "WEIGHTS_FILE",
    "AdapterFiles",
    "features",
    "is_count",
    "is_scale",
    "looks",
    "not_as_said",
    "open_adapter",
    "wrong_config",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
RANK = 16
"""Of a GPU's slots, unless it is said: kernels read all of a slot's ranks, and of Mistral-7B 84 MB a step for 16."""
RANK_ON_CPU = 64
"""There no padding is read."""
CONFIG_LIMIT = 1_000_000
"""Bytes of a configuration."""

_MOST = (2 - 2**-23) * 2.0**127
_FALSE: tuple[Any, ...] = (None, False, "", 0, [], {})
_NOT_APPLIED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "aLoRA",
    "lora_bias": "a bias",
    "modules_to_save": "whole modules beside the matrices",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "parameters that are no linear module",
    "layer_replication": "replicated layers",
    "rank_pattern": "ranks that differ by module",
    "alpha_pattern": "scales that differ by module",
    "kasa_config": "KaSA",
    "use_bdlora": "BD-LoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
}
_LEAVES_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to begin a training that change no weight of the base model. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it:
what they save is no update of the base as others have it."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter that fits a model: its update of a module is scale * B A. `looks` is of its files, before reading."""

    folder: Path
    looks: str
    rank: int
    scale: float
    modules: tuple[str, ...]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS_FILE


def features(args: ModelArgs) -> dict[str, int]:
    """A model's features by their names in `MODULES`."""
    kv = args.n_kv_heads * args.head_dim
    return {"dim": args.dim, "q": args.n_heads * args.head_dim, "kv": kv, "hidden": args.hidden_dim}


def open_adapter(folder: Path, args: ModelArgs) -> AdapterFiles:
    """The adapter in a folder, for a model of those sizes. No matrix is read.

    `AdapterError` with everything that is wrong with it: it is applied as a whole or not at all.
    """
    try:
        with readable(folder):
            seen = looks(folder)
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                stay_inside(folder / name)
            config = read_object(folder / CONFIG_FILE, CONFIG_LIMIT)
            tensors = read_tensors(folder / WEIGHTS_FILE)
    except ModelError as error:
        raise AdapterError(_told(folder, str(error).replace(f"{folder}{os.sep}", "")), (str(error),)) from error
    problems = (*wrong_config(config), *tensors.problems, *not_as_said(config, tensors), *_misfits(tensors, args))
    if problems:
        raise AdapterError(_told(folder, *problems), problems)
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return AdapterFiles(folder, seen, rank, scale, tensors.modules)


def looks(folder: Path) -> str:
    """What tells this version of an adapter's files from others, without reading them: sizes, last changes, inodes.

    The change that no program can set back is among them. `ModelError` where there is none.
    """
    with readable(folder):
        told = [(folder / name).stat() for name in (CONFIG_FILE, WEIGHTS_FILE)]
    numbers = [(each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_dev, each.st_ino) for each in told]
    return " ".join("-".join(map(str, each)) for each in numbers)


def _told(folder: Path, *problems: str) -> str:
    name = quoted(folder.name)
    if len(problems) == 1:
        return f"the adapter {name} is not applied: {problems[0]}"
    return f"the adapter {name} is not applied for {len(problems)} reasons: {'; '.join(problems)}"


def _misfits(tensors: LoraTensors, args: ModelArgs) -> Iterator[str]:
    """Why an adapter is not of this model."""
    wrong = [
        f"{tensors.sizes[name]} and not {size}"
        for name, size in features(args).items()
        if tensors.sizes.get(name, size) != size
    ]
    if wrong:
        yield f"its matrices do not fit the model (features: {', '.join(wrong)}); choose an adapter of this model"
    elif tensors.layers > args.n_layers:
        yield f"it has {tensors.layers} layers, and the model {args.n_layers}; choose an adapter of this model"


def wrong_config(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the configuration, whoever applies the adapter."""
    kind, task, rank, alpha = (config.get(name) for name in ("peft_type", "task_type", "r", "lora_alpha"))
    if kind != "LORA":
        yield f"peft_type is {quoted(kind)}, and LORA alone is applied; train a LoRA adapter"
        return
    if task not in (None, "CAUSAL_LM"):
        yield f"task_type is {quoted(task)}; train for CAUSAL_LM"
    if not is_count(rank):
        yield f"r is {quoted(rank)}; it must be a whole number, 1 or more"
    elif rank > MOST_RANK:
        yield f"r is {quoted(rank)}, and {MOST_RANK} is the most; train it with less"
    if not is_scale(alpha):
        yield f"lora_alpha is {quoted(alpha)}; it must be a finite number above 0"
    if config.get("bias", "none") != "none":
        yield f"bias is {quoted(config['bias'])}, and biases are not applied; train with bias='none'"
    for name, what in _NOT_APPLIED.items():
        if config.get(name) not in _FALSE:
            yield f"{name} is set: {what}, which is not applied; train without it"
    begins = config.get("init_lora_weights")
    if begins not in _LEAVES_THE_BASE:
        yield (
            f"init_lora_weights is {quoted(begins)}, which changes the base model's weights too; convert it with "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def not_as_said(config: Mapping[str, Any], tensors: LoraTensors) -> Iterator[str]:
    """Where the configuration and the matrices differ: the rank, and which modules have an update."""
    rank, said, modules = config.get("r"), config.get("target_modules"), tensors.modules
    if is_count(rank) and tensors.rank not in (None, rank):
        yield f"r is {quoted(rank)}, and the matrices have rank {tensors.rank}; save the adapter again"
    if not isinstance(said, list) or not all(isinstance(each, str) for each in said):
        return  # a regular expression, or all-linear: the matrices tell
    strange = sorted({each for each in said if each.rpartition(".")[2] not in MODULES})
    if strange:
        yield f"target_modules names {quoted(', '.join(strange))}; known are {', '.join(MODULES)}"
    named = {each.rpartition(".")[2] for each in said}
    lacking = [name for name in MODULES if name in named and name not in modules]
    extra = [name for name in modules if name not in named]
    if lacking:
        yield f"target_modules names {', '.join(lacking)}, which have no matrices; save the adapter again"
    if extra:
        yield f"{', '.join(extra)} have matrices, and target_modules does not name them; save the adapter again"


def is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_scale(value: Any) -> TypeGuard[float]:
    """Whether a value is a number above 0 that a float of 32 bits holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _MOST
