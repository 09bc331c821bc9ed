"""What makes an adapter unfit, and what makes it doubtful: for anybody who applies it, and for Cloudflare."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, not_as_said, wrong_config
from mistral_nb.checkpoints.adapter_tensors import LoraTensors
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.progress import amount

__all__ = ["MISTRAL_7B", "MODEL_TYPE", "Judgement", "judge", "judge_for_cloudflare", "misfit", "text"]

MODEL_TYPE = "mistral"
MISTRAL_7B = {"dim": 4096, "q": 4096, "kv": 1024, "hidden": 14_336}
"""Features of Mistral-7B's linear modules, by the names in `MODULES`."""
LAYERS = 32
MOST_RANK, SAFE_RANK = 32, 8
MOST_BYTES, SAFE_BYTES = 300_000_000, 100_000_000

_MODEL_TYPES = ("mistral", "gemma", "llama")
_BASE = re.compile(r"mistral-?7b(?P<instruct>-instruct)?-v0\.(?P<version>\d)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is wrong, and what should be known; each a sentence, a problem with what to do."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge(config: Mapping[str, Any] | None, tensors: LoraTensors | None) -> Judgement:
    """What is wrong with an adapter whoever applies it, from as much as could be read of it."""
    found = Judgement()
    if config is not None:
        found.problems.extend(wrong_config(config))
    if tensors is not None:
        found.problems.extend(tensors.problems)
    if config is not None and tensors is not None:
        found.problems.extend(not_as_said(config, tensors))
    return found


def judge_for_cloudflare(config: Mapping[str, Any] | None, tensors: LoraTensors | None, folder: Path) -> Judgement:
    """What Cloudflare's service would refuse or may refuse, besides."""
    found = Judgement()
    if config is not None:
        found.problems.extend(_wrong_type(config, folder))
        found.problems.extend(_wrong_base(config))
        found.warnings.extend(_doubts_of_base(config))
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


def _doubts_of_base(config: Mapping[str, Any]) -> Iterator[str]:
    """What makes it doubtful whether Cloudflare's model and server answer as the trained one did."""
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
