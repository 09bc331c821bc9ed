"""How much memory a model takes in the engine, from its sizes alone, and which choices fit into what is free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.errors import ModelError

__all__ = ["Choice", "Device", "Estimate", "Precision", "check_fits", "choices_that_fit", "estimate", "int8_runs"]

Precision = Literal["fp32", "bf16", "fp16", "int8"]
Device = Literal["cpu", "cuda"]

_SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 4}
"""Bytes of an embedding, norm or KV value; int8 has its matrices' values in one byte and all else in fp32."""
_PRECISIONS: dict[Device, tuple[Precision, ...]] = {
    "cpu": ("fp32", "bf16", "fp16", "int8"),
    "cuda": ("fp32", "bf16", "fp16"),
}
_LIBRARIES: dict[Device, int] = {"cpu": 40_000_000, "cuda": 600_000_000}
CHUNK = 128
"""Tokens of a prompt that the engine reads at a time."""
_MASK = 5
"""Bytes of the mask for a token and one that it may see: a boolean, and the fp32 that torch makes of it."""
_BATCH = 8
_SHORTEST = 1024


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes: the weights, the keys and values of one full context, and what the computation takes beside them."""

    weights: int
    kv: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.workspace


@dataclass(frozen=True, slots=True)
class Choice:
    """A precision and the largest context, in tokens, with which a model fits, and the bytes that it then takes."""

    precision: Precision
    context: int
    total: int


def estimate(args: ModelArgs, precision: Precision, context: int, device: Device) -> Estimate:
    """What the engine will take with a context of so many tokens.

    Weights and KV are exact. The workspace is the RoPE table and what a prompt's chunk of 128 tokens has at its widest:
    activations, and on the CPU the attention mask, on a GPU every head's scores. On top, 40 MB are assumed for what the
    libraries keep (18 to 30 MB with the embedded model, by precision), and on a GPU 600 MB for the CUDA context, cuBLAS
    and captured graphs.
    """
    size = _SIZES[precision]
    kv = 2 * args.n_layers * args.n_kv_heads * args.head_dim * context * size
    workspace = _LIBRARIES[device] + _activations(args, size) + 2 * context * args.head_dim * 4
    seen = context if args.sliding_window is None else min(context, args.sliding_window + CHUNK)
    if device == "cuda":
        workspace += CHUNK * seen * args.n_heads * (4 + size)
    else:
        workspace += CHUNK * seen * _MASK
    return Estimate(_weights(args, precision), kv, workspace)


def choices_that_fit(args: ModelArgs, free: int, device: Device) -> list[Choice]:
    """For each precision of the device the largest context that fits `free` bytes: the model's own, or a power of two.

    Those below 1024 tokens are left out.
    """
    found = []
    for precision in _PRECISIONS[device]:
        if precision == "int8" and not int8_runs(args):
            continue
        for context in _contexts(args.context):
            total = estimate(args, precision, context, device).total
            if total <= free:
                found.append(Choice(precision, context, total))
                break
    return found


def check_fits(
    args: ModelArgs, precision: Precision, context: int, device: Device, free: int | None, host: int | None = None
) -> None:
    """`ModelError` with the choices that would fit, if the model needs more than `free` bytes (None: nobody knows), and
    for a model that int8 cannot run. Where no choice fits a GPU, those of the CPU are told, with `host` bytes free.
    """
    if precision == "int8" and not int8_runs(args):
        inputs = next(inputs for inputs in _inputs(args) if inputs % 32)
        raise ModelError(f"int8 needs matrices with a multiple of 32 inputs, not {inputs}; choose bf16, fp32 or auto")
    need = estimate(args, precision, context, device)
    if free is None or need.total <= free:
        return
    where = "the GPU" if device == "cuda" else "this machine"
    problem = (
        f"the model needs {_gb(need.total)} in {precision} with a context of {context} tokens "
        f"(weights {_gb(need.weights)}, KV {_gb(need.kv)}, workspace {_gb(need.workspace)}), "
        f"and {where} has {_gb(free)} free"
    )
    if options := _options(args, free, device, precision):
        raise ModelError(f"{problem}; what fits: {options}")
    if device == "cuda" and host is not None and (options := _options(args, host, "cpu", precision, "--device cpu ")):
        raise ModelError(f"{problem}; nothing fits there, but on the CPU: {options}")
    raise ModelError(
        f"{problem}; no precision fits with a context of {_SHORTEST}: free memory or choose a smaller model"
    )


def _options(args: ModelArgs, free: int, device: Device, asked: Precision, before: str = "") -> str:
    """The choices that fit, as options for `serve`; of those that take the same memory the precision that was asked
    for, or the first.
    """
    unlike: dict[int, Choice] = {}
    for choice in choices_that_fit(args, free, device):
        if choice.total not in unlike or choice.precision == asked:
            unlike[choice.total] = choice
    return " or ".join(
        f"{before}--precision {choice.precision} --context {choice.context} ({_gb(choice.total)})"
        for choice in unlike.values()
    )


def _weights(args: ModelArgs, precision: Precision) -> int:
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    rows = args.n_layers * (q_dim + 2 * kv_dim + args.dim + 2 * args.hidden_dim + args.dim)
    values = args.n_layers * args.dim * (2 * q_dim + 2 * kv_dim + 3 * args.hidden_dim)
    head = args.vocab_size * args.dim
    plain = head + args.dim * (2 * args.n_layers + 1)
    if precision == "int8":
        return (values + head) + 4 * (rows + args.vocab_size) + 4 * plain
    return (values + plain + (0 if args.tied_embeddings else head)) * _SIZES[precision]


def _activations(args: ModelArgs, size: int) -> int:
    """At the widest of a chunk's steps, the attention or the MLP, beside the residual; and a batch's logits in fp32."""
    attention = 3 * (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    mlp = 4 * args.hidden_dim
    return CHUNK * (max(attention, mlp) + 4 * args.dim) * size + 2 * _BATCH * args.vocab_size * 4


def int8_runs(args: ModelArgs) -> bool:
    """The int8 kernel takes matrices with a multiple of 32 inputs."""
    return not any(inputs % 32 for inputs in _inputs(args))


def _inputs(args: ModelArgs) -> tuple[int, ...]:
    """Of the matrices."""
    return args.dim, args.n_heads * args.head_dim, args.hidden_dim


def _contexts(longest: int) -> Iterator[int]:
    yield longest
    power = 1 << (longest - 1).bit_length() - 1 if longest > 1 else 0
    while power >= _SHORTEST:
        yield power
        power >>= 1


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
