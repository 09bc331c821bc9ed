"""The conversion of a tiny GGUF, against the gguf package and transformers."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from mistral_nb.errors import ModelError
from mistral_nb.gguf_import import convert
from tests.tiny_gguf import HEADS, KV_HEADS, LAYERS, tiny_gguf


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own way from Hugging Face's row order to GGUF's."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_conversion_is_exact(tmp_path: Path) -> None:
    source, folder = tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "checkpoint"
    folder.mkdir()
    convert(source, folder, lambda done, total: None)
    written = load_file(folder / "model.safetensors")
    hf = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(LAYERS):
        old, new = f"blk.{layer}", f"model.layers.{layer}"
        names |= {f"{old}.attn_{key}.weight": f"{new}.self_attn.{name}.weight" for key, name in hf.items()}
        names |= {f"{old}.ffn_{key}.weight": f"{new}.mlp.{key}_proj.weight" for key in ("gate", "up", "down")}
        names[f"{old}.attn_norm.weight"] = f"{new}.input_layernorm.weight"
        names[f"{old}.ffn_norm.weight"] = f"{new}.post_attention_layernorm.weight"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    assert set(names) == set(tensors)
    assert set(names.values()) == set(written)
    for name, tensor in tensors.items():
        values = written[names[name]]
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(permuted(values, heads) if heads else values, expected, err_msg=name)
        assert values.dtype == np.float32


def test_conversion_writes_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(tiny_gguf(tmp_path / "tiny.gguf"), tmp_path, lambda done, total: None)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("Ça va, abba? 12<|im_end|>").input_ids) == "Ça va, abba? 12<|im_end|>"
    assert tokenizer("<|im_end|>").input_ids == [2]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"architecture": "qwen2"}, "family qwen2; only llama"),
        ({"pre": "llama-bpe"}, r"tokenizer \(gpt2, llama-bpe\) is not known"),
        ({"extra": "rope_freqs"}, "a tensor rope_freqs.weight"),
    ],
)
def test_conversion_refuses_what_it_would_get_wrong(tmp_path: Path, options: dict[str, str], problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        convert(tiny_gguf(tmp_path / "tiny.gguf", **options), tmp_path, lambda done, total: None)
