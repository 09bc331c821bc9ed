"""A model with random weights that several files of tests run: its pools, and engines whose steps run ahead or not."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

from mistral_nb.checkpoints import open_checkpoint
from mistral_nb.engine import Engine
from mistral_nb.engine.engine import EngineInfo
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import KVPool
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.runner import DirectRunner
from mistral_nb.engine.weights import load_weights
from mistral_nb_kernels import choose

__all__ = ["CHUNK", "CONTEXT", "CPU", "PAGE", "PLACES", "VOCAB", "pool_of", "small_engine", "small_transformer"]

CPU = torch.device("cpu")
VOCAB, CONTEXT, PLACES, PAGE, CHUNK = 300, 128, 4, 16, 16


def small_transformer(folder: Path, window: int = 100) -> Transformer:
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=CONTEXT, sliding_window=window,
    )  # fmt: skip
    oracle = MistralForCausalLM(config)
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    oracle.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    ops = choose(CPU, checkpoint.args.head_dim, torch.float32)
    return Transformer(checkpoint.args, load_weights(checkpoint, "fp32", CPU), ops)


def pool_of(model: Transformer, page: int | None = PAGE, tokens: int = PLACES * CONTEXT) -> KVPool:
    return KVPool(model.args, PLACES, tokens, torch.float32, CPU, page)


def small_engine(model: Transformer, ahead: bool, tokens: int = PLACES * CONTEXT) -> Engine:
    """`ahead`: as on a GPU, in pages that grow; else as on the CPU. Chunks are short."""
    runner = GraphRunner(model, pool_of(model, PAGE, tokens)) if ahead else DirectRunner(model, pool_of(model, None), 1)
    runner.chunk = CHUNK
    return Engine(runner, EngineInfo("small", "CPU", "fp32", CONTEXT, VOCAB, 1, str(model.ops)))
