"""A transformers model written as Mistral writes its own checkpoints: params.json and consolidated.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def save_consolidated(model: PreTrainedModel, folder: Path, *, shards: int = 1) -> Path:
    """`shards` > 1 gives several files and an index."""
    folder.mkdir(parents=True)
    config = model.config
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "max_seq_len": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
    }
    window = getattr(config, "sliding_window", None)
    if window:
        params["sliding_window"] = window
    if config.rope_parameters["rope_type"] != "default":
        params["rope_parameters"] = config.rope_parameters
    (folder / "params.json").write_text(json.dumps(params))
    tensors = {_name(name): _interleaved(name, each, head_dim) for name, each in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["output.weight"]
    if shards == 1:
        save_file(tensors, folder / "consolidated.safetensors")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"consolidated-{number + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _name(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


def _interleaved(name: str, tensor: Tensor, head_dim: int) -> Tensor:
    """The rows of q and k with the two halves of each rotated pair beside each other."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor.clone()
    return tensor.view(-1, 2, head_dim // 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()
