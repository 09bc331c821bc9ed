"""From a checkpoint to what runs it: weights, ops, pages, slots for adapters, and the runner of the device."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import mistral_nb_kernels
from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.checkpoint import Checkpoint
from mistral_nb.checkpoints.memory import Selection
from mistral_nb.engine.adapters import SLOTS, AdapterSlots
from mistral_nb.engine.device import device_kind, free_memory, keep_freed_memory
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.info import EngineInfo
from mistral_nb.engine.kv_pool import KVPool, kv_tokens
from mistral_nb.engine.model import Transformer, Weights
from mistral_nb.engine.packed_copy import CopyWriter, copy_folder
from mistral_nb.engine.runner import DirectRunner, Runner
from mistral_nb.engine.weights import load_weights
from mistral_nb_kernels import Ops

__all__ = ["Assembled", "Plan", "assemble"]

MIN_READERS, MAX_READERS = 4, 8
"""Threads that read files. Four keep a disk busy on 2 cores: 2.2 GB/s, where two had 1.3 of its 2.9 GB/s."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a model is to be run; the names are those of `Engine.load`."""

    chosen: Selection
    device: torch.device
    threads: int
    max_batch: int
    lora_rank: int | None
    packed_copy: Path | None


@dataclass(frozen=True, slots=True)
class Assembled:
    """`write_copy` begins to write what a loading converted, at times when nothing is `active`; None: there is nothing
    to write.
    """

    runner: Runner
    info: EngineInfo
    write_copy: Callable[[Callable[[], bool]], CopyWriter | None] | None


def assemble(checkpoint: Checkpoint, plan: Plan, progress: Callable[[int, int], None]) -> Assembled:
    args, precision = replace(checkpoint.args, context=plan.chosen.context), plan.chosen.precision
    readers = max(MIN_READERS, min(plan.threads, MAX_READERS))
    copies = copy_folder(plan.packed_copy, checkpoint, precision, plan.device)
    packed = copies.open() if copies else None
    weights = load_weights(checkpoint, precision, plan.device, progress, threads=readers, packed_copy=packed)
    ops = mistral_nb_kernels.choose(plan.device, args.head_dim, weights.tok_embeddings.dtype)
    on_gpu = plan.device.type == "cuda"
    info = EngineInfo(
        model=checkpoint.folder.name,
        device=torch.cuda.get_device_name(plan.device) if on_gpu else f"CPU, {plan.threads} threads",
        precision=precision,
        context=args.context,
        vocab_size=args.vocab_size,
        threads=plan.threads,
        kernels=str(ops),
        why=plan.chosen.why,
    )
    # OpenMP keeps a thread's helpers until it ends. More of them than CPUs sleep between two operations: beside
    # those of this thread a decoding step on 2 cores took 16 ms, and 7 ms without.
    with ThreadPoolExecutor(1) as apart:
        runner = apart.submit(_runner, args, weights, ops, plan).result()
    return Assembled(runner, info, (lambda active: copies.write(weights, active)) if copies else None)


def _runner(args: ModelArgs, weights: Weights, ops: Ops, plan: Plan) -> Runner:
    model, precision = Transformer(args, weights, ops), plan.chosen.precision
    device, places = model.device, plan.max_batch
    tokens = kv_tokens(args, precision, device_kind(device), places, free_memory(device))
    pool = KVPool(args, places, tokens, model.kv_dtype, device)
    adapters = AdapterSlots(args, model.dtype, device, slots=max(SLOTS, places), rank=plan.lora_rank)
    if device.type == "cpu":
        keep_freed_memory()
        return DirectRunner(model, pool, plan.threads, adapters)
    return GraphRunner(model, pool, adapters)
