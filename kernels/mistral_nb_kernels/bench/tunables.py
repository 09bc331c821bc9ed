"""What the tuner tunes: of every op in the table of configs the shapes and the configs that are worth timing."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mistral_nb_kernels.bench.attention_cases import decode_case, prefill_case, rope_case
from mistral_nb_kernels.bench.case import Case, Maker, Tunable
from mistral_nb_kernels.bench.linear_cases import expand_case, linear_case, norm_case, shrink_case, swiglu_case
from mistral_nb_kernels.bench.sampling_cases import sample_case
from mistral_nb_kernels.configs import HEAD_DIMS, Config
from mistral_nb_kernels.paged import PAGE

__all__ = ["TUNABLES"]


def _kernel(module: str, op: str, *, matrix: bool = False) -> Callable[[Config, int], Callable[..., Any]]:
    """Binds an op of a module of kernels, which is imported where it is timed: it needs triton."""

    def bind(config: Config, arch: int) -> Callable[..., Any]:
        keywords = {"config": config, **({"dot": arch >= 80} if matrix else {})}
        return functools.partial(getattr(importlib.import_module(f"mistral_nb_kernels.{module}"), op), **keywords)

    return bind


def _headed(make: Callable[..., Case], *shape: int) -> Maker:
    """A case of an op whose width is its head dimension, which follows the shape."""
    return lambda width, dtype, device: make(*shape, width, dtype=dtype, device=device)


def _of(make: Callable[..., Case], *how: Any) -> Maker:
    """A case of an op that has no width."""
    return lambda width, dtype, device: make(*how, dtype=dtype, device=device)


AHEAD = 160 * 1024
"""Bytes of weights that a multiprocessor may have on their way: its shared memory holds no more on 8.0."""


def _linear(bits: int, *kinds: str) -> Tunable:
    """Gate and up first, half of all traffic; then every layer at one row, and two at eight."""
    layers = [_of(linear_case, layer, 1, kinds[0]) for layer in ("gate, up", "qkv", "o", "down", "head")]
    eights = [_of(linear_case, "down", 8, kinds[0]), *(_of(linear_case, "qkv", 8, kind) for kind in kinds)]
    candidates = itertools.product((4, 8), (3, 4, 5), (32, 64), (32, 64, 128))
    return Tunable(
        "linear",
        (0,),
        _kernel("linear", "linear", matrix=True),
        (*layers, *eights),
        tuple(
            Config(warps, stages, block_n=block_n, block_k=block_k)
            for warps, stages, block_n, block_k in candidates
            if warps * stages * block_n * block_k * max(bits // 8, 1) <= AHEAD
        ),
        bits=bits,
    )


def _shrink_tiles(config: Config) -> Iterator[Config]:
    """And those for many rows."""
    yield config
    for stages, block_m, block_n, block_k in itertools.product((3, 4, 5), (16, 32, 64), (16, 32, 64), (64, 128)):
        yield replace(config, stages=stages, block_m=block_m, block_n=block_n, block_k=block_k)


def _expand_tiles(config: Config) -> Iterator[Config]:
    yield config
    for block_m, block_k in itertools.product((32, 64, 128), (16, 64)):
        yield replace(config, block_m=block_m, block_k=block_k)


MANY = 2048
"""Rows of a prompt."""
TILES = tuple(block for block in (32, 64, 128) if block <= PAGE)
"""Keys of a tile: none crosses a page."""
TUNABLES = (
    Tunable(
        "rope_write",
        HEAD_DIMS,
        _kernel("rope", "rope_write"),
        (_headed(rope_case, 8192), _headed(rope_case, 2048)),
        tuple(Config(warps) for warps in (1, 2, 4, 8)),
    ),
    Tunable(
        "prefill_attention",
        HEAD_DIMS,
        _kernel("attention", "prefill_attention"),
        (_headed(prefill_case, 8192), _headed(prefill_case, 2048)),
        tuple(
            Config(warps, stages, block_m=block_m, block_n=block_n)
            for warps, stages, block_m, block_n in itertools.product((4, 8), (2, 3, 4), (64, 128), TILES)
        ),
    ),
    Tunable(
        "decode_attention",
        HEAD_DIMS,
        _kernel("decode_attention", "rope_decode_attention", matrix=True),
        tuple(
            _headed(decode_case, batch, t)
            for batch, t in ((1, 8192), (1, 512), (1, 2048), (1, 32768), (8, 512), (8, 2048), (8, 8192))
        ),
        tuple(
            Config(warps, stages, block_n=block_n, split=256)
            for warps, stages, block_n in itertools.product((2, 4, 8), (2, 3, 4), TILES)
        ),
        lambda config: (replace(config, split=split) for split in (64, 128, 256, 512)),
    ),
    _linear(16, "dense"),
    _linear(8, "int8"),
    _linear(4, "int4 g128", "int4 g32"),
    Tunable(
        "lora_shrink",
        (0,),
        _kernel("lora", "lora_shrink"),
        (
            _of(shrink_case, "down", 1, 1),
            _of(shrink_case, "qkv", 1, 1),
            _of(shrink_case, "gate, up", 8, 8),
            _of(shrink_case, "qkv", MANY, 1),
            _of(shrink_case, "down", MANY, 1),
        ),
        tuple(map(Config, (4, 8, 16))),
        _shrink_tiles,
    ),
    Tunable(
        "lora_expand",
        (0,),
        _kernel("lora", "lora_expand"),
        (
            _of(expand_case, "qkv", 16, 4),
            _of(expand_case, "gate, up", 16, 4),
            _of(expand_case, "qkv", MANY, 1),
            _of(expand_case, "gate, up", MANY, 1),
        ),
        tuple(Config(warps, block_n=block_n) for warps, block_n in itertools.product((4, 8), (64, 128))),
        _expand_tiles,
    ),
    Tunable(
        "rms_norm",
        (0,),
        _kernel("rms_norm", "add_rms_norm"),
        tuple(_of(norm_case, rows) for rows in (1, 8, MANY)),
        tuple(map(Config, (4, 8, 16, 32))),
    ),
    Tunable(
        "swiglu",
        (0,),
        _kernel("swiglu", "swiglu"),
        tuple(_of(swiglu_case, rows) for rows in (MANY, 9)),
        tuple(Config(warps, block_n=block_n) for warps, block_n in itertools.product((2, 4, 8), (512, 1024, 2048))),
    ),
    Tunable(
        "sample",
        (0,),
        _kernel("sampling", "sample"),
        tuple(
            _of(sample_case, asked, rows)
            for asked, rows in (("top-k, top-p", 1), ("top-p", 8), ("greedy", 1), ("penalties, top-k, top-p", 8))
        ),
        tuple(
            Config(warps, block_n=block_n)
            for warps, block_n in itertools.product((8, 16, 32), (2048, 4096, 8192, 16384))
        ),
    ),
)
