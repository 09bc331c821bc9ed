"""The conversion of tiny GGUF files, against the gguf package and transformers."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from mistral_nb.checkpoints import describe
from mistral_nb.errors import ModelError
from mistral_nb.models.gguf_import import convert, needed_bytes
from tests.models.tiny_gguf import HEADS, KV_HEADS, LAYERS, SIZES, Tensor, add_vocabulary, tiny_gguf, write_gguf

MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def no_report(done: int, total: int) -> None:
    pass


def converted(source: Path, folder: Path) -> Path:
    folder.mkdir()
    convert(source, folder, no_report)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def names(layers: int = LAYERS) -> dict[str, str]:
    """Hugging Face's name of each tensor by GGUF's."""
    found = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in range(layers):
        for old, new in MATRICES.items():
            found[f"blk.{layer}.{old}.weight"] = f"model.layers.{layer}.{new}.weight"
    return found


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own way from Hugging Face's row order to GGUF's."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def written(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def decodable() -> list[Kind]:
    found = []
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        found.append(kind)
    assert {"F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ2_XXS"} <= {kind.name for kind in found}
    return found


@pytest.mark.parametrize("kind", decodable(), ids=lambda kind: kind.name)
def test_every_type_that_gguf_decodes_is_exact(tmp_path: Path, kind: Kind) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf", kind=kind, dim=256)
    checkpoint = written(converted(source, tmp_path / "checkpoint"))
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    assert set(names()) == set(tensors)
    assert set(names().values()) == set(checkpoint)
    for name, tensor in tensors.items():
        values = checkpoint[names()[name]]
        kept = tensor.tensor_type.name in TYPES
        assert values.dtype == (TYPES[tensor.tensor_type.name] if kept else torch.float32)
        bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32).numpy()
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        bits = permuted(bits, heads) if heads else bits
        with np.errstate(all="ignore"):
            expected = tensor.data if kept else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert bits.tobytes() == expected.tobytes(), name


@pytest.mark.parametrize(
    ("number", "problem"),
    [
        (int(Kind.Q8_1), "attn_q.weight in the type Q8_1, which the gguf package cannot decode; choose.*Q8_0"),
        (int(Kind.F64), "the type F64, which the gguf package cannot decode"),
        (int(Kind.I32), "the type I32, which"),
        (4, "the type 4, which the gguf package here does not know"),
        (1000, "the type 1000, which the gguf package here does not know"),
    ],
)
def test_a_type_that_gguf_cannot_decode_is_refused_by_name(tmp_path: Path, number: int, problem: str) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf", kind=Kind.F32)
    data = bytearray(source.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    assert data[at : at + 4] == bytes(4)
    data[at : at + 4] = number.to_bytes(4, "little")
    source.write_bytes(data)
    folder = tmp_path / "checkpoint"
    with pytest.raises(ModelError, match=problem):
        converted(source, folder)
    assert not any(folder.iterdir())


def exported(path: Path, model: PreTrainedModel, kind: Kind, metadata: dict[str, Any] | None = None) -> Path:
    """A transformers model as llama.cpp's converter writes it: q and k permuted, norms in F32."""
    config = model.config
    state = {name: values.detach().numpy() for name, values in model.state_dict().items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def tensors(size: int) -> Iterable[Tensor]:
        table = names(config.num_hidden_layers)
        if not config.tie_word_embeddings:
            table["output.weight"] = "lm_head.weight"
        for old, new in table.items():
            values = state[new]
            part = old.split(".")[-2]
            values = permuted(values, heads[part]) if part in heads else values
            found = kind if values.ndim == 2 else Kind.F32
            yield old, gguf.quants.quantize(np.ascontiguousarray(values), found), found

    sizes = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.vocab_size": config.vocab_size,
    }
    return write_gguf(
        path, tensors, lambda writer: add_vocabulary(writer, "smollm"), metadata={**sizes, **(metadata or {})}
    )


def random_model(config: LlamaConfig, dtype: torch.dtype) -> PreTrainedModel:
    """In fp32, with weights that `dtype` holds exactly."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.add_(torch.randn_like(values) * 0.2)
            values.copy_(values if "norm" in name else values.to(dtype))
    return model


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_those_of_the_original(tmp_path: Path, kind: Kind, tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=193,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    model = random_model(config, TYPES[kind.name])
    folder = converted(exported(tmp_path / "tiny.gguf", model, kind), tmp_path / "checkpoint")
    loaded, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    assert config_of(folder)["torch_dtype"] == str(TYPES[kind.name]).removeprefix("torch.")
    ids = torch.arange(60).reshape(1, -1) * 3 % 193
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        swapped = random_model(config, TYPES[kind.name])
        rows = swapped.model.layers[0].self_attn.k_proj.weight
        rows.copy_(torch.from_numpy(permuted(rows.numpy(), 2)))
        assert not torch.allclose(swapped(ids).logits, model(ids).logits, atol=1e-2), "the row order must matter here"


def test_conversion_writes_what_transformers_reads(tmp_path: Path) -> None:
    folder = converted(tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "checkpoint")
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Ça va, abba? 12<|im_end|>").input_ids) == "Ça va, abba? 12<|im_end|>"
    assert tokenizer("<|im_end|>").input_ids == [2]
    described = describe(folder)
    assert (described.architecture, described.dtype, described.args.vocab_size) == ("Llama", "F32", 260)


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    def plain(writer: GGUFWriter) -> int:
        size = add_vocabulary(writer, "smollm")
        for key in ("tokenizer.chat_template", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.unknown_token_id"):
            del writer.kv_data[0][key]
        return size

    folder = converted(
        tiny_gguf(tmp_path / "a.gguf", vocabulary=plain, without="llama.rope.freq_base"), tmp_path / "plain"
    )
    assert describe(folder).template == "none: raw prompts only"
    assert describe(folder).args.rope_theta == 10_000.0
    assert "pad_token_id" not in config_of(folder)
    source = tiny_gguf(tmp_path / "b.gguf", without="llama.attention.head_count_kv")
    with pytest.raises(
        ModelError, match=r"attn_k\.weight has the shape \(32, 64\), where its metadata tell \(64, 64\)"
    ):
        converted(source, tmp_path / "heads")
    source = tiny_gguf(tmp_path / "c.gguf", metadata={"tokenizer.ggml.eot_token_id": 0})
    generation = converted(source, tmp_path / "turns") / "generation_config.json"
    assert json.loads(generation.read_text())["eos_token_id"] == [2, 0]


@pytest.mark.parametrize(
    "key",
    [
        "general.architecture",
        *(key for key in SIZES if key not in ("llama.rope.freq_base", "llama.attention.head_count_kv")),
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.token_type",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(ModelError, match=rf"tiny\.gguf lacks {key}, without which"):
        converted(tiny_gguf(tmp_path / "tiny.gguf", without=key), folder)
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"architecture": "qwen2"}, "family qwen2; only llama"),
        ({"pre": "llama-bpe"}, r"tokenizer of tiny\.gguf \(gpt2, llama-bpe\) is not known.*smollm and tekken"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, r"tokenizer of tiny\.gguf \(bert, smollm\) is not known"),
        ({"extra": "rope_freqs"}, "a tensor rope_freqs.weight, a rope scaling"),
        ({"extra": "blk.0.attn_q_norm"}, "a tensor blk.0.attn_q_norm.weight, which models of the llama family lack"),
        ({"without": "blk.1.ffn_up.weight"}, r"lacks the tensor blk\.1\.ffn_up\.weight"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count = '8', which this engine does not apply"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type = 'yarn', which this engine"),
        ({"metadata": {"llama.rope.scale_linear": 4.0}}, "llama.rope.scale_linear = '4.0'"),
        ({"metadata": {"llama.rope.scaling.factor": 4.0}}, r"llama.rope.scaling.factor = '4\.0', which this engine"),
        ({"metadata": {"llama.rope.scaling.attn_factor": 2.0}}, r"scaling.attn_factor = '2\.0', which this engine"),
        ({"metadata": {"llama.rope.freq_base_swa": 1e4}}, "llama.rope.freq_base_swa = '10000.0', which this engine"),
        ({"metadata": {"llama.attention.scale": 0.5}}, r"llama.attention.scale = '0\.5', which this engine"),
        ({"metadata": {"llama.attention.\x1b[2J": 1}}, r"llama\.attention\.\\x1b\[2J = '1', which this engine"),
        ({"pre": "\x1b[2J"}, r"gpt2, \\x1b\[2J\) is not known"),
        ({"metadata": {"llama.attention.causal": False}}, "llama.attention.causal = 'False'"),
        ({"metadata": {"llama.rope.dimension_count": 16}}, "rope.dimension_count = 16 beside heads of 32"),
        ({"metadata": {"llama.attention.value_length": 16}}, "value_length = 16 beside heads of 32"),
        (
            {"metadata": {"llama.attention.head_count_kv": [1, 1]}},
            r"a list of 2 for llama.attention.head_count_kv, which",
        ),
        ({"metadata": {"llama.attention.head_count": 0}}, "has 0 heads for 64"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "2 query heads cannot share 3"),
        ({"metadata": {"llama.block_count": 10_000_000}}, "tells of 10000000 layers and has 20 tensors"),
        ({"metadata": {"llama.block_count": 3}}, r"lacks the tensor blk\.2"),
        ({"metadata": {"llama.vocab_size": 200}}, r"token_embd.weight has the shape \(260, 64\).*\(200, 64\)"),
        ({"metadata": {"llama.rope.freq_base": float("nan")}}, "rope_theta is nan"),
        ({"metadata": {"llama.context_length": "long"}}, "'long' for llama.context_length, which must be a whole"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 260}}, "260 for tokenizer.ggml.eos_token_id and only 260 tokens"),
        ({"metadata": {"tokenizer.ggml.merges": ["a zz"]}}, "has the merge 'a zz' of no tokens"),
        ({"metadata": {"tokenizer.ggml.token_type": [1, 3]}}, "no type for each of its 260 tokens"),
        ({"metadata": {"llama.attention.sliding_window": 32}}, "sliding window of 32 tokens beside a byte-level"),
        ({"metadata": {"split.count": 3}}, "is one of 3 parts; put them together.*FIRST_PART"),
    ],
)
def test_conversion_refuses_what_it_would_get_wrong(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(ModelError, match=problem):
        converted(tiny_gguf(tmp_path / "tiny.gguf", **options), folder)
    assert not any(folder.iterdir())


@pytest.mark.parametrize("scaling", [{"factor": 1.0}, {"type": "none", "factor": 4.0, "finetuned": False}], ids=str)
def test_a_scaling_that_does_nothing(tmp_path: Path, scaling: dict[str, Any]) -> None:
    metadata = {f"llama.rope.scaling.{name}": value for name, value in scaling.items()}
    assert converted(tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata), tmp_path / "checkpoint")


def test_the_parts_of_a_split_file_are_named(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m-00002-of-00003.gguf", metadata={"split.count": 3})
    with pytest.raises(ModelError, match=r"m-00001-of-00003\.gguf to m-00003-of-00003\.gguf\).*--merge m-00001"):
        needed_bytes(source)


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q4_1], ids=lambda kind: kind.name)
def test_the_size_is_known_and_progress_is_in_bytes(tmp_path: Path, kind: Kind) -> None:
    source = tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    reports: list[tuple[int, int]] = []
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    needed = needed_bytes(source)
    convert(source, folder, lambda done, total: reports.append((done, total)))
    assert needed == sum(path.stat().st_size for path in folder.iterdir())
    weights = sum(values.numel() * values.element_size() for values in written(folder).values())
    assert {total for _, total in reports} == {weights}
    assert [done for done, _ in reports] == sorted(done for done, _ in reports)
    assert reports[-1] == (weights, weights)


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """A matrix of 128 MiB in fp32, and a q and k of 16 MiB, are converted in a few blocks' room."""
    hidden, dim = 32_768, 1024
    sizes = {**SIZES, "llama.embedding_length": dim, "llama.feed_forward_length": hidden}
    sizes |= {"llama.block_count": 1, "llama.attention.head_count": 32, "llama.attention.head_count_kv": 32}

    def tensors(size: int) -> Iterable[Tensor]:
        shapes = {"token_embd": size, "attn_q": dim, "attn_k": dim, "attn_v": dim, "attn_output": dim}
        shapes |= {"ffn_gate": hidden, "ffn_up": hidden, "ffn_down": dim}
        for name, rows in shapes.items():
            columns = hidden if name == "ffn_down" else dim
            prefix = "" if name == "token_embd" else "blk.0."
            yield f"{prefix}{name}.weight", np.zeros((rows, columns // 32 * 34), np.uint8), Kind.Q8_0
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            yield f"{name}.weight", np.zeros(dim, np.float32), Kind.F32

    source = write_gguf(
        tmp_path / "wide.gguf", tensors, lambda writer: add_vocabulary(writer, "smollm"), metadata=sizes
    )
    (tmp_path / "checkpoint").mkdir()
    tracemalloc.start()
    try:
        convert(source, tmp_path / "checkpoint", no_report)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"peak {peak / 2**20:.0f} MiB for tensors of up to {hidden * dim * 4 / 2**20:.0f} MiB")
    assert peak < 64 * 2**20
