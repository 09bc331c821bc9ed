"""Checkpoint files to packed device tensors: names translated, matrices stacked and quantised as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import mistral_nb_kernels as ops
from mistral_nb.engine.args import ModelArgs
from mistral_nb.engine.model import FloatLinear, Int8Linear, Layer, Linear, Weights
from mistral_nb.errors import ModelError

__all__ = ["Precision", "load_weights"]

Precision = Literal["fp32", "bf16", "fp16", "int8"]
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
}


class Checkpoint:
    """The tensors of a folder of safetensors files by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for path in sorted(self._paths(folder)):
                file = self._open.enter_context(safe_open(path, framework="pt"))
                self._files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError) as error:
            self.close()
            raise ModelError(f"{path} cannot be read ({error}); fetch the checkpoint again") from error

    @staticmethod
    def _paths(folder: Path) -> set[Path]:
        index = folder / "model.safetensors.index.json"
        if not index.is_file():
            path = folder / "model.safetensors"
            if not path.is_file():
                raise ModelError(f"{folder} holds no model.safetensors; give a Hugging Face checkpoint folder")
            return {path}
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index} is not a valid index; fetch the checkpoint again") from error
        for name in names:
            if Path(name).name != name:
                raise ModelError(f"{index} points outside its folder, to {name!r}; fetch the checkpoint again")
            if not (folder / name).is_file():
                raise ModelError(f"{folder} lacks the shard {name}; fetch the checkpoint again")
        return {folder / name for name in names}

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must have `shape`."""
        if name not in self._files:
            raise ModelError(f"the checkpoint lacks the tensor {name}; fetch it again")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(f"the tensor {name} is {list(tensor.shape)}; the config asks for {list(shape)}")
        if not tensor.is_floating_point():
            raise ModelError(f"the tensor {name} is {tensor.dtype}; quantised checkpoints are not supported")
        return tensor

    def close(self) -> None:
        self._open.close()


def load_weights(folder: Path, args: ModelArgs, precision: Precision, device: torch.device) -> Weights:
    """Read a Hugging Face folder; `int8` keeps one scale per output row, and fp32 activations. Errors: `ModelError`."""
    dtype = DTYPES[precision]
    checkpoint = Checkpoint(folder)

    def vector(name: str, size: int) -> Tensor:
        return checkpoint.take(name, size).to(device, dtype)

    def matrix(*parts: tuple[str, int], inputs: int) -> Linear:
        stacked = torch.cat([checkpoint.take(name, outputs, inputs) for name, outputs in parts])
        return pack(stacked, precision, device)

    try:
        layers = tuple(_layer(f"model.layers.{i}.", args, vector, matrix) for i in range(args.n_layers))
        embeddings = checkpoint.take("model.embed_tokens.weight", args.vocab_size, args.dim).to(device, dtype)
        if args.tied_embeddings:
            output = pack(embeddings, precision, device)
        else:
            output = matrix(("lm_head.weight", args.vocab_size), inputs=args.dim)
        return Weights(embeddings, layers, vector("model.norm.weight", args.dim), output)
    finally:
        checkpoint.close()


def _layer(prefix: str, args: ModelArgs, vector: Callable[[str, int], Tensor], matrix: Callable[..., Linear]) -> Layer:
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return Layer(
        attention_norm=vector(prefix + "input_layernorm.weight", args.dim),
        wqkv=matrix(
            (attention + "q_proj.weight", q_dim),
            (attention + "k_proj.weight", kv_dim),
            (attention + "v_proj.weight", kv_dim),
            inputs=args.dim,
        ),
        wo=matrix((attention + "o_proj.weight", args.dim), inputs=q_dim),
        ffn_norm=vector(prefix + "post_attention_layernorm.weight", args.dim),
        w13=matrix(
            (mlp + "gate_proj.weight", args.hidden_dim), (mlp + "up_proj.weight", args.hidden_dim), inputs=args.dim
        ),
        w2=matrix((mlp + "down_proj.weight", args.dim), inputs=args.hidden_dim),
    )


def pack(weight: Tensor, precision: Precision, device: torch.device) -> Linear:
    """A matrix [out, in] in `precision` on `device`."""
    if precision == "int8":
        if weight.shape[1] % 32:
            raise ModelError(f"int8 needs matrices with a multiple of 32 inputs, not {weight.shape[1]}; choose fp32")
        values, scale = ops.quantize_int8(weight.to(device, torch.float32))
        return Int8Linear(values, scale)
    return FloatLinear(weight.to(device, DTYPES[precision]))
