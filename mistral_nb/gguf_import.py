"""A GGUF file of the Llama family, unpacked into a Hugging Face checkpoint folder.

Weights are dequantised to fp32 by the `gguf` package and written in blocks of rows, so the peak memory does not grow
with the model. GGUF stores the rows of q and k in interleaved RoPE order; they are put back into the half-split order
that Hugging Face checkpoints have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mistral_nb.errors import MissingDependency, ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

__all__ = ["convert", "require_gguf"]

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
_ROWS = 8192
# The one pre-tokenizer that is known here; another would give other token ids without any error.
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
}


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

    `report(done, total)` is called after each tensor, in bytes of fp32 weights; an exception from it ends the
    conversion. Raises `ModelError` when the file is of another family.
    """
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(source)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    family = meta.get("general.architecture")
    if family != "llama":
        raise ModelError(f"{source.name} is of the family {family}; only llama is read here")
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    try:
        _write_json(folder / "config.json", _config(meta, tied=tied))
        _write_json(folder / "generation_config.json", _token_ids(meta))
        _write_json(folder / "tokenizer.json", _tokenizer(meta))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(meta))
    except KeyError as error:
        raise ModelError(f"{source.name} lacks {error}, without which it is no chat model") from error
    _write_weights(reader, meta, folder / "model.safetensors", report)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _fp32(value: float) -> float:
    """The shortest decimal of a number that was stored in fp32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _config(meta: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    heads = meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.embedding_length"] // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": _fp32(meta["llama.rope.freq_base"]),
        "rms_norm_eps": _fp32(meta["llama.attention.layer_norm_rms_epsilon"]),
        "vocab_size": meta["llama.vocab_size"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        **_token_ids(meta),
    }


def _control_tokens(meta: dict[str, Any]) -> dict[int, dict[str, Any]]:
    kinds = meta["tokenizer.ggml.token_type"]
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        index: {"content": text, **shape}
        for index, (text, kind) in enumerate(zip(meta["tokenizer.ggml.tokens"], kinds, strict=True))
        if kind == _CONTROL
    }


def _tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    pre = meta["tokenizer.ggml.pre"]
    if meta["tokenizer.ggml.model"] != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(f"the file's tokenizer ({meta['tokenizer.ggml.model']}, {pre}) is not known here")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **token} for index, token in _control_tokens(meta).items()],
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[pre],
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: index for index, text in enumerate(meta["tokenizer.ggml.tokens"])},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }


def _tokenizer_config(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    ids = _token_ids(meta)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(index): token for index, token in _control_tokens(meta).items()},
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
    }


def _hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown tensor is `ModelError`."""
    parts = name.split(".")
    if len(parts) == 2 and parts[0] in _TOP:
        return f"{_TOP[parts[0]]}.{parts[1]}"
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    raise ModelError(f"the file holds a tensor {name}, which the llama family does not have")


def _half_split(rows: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """[heads * head_dim, dim], each head's rows from interleaved (0, d/2, 1, d/2+1, ...) to half-split order."""
    head_dim = rows.shape[0] // heads
    return rows.reshape(heads, head_dim // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _blocks(tensor: ReaderTensor, meta: dict[str, Any]) -> Iterator[npt.NDArray[np.float32]]:
    """The tensor's fp32 values in order, at most `_ROWS` rows at once; q and k whole, since they are permuted."""
    from gguf.quants import dequantize

    heads = {"attn_q.weight": "head_count", "attn_k.weight": "head_count_kv"}.get(tensor.name.split(".", 2)[-1])
    if heads:
        yield _half_split(dequantize(tensor.data, tensor.tensor_type), meta[f"llama.attention.{heads}"])
        return
    for start in range(0, len(tensor.data), _ROWS):
        yield dequantize(tensor.data[start : start + _ROWS], tensor.tensor_type)


def _write_weights(reader: GGUFReader, meta: dict[str, Any], path: Path, report: Callable[[int, int], None]) -> None:
    """One safetensors file: 8 bytes header length, the JSON header padded to 8 bytes, the tensors back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]
        header[_hf_name(tensor.name)] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    total = end
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        done = 0
        for tensor in reader.tensors:
            for values in _blocks(tensor, meta):
                done += file.write(np.ascontiguousarray(values, dtype="<f4").data)
                report(done, total)
