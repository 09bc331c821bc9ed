"""The points of each subject: its shapes by default on a GPU and on a CPU, and those that are asked for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from mistral_nb_kernels.bench import attention_cases, sampling_cases
from mistral_nb_kernels.bench.attention_cases import decode_case, prefill_case, rope_case
from mistral_nb_kernels.bench.case import Case, Device
from mistral_nb_kernels.bench.linear_cases import (
    expand_case,
    linear_case,
    norm_case,
    rms_case,
    shrink_case,
    swiglu_case,
)
from mistral_nb_kernels.bench.sampling_cases import sample_case
from mistral_nb_kernels.bench.subject import Asked, Point

__all__ = ["attention", "decode", "linear", "lora", "norm", "rope", "sample", "swiglu"]

PROMPTS = {"cuda": (2048, 4096, 8192, 16384), "cpu": (128, 512)}
"""Tokens."""
CONTEXTS = {"cuda": (512, 2048, 8192, 32768), "cpu": (512, 2048)}
"""Tokens of each sequence that decodes."""
BATCHES = {"cuda": (1, 8), "cpu": (1,)}
"""Sequences."""
ROWS = {"cuda": (1, 8, 2048), "cpu": (1, 8)}
"""Of steps that decode, and of a prompt."""
DRAWS = {"cuda": (1, 8), "cpu": (1, 8)}
HEAD_DIMS = {"cuda": (128, 64), "cpu": (128,)}
WINDOWED = {"cuda": ((128, False), (128, True), (64, False)), "cpu": ((128, False),)}
"""Head dimensions, and whether there is a window, of a quarter of the prompt."""
LAYERS = {"cuda": ("qkv", "gate, up", "down", "head"), "cpu": ("qkv", "down")}
KINDS = {"cuda": ("dense", "int8", "int4 g128", "int4 g32"), "cpu": ("dense", "int8")}
"""Of weights; torch's reference takes int4 ones to pieces at each call."""
ADAPTED = {"cuda": ("qkv", "gate, up", "down"), "cpu": ("qkv",)}
DRAWN = {
    "cuda": tuple(sampling_cases.ASKED),
    "cpu": ("greedy", "top-p", "top-k, top-p", "penalties, top-k, top-p"),
}


Shape = tuple[str, Mapping[str, int | str], Callable[..., Case]]
"""In words, by name, and what makes its case from a type and a device."""


def kind_of(device: Device) -> str:
    """The type of a device, which is a key of the numbers above."""
    return torch.device(device).type


def types(asked: Asked, device: Device) -> tuple[torch.dtype, ...]:
    """By default what the engine runs in."""
    if asked.dtypes is not None:
        return asked.dtypes
    if kind_of(device) == "cpu":
        return (torch.float32,)
    return (torch.float16 if torch.cuda.get_device_capability(device) < (8, 0) else torch.bfloat16,)


def rows_of(asked: Asked, device: Device) -> tuple[int, ...]:
    """Rows of ops that have nothing else: sequences that decode, and tokens of prompts."""
    if asked.seq is None and asked.batch is None:
        return ROWS[kind_of(device)]
    return tuple(dict.fromkeys((*(asked.batch or ()), *(asked.seq or ()))))


def _points(op: str, cases: Iterable[Shape], asked: Asked, device: Device) -> Iterator[Point]:
    for (words, shape, make), dtype in itertools.product(cases, types(asked, device)):

        def made(device: Device, make: Callable[..., Case] = make, dtype: torch.dtype = dtype) -> Case:
            return make(dtype=dtype, device=device)

        yield Point(op, words, shape, dtype, made)


def _ops(asked: Asked, own: Iterable[str], default: tuple[str, ...]) -> tuple[str, ...]:
    """Of a subject's own ops those that are asked for."""
    return tuple(op for op in own if op in asked.ops) or default


def attention(asked: Asked, device: Device) -> list[Point]:
    """Prompts of one sequence."""
    kind = kind_of(device)

    def cases() -> Iterator[Shape]:
        for head_dim, windowed in WINDOWED[kind]:
            for t in asked.seq or PROMPTS[kind]:
                window = max(1, t // 4) if windowed else None
                shape: dict[str, int | str] = {"tokens": t, "head_dim": head_dim}
                words = f"{_tokens(t)}, head_dim {head_dim}"
                if window is not None:
                    shape["window"] = "t/4"
                    words += f", window {window}"
                yield words, shape, functools.partial(prefill_case, t, head_dim, window=window)

    return list(_points("prefill_attention", cases(), asked, device))


def decode(asked: Asked, device: Device) -> list[Point]:
    """The newest tokens of sequences of one length, with RoPE and the KV write or, if asked for, without."""
    kind = kind_of(device)
    makes: dict[str, Callable[..., Case]] = {"rope_decode_attention": decode_case, "decode_attention": _read_case}
    found = []
    for op in _ops(asked, makes, ("rope_decode_attention",)):
        cases: Iterator[Shape] = (
            (
                f"{batch} x {_tokens(t)}, head_dim {head_dim}",
                {"batch": batch, "tokens": t, "head_dim": head_dim},
                functools.partial(makes[op], batch, t, head_dim),
            )
            for head_dim in HEAD_DIMS[kind]
            for batch in asked.batch or BATCHES[kind]
            for t in asked.seq or CONTEXTS[kind]
        )
        found += list(_points(op, cases, asked, device))
    return found


def _read_case(*shape: int, **how: Any) -> Case:
    return attention_cases.reading(decode_case(*shape, **how))


def rope(asked: Asked, device: Device) -> list[Point]:
    """Prompts of one sequence."""
    kind = kind_of(device)
    cases: Iterator[Shape] = (
        (
            f"{_tokens(t)}, head_dim {head_dim}",
            {"tokens": t, "head_dim": head_dim},
            functools.partial(rope_case, t, head_dim),
        )
        for head_dim in HEAD_DIMS[kind]
        for t in asked.seq or PROMPTS[kind]
    )
    return list(_points("rope_write", cases, asked, device))


def linear(asked: Asked, device: Device) -> list[Point]:
    """Every layer with what is fused to it, and every kind of weights; of the head dense ones."""
    kind = kind_of(device)
    cases: Iterator[Shape] = (
        (
            f"{layer}, {weights}, {_rows(rows)}",
            {"layer": layer, "weights": weights, "rows": rows},
            functools.partial(linear_case, layer, rows, weights),
        )
        for layer in LAYERS[kind]
        for weights in KINDS[kind]
        for rows in rows_of(asked, device)
        if layer != "head" or weights == "dense"
    )
    return list(_points("linear", cases, asked, device))


def lora(asked: Asked, device: Device) -> list[Point]:
    """The halves for a layer; each row of a step has an adapter of its own, up to 8, a prompt has one."""
    kind = kind_of(device)
    halves: dict[str, Callable[..., Case]] = {"lora_shrink": shrink_case, "lora_expand": expand_case}
    found = []
    for op in _ops(asked, halves, tuple(halves)):
        cases: Iterator[Shape] = (
            (
                f"{layer}, {_rows(rows)}, {adapters} adapter{'s' * (adapters > 1)}",
                {"layer": layer, "rows": rows, "adapters": adapters},
                functools.partial(halves[op], layer, rows, adapters),
            )
            for layer in ADAPTED[kind]
            for rows in rows_of(asked, device)
            for adapters in [rows if rows <= 8 else 1]
        )
        found += list(_points(op, cases, asked, device))
    return found


def norm(asked: Asked, device: Device) -> list[Point]:
    """Of a sum, or, if asked for, of rows alone."""
    makes: dict[str, Callable[..., Case]] = {"add_rms_norm": norm_case, "rms_norm": rms_case}
    found = []
    for op in _ops(asked, makes, ("add_rms_norm",)):
        found += _of_rows(op, makes[op], asked, device)
    return found


def swiglu(asked: Asked, device: Device) -> list[Point]:
    """Rows of a layer's gates."""
    return _of_rows("swiglu", swiglu_case, asked, device)


def _of_rows(op: str, make: Callable[..., Case], asked: Asked, device: Device) -> list[Point]:
    cases: Iterator[Shape] = (
        (_rows(rows), {"rows": rows}, functools.partial(make, rows)) for rows in rows_of(asked, device)
    )
    return list(_points(op, cases, asked, device))


def sample(asked: Asked, device: Device) -> list[Point]:
    """Every kind of draw that a step is asked for."""
    kind = kind_of(device)
    cases: Iterator[Shape] = (
        (f"{how}, {_rows(rows)}", {"asked": how, "rows": rows}, functools.partial(sample_case, how, rows))
        for how in DRAWN[kind]
        for rows in asked.batch or DRAWS[kind]
    )
    return list(_points("sample", cases, asked, device))


def _rows(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"


def _tokens(t: int) -> str:
    return f"{t} token{'s' * (t > 1)}"
