"""The shape of a model, read from a checkpoint's `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_nb.errors import ModelError

__all__ = ["ModelArgs"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """Sizes of a Llama-family transformer, in Mistral's own names. `sliding_window` in tokens; None: full attention."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    context: int
    sliding_window: int | None = None
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "context")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ModelError(f"the model's {name} is {value!r}; its config must give a positive whole number")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ModelError(f"the model's {name} is {value!r}; its config must give a positive number")
        if self.sliding_window is not None and (not isinstance(self.sliding_window, int) or self.sliding_window < 1):
            raise ModelError(f"the model's sliding_window is {self.sliding_window!r}; it must be null or whole tokens")
        if self.n_heads % self.n_kv_heads:
            raise ModelError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} KV heads evenly; fetch the checkpoint again"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd, and RoPE needs pairs; choose another checkpoint")

    @classmethod
    def from_folder(cls, folder: Path) -> ModelArgs:
        """From a checkpoint folder; `ModelError` names the file and what is wrong in it."""
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"{folder} holds no config.json; give a Hugging Face checkpoint folder")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON ({error}); fetch the checkpoint again") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path} holds no JSON object; fetch the checkpoint again")
        try:
            return cls.from_config(config)
        except KeyError as error:
            raise ModelError(f"{path} lacks {error}; fetch the checkpoint again") from error
        except (TypeError, AttributeError) as error:
            raise ModelError(f"{path} has a value of the wrong type ({error}); fetch the checkpoint again") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelArgs:
        """From Hugging Face's `config.json`. What this engine would compute wrongly is refused by name."""
        architectures = config.get("architectures") or ["nothing"]
        if architectures[0] not in ARCHITECTURES:
            raise ModelError(f"the architecture is {architectures[0]}; supported are {' and '.join(ARCHITECTURES)}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        unsupported = {
            "rope scaling": None if kind == "default" else kind,
            "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
            "attention_bias": config.get("attention_bias") or None,
            "mlp_bias": config.get("mlp_bias") or None,
        }
        for name, value in unsupported.items():
            if value is not None:
                raise ModelError(f"the model uses {name} {value!r}, which this engine does not apply; choose another")
        dim, n_heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads") or n_heads,
            head_dim=config.get("head_dim") or dim // n_heads,
            hidden_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
            context=config["max_position_embeddings"],
            sliding_window=config.get("sliding_window"),
            tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
