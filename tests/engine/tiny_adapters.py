"""A tiny Mistral, LoRA adapters for it, written by hand or as PEFT saves them, and engines that apply them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import MistralConfig, PreTrainedModel
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

from mistral_nb.checkpoints import open_checkpoint
from mistral_nb.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, features
from mistral_nb.checkpoints.adapter_tensors import MODULES
from mistral_nb.checkpoints.memory import Precision
from mistral_nb.engine import AdapterSource, Engine, EngineInfo, Generation, Sampling
from mistral_nb.engine.adapters import AdapterSlots
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.runner import DirectRunner
from mistral_nb.engine.weights import load_weights
from mistral_nb_kernels import choose

__all__ = [
    "CONTEXT",
    "CPU",
    "LONG",
    "PLACES",
    "PROMPT",
    "VOCAB",
    "Tiny",
    "engine_of",
    "engines_of",
    "holders",
    "source",
    "submit",
    "tiny",
    "write",
]

CPU = torch.device("cpu")
VOCAB, CONTEXT, LAYERS, PLACES = 300, 512, 2, 4
PROMPT = list(range(40, 60))
LONG = [i * 7 % VOCAB for i in range(300)]


@dataclass(frozen=True)
class Tiny:
    """A model in transformers' form and in ours."""

    folder: Path
    oracle: PreTrainedModel
    model: Transformer


def tiny(folder: Path, precision: Precision = "fp32") -> Tiny:
    """In int8 a row is the same to the bit in a batch of any size; in fp32 a text may part after 150 tokens."""
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT, sliding_window=None,
    )  # fmt: skip
    oracle = MistralForCausalLM(config).eval()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    oracle.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    weights = load_weights(checkpoint, precision, CPU)
    ops = choose(CPU, checkpoint.args.head_dim, weights.tok_embeddings.dtype)
    return Tiny(folder, oracle, Transformer(checkpoint.args, weights, ops))


def write(
    folder: Path,
    tiny: Tiny,
    modules: Sequence[str] = tuple(MODULES),
    rank: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] = range(LAYERS),
    size: float = 1.0,
    sizes: Mapping[str, int] | None = None,
    **config: Any,
) -> AdapterSource:
    """An adapter by hand, whose updates are as large as the weights."""
    random, sizes = torch.Generator().manual_seed(seed), {**features(tiny.model.args), **(sizes or {})}
    tensors = {}
    for layer in layers:
        for module in modules:
            into, out = (sizes[name] for name in MODULES[module])
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}"
            for side, shape in (("A", (rank, into)), ("B", (out, rank))):
                values = torch.randn(shape, generator=random) * 0.3 * size**0.5
                tensors[f"{name}.lora_{side}.weight"] = values.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE)
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "target_modules": list(modules)}
    (folder / CONFIG_FILE).write_text(json.dumps({**told, "base_model_name_or_path": str(tiny.folder), **config}))
    return source(folder)


def source(folder: Path) -> AdapterSource:
    return AdapterSource(str(folder), folder)


def engine_of(base: Tiny, ahead: bool = False, tokens: int = PLACES * CONTEXT, **how: Any) -> Engine:
    """`ahead`: as on a GPU, in pages that grow; else as on the CPU. `how` is the slots'."""
    pool = KVPool(base.model.args, PLACES, tokens, base.model.kv_dtype, CPU, 16 if ahead else None)
    slots = AdapterSlots(base.model.args, base.model.dtype, CPU, **how)
    info = EngineInfo("tiny", "CPU", "fp32", CONTEXT, VOCAB, 1, str(base.model.ops))
    return Engine(GraphRunner(base.model, pool, slots) if ahead else DirectRunner(base.model, pool, 1, slots), info)


@contextmanager
def engines_of(base: Tiny) -> Iterator[Callable[..., Engine]]:
    """`engine_of`, whose engines end with the context."""
    with ExitStack() as stack:
        yield lambda *args, **how: stack.enter_context(closing(engine_of(base, *args, **how)))


def submit(
    engine: Engine, adapter: AdapterSource | None, scale: float = 1.0, prompt: list[int] = PROMPT, count: int = 30
) -> Generation:
    sampling = Sampling(temperature=0.7, seed=11)
    return engine.submit(prompt, sampling, count, adapter=adapter, lora_scale=scale)


def holders(engine: Engine, source: AdapterSource) -> set[Any]:
    """Who has an adapter, or waits until it is read."""
    resident = engine._adapters._residents.get(source.key)
    return set(resident.holders) if resident else set()
