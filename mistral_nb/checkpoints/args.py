"""The shape of a model, read from a checkpoint's `config.json` or `params.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mistral_nb.checkpoints.untrusted import quoted, read_object
from mistral_nb.errors import ModelError

__all__ = ["ModelArgs", "RopeScaling"]

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
"""Each with the model_type that goes with it."""
DEFAULT_CONTEXT = 32_768
"""Tokens, where a `params.json` does not say, as those of the 7B models do not."""
_WINDOW = 4096
"""Tokens, where a Mistral's `config.json` has no such key; null is none."""
_PARAMS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps", "rope_theta"),
    *("sliding_window", "_sliding_window", "max_seq_len", "max_position_embeddings", "tied_embeddings"),
    *("model_type", "max_batch_size", "causal", "rope_parameters", "rope_scaling"),
}
_LARGEST = 1 << 24


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How RoPE's angles are stretched, in Hugging Face's names; the last three are of "llama3" alone."""

    rope_type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise ModelError(
                    f"the rope scaling's {name} is {quoted(repr(value))}; its config must give a positive number"
                )
        if not _is_whole(self.original_max_position_embeddings):
            raise ModelError(
                "the rope scaling's original_max_position_embeddings is "
                f"{quoted(repr(self.original_max_position_embeddings))}; its config must give a whole number"
            )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ModelError(
                f"the rope scaling's low_freq_factor {self.low_freq_factor} is not below its high_freq_factor "
                f"{self.high_freq_factor}; fetch the checkpoint again"
            )


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
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "context")
        for name in sizes:
            value = getattr(self, name)
            if not _is_whole(value):
                raise ModelError(
                    f"the model's {name} is {quoted(repr(value))}; its config must give a whole number "
                    f"from 1 to {_LARGEST}"
                )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not _is_positive(value):
                raise ModelError(f"the model's {name} is {quoted(repr(value))}; its config must give a positive number")
        if self.sliding_window is not None and not _is_whole(self.sliding_window):
            raise ModelError(
                f"the model's sliding_window is {quoted(repr(self.sliding_window))}; it must be null "
                f"or a whole number of tokens up to {_LARGEST}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ModelError(
                f"{self.n_heads} query heads cannot share {self.n_kv_heads} KV heads evenly; fetch the checkpoint again"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd, and RoPE needs pairs; choose another model")

    @classmethod
    def from_folder(cls, folder: Path) -> ModelArgs:
        """From `config.json`, or Mistral's `params.json` where there is none. `ModelError` says what is wrong in it."""
        for name in ("config.json", "params.json"):
            if (folder / name).exists():
                return cls.from_file(folder / name)
        raise ModelError(f"{folder} holds no config.json and no params.json; give the folder of a checkpoint")

    @classmethod
    def from_file(cls, path: Path) -> ModelArgs:
        """From a `params.json`, in Mistral's own keys, or a `config.json`, in Hugging Face's."""
        config = read_object(path)
        try:
            return cls.from_params(config) if path.name == "params.json" else cls.from_config(config)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error
        except KeyError as error:
            raise ModelError(f"{path} lacks {error}; fetch the checkpoint again") from error
        except (TypeError, AttributeError) as error:
            raise ModelError(f"{path} has a value of the wrong type ({error}); fetch the checkpoint again") from error

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelArgs:
        """From Hugging Face's `config.json`. What this engine would compute wrongly is refused by name."""
        architectures = config.get("architectures")
        architecture = architectures[0] if architectures and isinstance(architectures, list) else "not given"
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise ModelError(
                f"the architecture is {quoted(architecture)}; supported are {' and '.join(ARCHITECTURES)}: "
                "choose a model of these"
            )
        model_type = config.get("model_type")
        if model_type not in (None, ARCHITECTURES[architecture]):
            raise ModelError(
                f"the architecture is {architecture} and the model_type {quoted(model_type)}, which contradict each "
                "other; fetch the checkpoint again"
            )
        rope, scaling = _rope(config)
        _refuse_in_config(config, rope)
        dim, n_heads = config["hidden_size"], config["num_attention_heads"]
        mistral = architecture == "MistralForCausalLM"
        return cls(
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=_first(config.get("num_key_value_heads"), n_heads),
            head_dim=_first(config.get("head_dim"), _divided(dim, n_heads)),
            hidden_dim=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=_first(rope.get("rope_theta"), config.get("rope_theta"), 10_000.0),
            context=config["max_position_embeddings"],
            sliding_window=config.get("sliding_window", _WINDOW) if mistral else None,
            tied_embeddings=_truth("tie_word_embeddings", config),
            rope_scaling=scaling,
        )

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> ModelArgs:
        """From Mistral's `params.json`. Keys that are not known here are refused by name: they may change the sums.

        Defaults are those of mistral-inference: a rope_theta of 1e6, or 1e4 with a window. A rope scaling, of which
        Mistral's own have none, is read as in a `config.json`.
        """
        _refuse({name: params[name] or None for name in sorted(params.keys() - _PARAMS)})
        _refuse({"model_type": _other(params.get("model_type"), "transformer")})
        _refuse({"causal": _other(params.get("causal"), True)})
        rope, scaling = _rope(params)
        _refuse({"partial_rotary_factor": _other(rope.get("partial_rotary_factor"), 1.0)})
        window = _first(params.get("sliding_window"), params.get("_sliding_window"))
        return cls(
            dim=params["dim"],
            n_layers=params["n_layers"],
            n_heads=params["n_heads"],
            n_kv_heads=params["n_kv_heads"],
            head_dim=params["head_dim"],
            hidden_dim=params["hidden_dim"],
            vocab_size=params["vocab_size"],
            norm_eps=params["norm_eps"],
            rope_theta=_first(rope.get("rope_theta"), params.get("rope_theta"), 10_000.0 if window else 1_000_000.0),
            context=_first(params.get("max_seq_len"), params.get("max_position_embeddings"), DEFAULT_CONTEXT),
            sliding_window=window,
            tied_embeddings=_truth("tied_embeddings", params),
            rope_scaling=scaling,
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30


def _refuse(unsupported: Mapping[str, Any]) -> None:
    for name, value in unsupported.items():
        if value is not None:
            raise ModelError(
                f"the model uses {quoted(name)} {quoted(repr(value))}, which this engine does not apply; "
                "choose another model"
            )


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], RopeScaling | None]:
    """What the config says of RoPE under both of its names, and the scaling that it asks for there.

    Of kinds beside "default" this engine applies "linear" and "llama3".
    """
    merged: dict[str, Any] = {}
    found: list[str] = []
    for name in ("rope_parameters", "rope_scaling"):
        part = _first(config.get(name), {})
        kinds = [part[key] for key in ("rope_type", "type") if part.get(key) is not None]
        _refuse({"rope scaling": next((kind for kind in kinds if kind not in ("default", "linear", "llama3")), None)})
        _refuse({"rope scaling": None if kinds else _other(part.get("factor"), 1.0)})
        _refuse({f"{name} for": next((key for key, value in part.items() if isinstance(value, Mapping)), None)})
        merged |= part
        found += kinds
    kind = found[0] if found else "default"
    other = next((other for other in found if other != kind), None)
    if other is not None:
        raise ModelError(
            f"the rope scaling is both {kind} and {other}, which contradict each other; fetch the checkpoint again"
        )
    if kind == "default":
        return merged, None
    if kind == "linear":
        return merged, RopeScaling("linear", merged["factor"])
    # as transformers reads it, the config's own comes first
    original = _first(config.get("original_max_position_embeddings"), merged.get("original_max_position_embeddings"))
    return merged, RopeScaling(
        "llama3", merged["factor"], merged["low_freq_factor"], merged["high_freq_factor"], original
    )


def _refuse_in_config(config: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """What a model of a supported architecture may still ask for; `rope` is its part about RoPE."""
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        raise ModelError(
            f"the config is that of a quantised checkpoint ({quoted(_method(quantised))}); fetch the unquantised "
            "version, which can be loaded in int8"
        )
    _refuse(
        {
            "hidden_act": None if config.get("hidden_act", "silu") == "silu" else config["hidden_act"],
            "attention_bias": config.get("attention_bias") or None,
            "mlp_bias": config.get("mlp_bias") or None,
            "partial_rotary_factor": _other(
                rope.get("partial_rotary_factor", config.get("partial_rotary_factor")), 1.0
            ),
        }
    )


def _first(*values: Any) -> Any:
    """The first that is set: null is as if the key were not there, and nothing else is."""
    return next((value for value in values if value is not None), None)


def _other(value: Any, default: Any) -> Any:
    """`value` where it is set and is not `default`."""
    return None if value is None or value == default else value


def _truth(name: str, config: Mapping[str, Any]) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"the model's {name} is {quoted(repr(value))}; its config must give true or false")
    return bool(value)


def _divided(dim: Any, n_heads: Any) -> int:
    """0, which is refused where none of the two is, if they are no sizes."""
    return int(dim // n_heads) if _is_whole(dim) and _is_whole(n_heads) else 0


def _method(quantised: Any) -> Any:
    return quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else quantised
