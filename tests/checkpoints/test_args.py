"""The model's shape out of config.json and params.json: what is read, what is assumed, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from mistral_nb.checkpoints import ModelArgs
from mistral_nb.checkpoints.args import RopeScaling
from mistral_nb.errors import ModelError
from tests.checkpoints.tiny import CONFIG, PARAMS

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MISTRAL_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "hidden_dim": 14336}


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("params", "rope_theta", "window", "vocab_size"),
    [
        ({"vocab_size": 32000, "sliding_window": 4096}, 1e4, 4096, 32000),
        ({"vocab_size": 32000, "rope_theta": 1e6}, 1e6, None, 32000),
        ({"vocab_size": 32768}, 1e6, None, 32768),
        ({"vocab_size": 32768, "_sliding_window": 512, "sliding_window": None}, 1e4, 512, 32768),
    ],
    ids=["v0.1", "v0.2", "no theta", "vLLM's spelling of the window"],
)
def test_params_of_mistral_7b(
    params: dict[str, Any], rope_theta: float, window: int | None, vocab_size: int, tmp_path: Path
) -> None:
    args = ModelArgs.from_folder(write(tmp_path, "params.json", {**MISTRAL_7B, "norm_eps": 1e-5, **params}))
    assert args == ModelArgs(4096, 32, 32, 8, 128, 14336, vocab_size, 1e-5, rope_theta, 32768, window)


def test_params_with_more(tmp_path: Path) -> None:
    more = {"max_seq_len": 4096, "tied_embeddings": True, "model_type": "transformer", "moe": None, "use_biases": False}
    args = ModelArgs.from_folder(write(tmp_path, "params.json", {**PARAMS, **more}))
    assert (args.context, args.tied_embeddings) == (4096, True)


def test_config_comes_before_params(tmp_path: Path) -> None:
    write(write(tmp_path, "params.json", PARAMS), "config.json", CONFIG)
    assert ModelArgs.from_folder(tmp_path).context == 2048
    assert ModelArgs.from_file(tmp_path / "params.json").context == 32768


def test_defaults_of_a_config(tmp_path: Path) -> None:
    """As transformers has them: heads of their own for KV, head_dim by division, a theta of 1e4."""
    config = {name: value for name, value in CONFIG.items() if name not in ("num_key_value_heads", "head_dim")}
    args = ModelArgs.from_config({**config, "rope_theta": None})
    assert (args.n_kv_heads, args.head_dim, args.rope_theta) == (4, 16, 1e4)


def test_only_mistral_has_a_window() -> None:
    """transformers' Llama takes no notice of one in its config."""
    config = {**CONFIG, "sliding_window": 512}
    assert ModelArgs.from_config(config).sliding_window == 512
    without = {name: value for name, value in CONFIG.items() if name != "sliding_window"}
    assert ModelArgs.from_config(without).sliding_window == MistralConfig().sliding_window == 4096
    assert ModelArgs.from_config(CONFIG).sliding_window is None
    assert ModelArgs.from_config({**config, **LLAMA}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({"rope_scaling": None}, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeScaling("linear", 2)),
        ({"rope_scaling": LLAMA3}, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_scaling": {**LLAMA3, "type": "llama3"}}, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
        ({"rope_parameters": {**LLAMA3, "factor": 32.0}}, RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)),
    ],
    ids=str,
)
def test_rope_scaling(change: dict[str, Any], scaling: RopeScaling | None) -> None:
    """In both files, under both of its names, old and new."""
    assert ModelArgs.from_config({**CONFIG, **change}).rope_scaling == scaling
    assert ModelArgs.from_params({**PARAMS, **change}).rope_scaling == scaling


def test_the_first_length_of_a_config_itself_comes_first() -> None:
    """As transformers has it."""
    args = ModelArgs.from_config({**CONFIG, "rope_scaling": LLAMA3, "original_max_position_embeddings": 4096})
    assert args.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 4096)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, r"partial_rotary_factor 0\.25"),
        *(
            ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"uses rope scaling '{kind}'")
            for kind in ("dynamic", "yarn", "longrope", "mrope", "su")
        ),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        *(
            ({"rope_scaling": {"type": "linear", "factor": value}}, "the rope scaling's factor is")
            for value in (0, -2, "8", None, True, float("nan"))
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        *(
            ({"rope_parameters": {**LLAMA3, name: value}}, f"the rope scaling's {name} is")
            for name, value in (("high_freq_factor", []), ("original_max_position_embeddings", 8192.5))
        ),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 is not below its high_freq"),
        (
            {"rope_parameters": {name: LLAMA3[name] for name in LLAMA3 if name[0] != "o"}},
            "original_max_position_embeddings is None",
        ),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}},
            "rope scaling 'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": {"type": "default"}}, "rope scaling 'yarn'"),
        ({"rope_scaling": {"rope_type": "default", "type": "linear"}}, "both default and linear, which contradict"),
        (
            {"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 8.0}},
            "both llama3 and linear, which contradict",
        ),
        ({"rope_scaling": {"factor": 4.0}}, r"rope scaling 4\.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters for 'full_attention'"),
        ({"model_type": "llama"}, "MistralForCausalLM and the model_type llama, which contradict"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM and the model_type mistral, which contradict"),
        ({"model_type": "qwen2"}, "MistralForCausalLM and the model_type qwen2, which contradict"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; its config must give true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, r"quantised checkpoint \(compressed-tensors"),
        ({"num_key_value_heads": 3}, "cannot share 3 KV heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_size": True}, "dim is True"),
        ({"hidden_size": 64.0}, r"dim is 64\.0"),
        ({"num_hidden_layers": 0}, "n_layers is 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "n_heads is 0"),
        ({"num_attention_heads": -4, "head_dim": None}, "n_heads is -4"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rms_norm_eps": "small"}, "norm_eps is 'small'"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"max_position_embeddings": 10**15}, "context is 1000000000000000"),
        ({"architectures": {"0": "MistralForCausalLM"}}, "the architecture is not given"),
        ({"architectures": [["MistralForCausalLM"]]}, r"the architecture is \['Mistral"),
        ({"rope_parameters": [1]}, "a value of the wrong type"),
        ({"rope_parameters": []}, "a value of the wrong type"),
        *(({"rope_theta": value}, "rope_theta is") for value in (0, 0.0, "", [], {}, False)),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
        *(({"num_key_value_heads": value}, "n_kv_heads is") for value in (0, "", [], {}, False)),
        *(({"head_dim": value}, "head_dim is") for value in (0, "", [], {}, False)),
    ],
    ids=str,
)
def test_configs_that_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path, "config.json", {**CONFIG, **change})
    with pytest.raises(ModelError, match=says) as caught:
        ModelArgs.from_folder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"moe": {"num_experts": 8}}, "uses moe"),
        ({"causal": False}, "uses causal False"),
        ({"tied_embeddings": "yes"}, "tied_embeddings is 'yes'"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "uses quantization"),
        ({"vision_encoder": {"hidden_size": 1024}}, "uses vision_encoder"),
        ({"yarn": {"factor": 16}}, "uses yarn"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "uses rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5"),
        ({"llama_4_scaling": {"beta": 0.1}}, "uses llama_4_scaling"),
        ({"use_biases": True}, "uses use_biases"),
        ({"model_type": "mamba"}, "uses model_type 'mamba'"),
        ({"sliding_window": [None, 32768]}, r"sliding_window is \[None, 32768\]"),
        ({"hidden_dim": None}, "hidden_dim is None"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"max_seq_len": 0}, "context is 0"),
    ],
    ids=str,
)
def test_params_that_are_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    write(tmp_path, "params.json", {**PARAMS, **change})
    with pytest.raises(ModelError, match=says) as caught:
        ModelArgs.from_folder(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "params.json"))


def test_a_folder_without_either(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json and no params\.json"):
        ModelArgs.from_folder(tmp_path)
