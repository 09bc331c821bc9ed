"""A GGUF file of the Llama family, unpacked into a Hugging Face checkpoint folder that holds the same numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.errors import MissingDependency, ModelError
from mistral_nb.models.gguf_header import GgufHeader, UnreadList, read_header
from mistral_nb.models.gguf_tokenizer import as_json, tokenizer_files
from mistral_nb.models.gguf_vocabulary import GgufVocabulary, read_vocabulary, speaks_mistral
from mistral_nb.models.gguf_weights import Weights, plan_weights, write_weights

__all__ = ["convert", "needed_bytes", "require_gguf"]

# What the engine does not apply, and the value that says that the model does without it.
_PLAIN = {
    "llama.expert_count": 0,
    "llama.rope.scaling.type": "none",
    "llama.rope.scale_linear": 1.0,
    "llama.attention.causal": True,
    "tokenizer.ggml.precompiled_charsmap": UnreadList(0),
    "llama.rope.scaling.attn_factor": 1.0,
    "llama.attention.max_alibi_bias": 0.0,
    "llama.attention.clamp_kqv": 0.0,
}
_WINDOW_KEY = "llama.attention.sliding_window"
_APPLIED = {
    *("llama.rope.dimension_count", "llama.rope.freq_base", "llama.rope.scaling.factor"),
    *("llama.rope.scaling.original_context_length", "llama.rope.scaling.finetuned"),
    *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.layer_norm_rms_epsilon"),
    *("llama.attention.key_length", "llama.attention.value_length", _WINDOW_KEY),
}
"""Keys about RoPE and attention that are read here, or mean nothing without a rope scaling."""
_WINDOW_V01 = 4096
_FP32_MAX = 3.4e38


def require_gguf() -> None:
    """`MissingDependency` unless the `gguf` package can be imported."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"unpacking this model needs the package {error.name or 'gguf'}, which is not installed; "
            'run: pip install "mistral-nb[local]"'
        ) from error


def convert(source: Path, folder: Path, report: Callable[[int, int], None]) -> None:
    """Write config, weights and tokenizer of the GGUF file `source` into `folder`, which exists.

    `report(done, total)` is called after each block, in bytes of written weights; an exception from it ends the
    conversion. Raises `ModelError`, before anything is written, for a file that is damaged, of another family, or of a
    kind that would give other numbers or other token ids than the original.
    """
    plan = _plan(source)
    for name, data in plan.files.items():
        (folder / name).write_bytes(data)
    write_weights(plan.weights, folder / "model.safetensors", report)


def needed_bytes(source: Path) -> int:
    """The size of the folder that `convert` makes of `source`; reads the header only and raises as `convert` does."""
    plan = _plan(source)
    return plan.weights.file_bytes + sum(len(data) for data in plan.files.values())


@dataclass(frozen=True, slots=True)
class _Plan:
    """What `convert` writes: the small files by name, and the weights."""

    files: dict[str, bytes]
    weights: Weights


def _plan(source: Path) -> _Plan:
    require_gguf()
    header = read_header(source)
    family = header.value("general.architecture", str)
    if family != "llama":
        raise ModelError(
            f"{source.name} is of the family {quoted(family)}; only llama is read here: choose another model"
        )
    _refuse_unapplied(header)
    vocabulary = read_vocabulary(header)
    config = _config(header, vocabulary)
    weights = plan_weights(header, _args(source, header, config))
    config["torch_dtype"] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[weights.dtype]
    files = {
        "config.json": as_json(config),
        "generation_config.json": as_json(_generation(vocabulary)),
        **tokenizer_files(header, vocabulary),
    }
    return _Plan(files, weights)


def _refuse_unapplied(header: GgufHeader) -> None:
    for key, value in header.metadata.items():
        unknown = key.startswith(("llama.rope.", "llama.attention.")) and key not in _APPLIED
        stretched = key == "llama.rope.scaling.factor" and "llama.rope.scaling.type" not in header.metadata
        if _PLAIN.get(key, 1.0) != value if key in _PLAIN or stretched else unknown:
            raise ModelError(
                f"{header.path.name} has {quoted(key)} = {str(value)[:40]!r}, which this engine does not apply; "
                "choose another model"
            )


def _args(source: Path, header: GgufHeader, config: dict[str, Any]) -> ModelArgs:
    """The sizes, checked; q and k of another width than RoPE's, or v of another than k's, are refused."""
    try:
        args = ModelArgs.from_config(config)
    except ModelError as error:
        raise ModelError(f"{source.name} cannot be read: {error}") from error
    for key in ("llama.rope.dimension_count", "llama.attention.value_length"):
        width = header.optional(key, int)
        if width not in (None, args.head_dim):
            raise ModelError(
                f"{source.name} has {key} = {width} beside heads of {args.head_dim}, which this engine does not "
                "compute; choose another model"
            )
    return args


def _config(header: GgufHeader, vocabulary: GgufVocabulary) -> dict[str, Any]:
    """As Hugging Face names it. Mistral's v0.1 has a window of 4096 tokens, which most GGUF files of it do not tell.

    It is known by its format with a RoPE base of 10,000 and a context of 32,768; v0.2 and v0.3 have a base of 10^6.
    """
    dim, heads = header.value("llama.embedding_length", int), header.value("llama.attention.head_count", int)
    if not 0 < heads <= dim:
        raise ModelError(f"{header.path.name} has {heads} heads for {dim} dimensions; fetch the file again")
    window = header.optional(_WINDOW_KEY, int) or None
    if window and vocabulary.model != "llama":
        raise ModelError(
            f"{header.path.name} has a sliding window of {window} tokens beside a byte-level vocabulary, which this "
            "engine does not compute; choose another model"
        )
    mistral = bool(window) or speaks_mistral(header, vocabulary)
    rope_theta = _fp32(header.optional("llama.rope.freq_base", float) or 10_000.0)
    context = header.value("llama.context_length", int)
    if mistral and (rope_theta, context) == (10_000.0, 32_768) and _WINDOW_KEY not in header.metadata:
        window = _WINDOW_V01
    return {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "hidden_size": dim,
        "intermediate_size": header.value("llama.feed_forward_length", int),
        "num_hidden_layers": header.value("llama.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": header.optional("llama.attention.head_count_kv", int) or heads,
        "head_dim": header.optional("llama.attention.key_length", int) or dim // heads,
        "max_position_embeddings": context,
        "rope_theta": rope_theta,
        "rms_norm_eps": _fp32(header.value("llama.attention.layer_norm_rms_epsilon", float)),
        "vocab_size": header.optional("llama.vocab_size", int) or len(vocabulary.tokens),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in header.tensors),
        "torch_dtype": "float32",
        **({"sliding_window": window} if mistral else {}),
        **vocabulary.special_ids,
    }


def _generation(vocabulary: GgufVocabulary) -> dict[str, Any]:
    ids = vocabulary.special_ids
    if vocabulary.turn_end not in (None, vocabulary.eos):
        ids["eos_token_id"] = [vocabulary.eos, vocabulary.turn_end]
    return ids


def _fp32(value: float) -> float:
    """The shortest decimal of a number that was stored in fp32: 1e-05, not 9.999999747378752e-06."""
    if not abs(value) < _FP32_MAX:
        return value
    stored = struct.pack("<f", value)
    decimals = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((short for short in decimals if struct.pack("<f", short) == stored), value)
