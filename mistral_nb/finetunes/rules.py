"""What makes an adapter unfit, and what makes it doubtful: for anybody who applies it, and for Cloudflare."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.finetunes.adapter import CONFIG_FILE, WEIGHTS_FILE
from mistral_nb.finetunes.tensors import LAYERS, MISTRAL_7B, MODULES, LoraTensors
from mistral_nb.progress import amount

__all__ = ["MODEL_TYPE", "Judgement", "is_count", "is_scale", "judge", "judge_for_cloudflare", "misfit", "text"]

MODEL_TYPE = "mistral"
MOST_RANK, SAFE_RANK = 32, 8
MOST_BYTES, SAFE_BYTES = 300_000_000, 100_000_000

_MODEL_TYPES = ("mistral", "gemma", "llama")
_BASE = re.compile(r"mistral-?7b(?P<instruct>-instruct)?-v0\.(?P<version>\d)", re.IGNORECASE)
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
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is wrong, and what should be known; each a sentence, a problem with what to do."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge(config: Mapping[str, Any] | None, tensors: LoraTensors | None) -> Judgement:
    """What is wrong with an adapter whoever applies it, from as much as could be read of it."""
    found = Judgement()
    if config is not None:
        found.problems.extend(_wrong_config(config))
        found.warnings.extend(_doubts(config))
    if tensors is not None:
        found.problems.extend(tensors.problems)
        other_model = misfit(tensors)
        found.warnings.extend([f"{other_model}: it is an adapter of another model"] if other_model else [])
    if config is not None and tensors is not None:
        found.problems.extend(_not_as_said(config, tensors))
    return found


def judge_for_cloudflare(config: Mapping[str, Any] | None, tensors: LoraTensors | None, folder: Path) -> Judgement:
    """What Cloudflare's service would refuse or may refuse, besides."""
    found = Judgement()
    if config is not None:
        found.problems.extend(_wrong_type(config, folder))
        found.problems.extend(_wrong_base(config))
    if tensors is not None:
        other_model = misfit(tensors)
        found.problems.extend([f"{other_model}; train on mistralai/Mistral-7B-Instruct-v0.2"] if other_model else [])
        _judge_size(tensors, found)
    return found


def _wrong_base(config: Mapping[str, Any]) -> Iterator[str]:
    base = _BASE.search(text(config.get("base_model_name_or_path")) or "")
    if base and base["version"] not in "12":
        yield (
            f"it was trained on {quoted(config['base_model_name_or_path'])}, and Cloudflare serves "
            "Mistral-7B-Instruct v0.1 and v0.2; train on one of those"
        )


def _judge_size(tensors: LoraTensors, found: Judgement) -> None:
    rank, size = tensors.rank or 0, amount(tensors.bytes)
    if rank > MOST_RANK:
        found.problems.append(f"the rank is {rank}, and Cloudflare takes at most {MOST_RANK}; train with less")
    elif rank > SAFE_RANK:
        found.warnings.append(
            f"the rank is {rank}: Cloudflare's newer documents allow {MOST_RANK}, the older ones {SAFE_RANK}"
        )
    if tensors.bytes >= MOST_BYTES:
        smaller = "train with a lower rank" + (", or save it in 16 bits" if "F32" in tensors.dtypes else "")
        found.problems.append(
            f"{WEIGHTS_FILE} is {size}, and Cloudflare takes less than {amount(MOST_BYTES)}; {smaller}"
        )
    elif tensors.bytes >= SAFE_BYTES:
        newer, older = amount(MOST_BYTES), amount(SAFE_BYTES)
        found.warnings.append(
            f"{WEIGHTS_FILE} is {size}: Cloudflare's newer documents allow {newer}, the older ones {older}"
        )


def _wrong_config(config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the configuration, whoever applies the adapter."""
    kind, task, rank, alpha = (config.get(name) for name in ("peft_type", "task_type", "r", "lora_alpha"))
    if kind != "LORA":
        yield f"peft_type is {quoted(kind)}, and LORA alone is applied; train a LoRA adapter"
        return
    if task not in (None, "CAUSAL_LM"):
        yield f"task_type is {quoted(task)}; train for CAUSAL_LM"
    if not is_count(rank):
        yield f"r is {quoted(rank)}; it must be a whole number, 1 or more"
    if not is_scale(alpha):
        yield f"lora_alpha is {quoted(alpha)}; it must be a finite number above 0"
    if config.get("bias", "none") != "none":
        yield f"bias is {quoted(config['bias'])}, and biases are not applied; train with bias='none'"
    for name, what in _NOT_APPLIED.items():
        if config.get(name) not in _FALSE:
            yield f"{name} is set: {what}, which is not applied; train without it"


def _wrong_type(config: Mapping[str, Any], folder: Path) -> Iterator[str]:
    found = config.get("model_type")
    if found == MODEL_TYPE:
        return
    if found is None:
        yield (
            f'{CONFIG_FILE} has no model_type, which Cloudflare asks for; add "model_type": "{MODEL_TYPE}", or make a '
            f"copy that has it with: mistral-nb lora check {shlex.quote(str(folder))} --fix NEW_FOLDER"
        )
    elif found in _MODEL_TYPES:
        yield f"model_type is {found}, which is another model; for Mistral-7B it must be {MODEL_TYPE}"
    else:
        yield f"model_type is {quoted(found)}, and Cloudflare takes {', '.join(_MODEL_TYPES)}; write {MODEL_TYPE}"


def _doubts(config: Mapping[str, Any]) -> Iterator[str]:
    """What nobody can tell from the configuration, or what it makes doubtful."""
    base = text(config.get("base_model_name_or_path"))
    known = _BASE.search(base or "")
    if known is None:
        yield f"nothing tells whether {quoted(base) if base else 'the model that it was trained on'} is a Mistral-7B"
    elif known["version"] == "1":
        yield "it was trained on v0.1, which has other weights than v0.2: compare its answers"
    elif not known["instruct"] and known["version"] == "2":
        yield "it was trained on the base model and not on the Instruct model: compare its answers"
    if config.get("use_rslora"):
        yield "use_rslora: the scale is lora_alpha / sqrt(r), which not every server knows; compare its answers"
    begins = config.get("init_lora_weights")
    if isinstance(begins, str) and begins.lower().startswith(_CHANGES_THE_BASE):
        yield f"init_lora_weights is {quoted(begins)}, which changes the base model's weights too: was it converted?"


def _not_as_said(config: Mapping[str, Any], tensors: LoraTensors) -> Iterator[str]:
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


def misfit(tensors: LoraTensors) -> str:
    """Why the matrices are not of Mistral-7B; empty where they are."""
    wrong = [
        f"{tensors.sizes[name]} and not {size}"
        for name, size in MISTRAL_7B.items()
        if tensors.sizes.get(name, size) != size
    ]
    if wrong:
        return f"its matrices do not fit Mistral-7B (features: {', '.join(wrong)})"
    return f"it has {tensors.layers} layers, and Mistral-7B {LAYERS}" if tensors.layers > LAYERS else ""


def text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_scale(value: Any) -> TypeGuard[float]:
    """Whether a value is a number above 0 that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max
