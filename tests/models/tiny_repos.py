"""The files of repositories with Mistral-shaped checkpoints of some megabytes, in each layout that the hub has."""

from __future__ import annotations

import functools
import json
import random

from tests.checkpoints import tiny
from tests.checkpoints.tiny import HUGGING_FACE, TOP, VOCABULARY, Tensors

LAYERS, DIM, HIDDEN, HEADS, KV = 3, 256, 512, 4, 128

CONFIG = tiny.CONFIG | {
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "head_dim": DIM // HEADS,
}
PARAMS = tiny.PARAMS | {"dim": DIM, "n_layers": LAYERS, "head_dim": DIM // HEADS, "hidden_dim": HIDDEN}
SHAPES = {
    "tok_embeddings": (VOCABULARY, DIM),
    "norm": (DIM,),
    "output": (VOCABULARY, DIM),
    "attention_norm": (DIM,),
    "attention.wq": (DIM, DIM),
    "attention.wk": (KV, DIM),
    "attention.wv": (KV, DIM),
    "attention.wo": (DIM, DIM),
    "ffn_norm": (DIM,),
    "feed_forward.w1": (HIDDEN, DIM),
    "feed_forward.w2": (DIM, HIDDEN),
    "feed_forward.w3": (HIDDEN, DIM),
}


@functools.cache
def _sharded(shards: int, seed: int) -> dict[str, bytes]:
    tensors = _tensors("model.layers.{}.{}.weight", HUGGING_FACE)
    files = _texts() | {"config.json": json.dumps(CONFIG).encode()}
    if shards == 1:
        return files | {"model.safetensors": _weights(tensors, seed)}
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    weight_map = {tensor: names[number * shards // len(tensors)] for number, tensor in enumerate(tensors)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    for number, name in enumerate(names):
        part = {tensor: told for tensor, told in tensors.items() if weight_map[tensor] == name}
        files[name] = _weights(part, seed + number)
    return files


def sharded(shards: int = 3, seed: int = 0) -> dict[str, bytes]:
    """Hugging Face's layout with an index. One shard: a single file without one."""
    return dict(_sharded(shards, seed))


@functools.cache
def _consolidated() -> dict[str, bytes]:
    weights = _weights(_tensors("layers.{}.{}.weight", {part: part for part in SHAPES}), 0)
    return _texts() | {"params.json": json.dumps(PARAMS).encode(), "consolidated.safetensors": weights}


def consolidated() -> dict[str, bytes]:
    """Mistral's own layout."""
    return dict(_consolidated())


def _texts() -> dict[str, bytes]:
    return {
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "tokenizer.json": tiny.json_tokenizer().encode(),
        "tokenizer_config.json": b"{}",
        "generation_config.json": b"{}",
    }


def _tensors(form: str, called: dict[str, str]) -> Tensors:
    """Dtype and shape by name; `form` makes a name in a layer from its number and what the part is called."""
    inner = [part for part in SHAPES if part not in TOP]
    tensors: Tensors = {f"{called[part]}.weight": ("BF16", SHAPES[part]) for part in TOP}
    for layer in range(LAYERS):
        tensors |= {form.format(layer, called[part]): ("BF16", SHAPES[part]) for part in inner}
    return tensors


def _weights(tensors: Tensors, seed: int) -> bytes:
    """A safetensors file of random bytes without a period, so that no range of it passes for another."""
    header, size = tiny.laid_out(tensors)
    return tiny.packed(header, random.Random(seed).randbytes(size))
