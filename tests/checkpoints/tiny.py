"""Makers of tiny whole checkpoints, in each layout, with real tokenizer files; written by hand, byte by byte."""

from __future__ import annotations

import functools
import io
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DIM, LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 64, 2, 4, 2, 16, 96
VOCABULARY = 384
TEXT = ["the quick brown fox jumps over the lazy dog", "a checkpoint is whole or it is refused by name", "0123456789"]
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I8": 1, "F8_E4M3": 1}

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape by name."""

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
PARAMS = {
    "dim": DIM,
    "n_layers": LAYERS,
    "head_dim": HEAD_DIM,
    "hidden_dim": HIDDEN,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 1e6,
}
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
SHAPES = {
    "tok_embeddings": (VOCABULARY, DIM),
    "norm": (DIM,),
    "output": (VOCABULARY, DIM),
    "attention_norm": (DIM,),
    "attention.wq": (Q, DIM),
    "attention.wk": (KV, DIM),
    "attention.wv": (KV, DIM),
    "attention.wo": (DIM, Q),
    "ffn_norm": (DIM,),
    "feed_forward.w1": (HIDDEN, DIM),
    "feed_forward.w2": (DIM, HIDDEN),
    "feed_forward.w3": (HIDDEN, DIM),
}
HUGGING_FACE = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
TOP = ("tok_embeddings", "norm", "output")


def mistral_tensors(dtype: str = "BF16") -> Tensors:
    parts = [part for part in SHAPES if part not in TOP]
    names = {f"layers.{layer}.{part}.weight": part for layer in range(LAYERS) for part in parts}
    names |= {f"{part}.weight": part for part in TOP}
    return {name: (dtype, SHAPES[part]) for name, part in names.items()}


def hugging_face_tensors(dtype: str = "BF16") -> Tensors:
    parts = [part for part in SHAPES if part not in TOP]
    names = {f"model.layers.{layer}.{HUGGING_FACE[part]}.weight": part for layer in range(LAYERS) for part in parts} | {
        f"{HUGGING_FACE[part]}.weight": part for part in TOP
    }
    return {name: (dtype, SHAPES[part]) for name, part in names.items()}


def safetensors(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """A file of random bytes."""
    header, size = laid_out(tensors)
    header |= {"__metadata__": dict(metadata)} if metadata else {}
    return packed(header, (random.Random(0).randbytes(1024) * (size // 1024 + 1))[:size])


def laid_out(tensors: Tensors) -> tuple[dict[str, Any], int]:
    """A header with the tensors one behind another, and the size of the data."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return header, end


def packed(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def unpacked(path: Path) -> tuple[dict[str, Any], bytes]:
    """A file's header and data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def change_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = unpacked(path)
    change(header)
    path.write_bytes(packed(header, data))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@functools.cache
def json_tokenizer(size: int = VOCABULARY) -> str:
    """A BPE tokenizer trained on a few lines, with SentencePiece's spaces and the end tokens of Mistral's v1."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_special_tokens([f"<fill_{i}>" for i in range(size - tokenizer.get_vocab_size())])
    assert tokenizer.get_vocab_size() == size
    return str(tokenizer.to_str())


@functools.cache
def sentencepiece_model(size: int = VOCABULARY) -> bytes:
    """A SentencePiece model trained on a few lines, with the control tokens of Mistral's v3."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 3),
        model_writer=written,
        vocab_size=size,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        user_defined_symbols=[f"<fill_{i}>" for i in range(80)],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()


def hugging_face(folder: Path, dtype: str = "BF16") -> Path:
    """config.json, model.safetensors, tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json_tokenizer())
    (folder / "model.safetensors").write_bytes(safetensors(hugging_face_tensors(dtype), {"format": "pt"}))
    return folder


def sharded(folder: Path) -> Path:
    """The same in three shards with an index."""
    hugging_face(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for name, tensors in _shards():
        (folder / name).write_bytes(safetensors(tensors, {"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _shards() -> Iterator[tuple[str, Tensors]]:
    everything = list(hugging_face_tensors().items())
    size = -(-len(everything) // 3)
    for number in range(3):
        yield f"model-0000{number + 1}-of-00003.safetensors", dict(everything[number * size : (number + 1) * size])


def mistral(folder: Path) -> Path:
    """params.json, consolidated.safetensors, tokenizer.model.v3."""
    folder.mkdir(parents=True)
    model = sentencepiece_model()
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    assert size <= VOCABULARY
    (folder / "params.json").write_text(json.dumps(PARAMS))
    (folder / "tokenizer.model.v3").write_bytes(model)
    (folder / "consolidated.safetensors").write_bytes(safetensors(mistral_tensors()))
    return folder
