"""How much memory a model takes in the engine, from its sizes alone, and which choices fit into what is free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.errors import ModelError
from mistral_nb.hardware import cpu_flags

__all__ = [
    "CHUNKS",
    "CONTEXT",
    "OUTPUTS",
    "Choice",
    "Device",
    "Estimate",
    "Precision",
    "Selection",
    "check_fits",
    "choices_that_fit",
    "estimate",
    "int4_group",
    "ran_out",
    "runs",
    "select",
    "short_kv",
]

Precision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
Device = Literal["cpu", "cuda"]

_SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Bytes of a value; what is no matrix has those of the activations."""
_PACKED: dict[Device, int] = {"cpu": 4, "cuda": 2}
"""Bytes of an activation, embedding or norm beside matrices in int8 and int4."""
_PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_LIBRARIES: dict[Device, int] = {"cpu": 40_000_000, "cuda": 300_000_000}
CONTEXT: dict[Device, int] = {"cpu": 0, "cuda": 300_000_000}
"""Bytes that a process is assumed to take of a device before its first tensor: CUDA's own. No estimate has them, for
what torch tells as free is without them already; what NVML tells beforehand is not.
"""
CHUNKS: dict[Device, int] = {"cpu": 128, "cuda": 512}
"""Tokens of a prompt that the engine reads at a time."""
OUTPUTS = 64
"""Outputs that torch's int4 op on the CPU packs together, at most; the parts of a stacked matrix are whole packs."""
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


@dataclass(frozen=True, slots=True)
class Selection:
    """What `auto` takes: a precision and a context in tokens; `why` in words where it is not the first choice."""

    precision: Precision
    context: int
    why: str = ""


def estimate(args: ModelArgs, precision: Precision, context: int, device: Device) -> Estimate:
    """What the engine will take with a context of so many tokens.

    Weights and KV are exact. The workspace is the RoPE table and what a prompt's chunk, of 128 tokens on the CPU and
    512 on a GPU, has at its widest: activations, and on the CPU the attention mask and what of a layer's KV is not in
    the activations' type already. On top, 40 MB are assumed for what the libraries keep (18 to 30 MB with the embedded
    model, by precision), and on a GPU 300 MB for cuBLAS, captured graphs and matrices that are unpacked for a prompt.
    """
    size = _SIZES.get(precision, _PACKED[device])
    token = 2 * args.n_kv_heads * args.head_dim
    short = device == "cpu" and precision not in _SIZES and short_kv(args)
    kv = args.n_layers * token * context * (2 if short else size)
    workspace = _LIBRARIES[device] + _activations(args, CHUNKS[device], size) + 2 * context * args.head_dim * 4
    if device == "cpu":
        seen = context if args.sliding_window is None else min(context, args.sliding_window + CHUNKS[device])
        workspace += CHUNKS[device] * seen * _MASK + (token * seen * size if short else 0)
    return Estimate(_weights(args, precision, device), kv, workspace)


def short_kv(args: ModelArgs) -> bool:
    """Whether keys and values beside int8 and int4 on this machine's CPU are bf16, not fp32.

    They are where it multiplies bf16 by AVX512_BF16, and the model has KV heads enough. With one torch divides a
    sequence's keys among three threads or more, which rounds differently; nor is it known how AMX sums.
    """
    return args.n_kv_heads > 1 and "avx512_bf16" in (flags := cpu_flags()) and "amx_bf16" not in flags


def choices_that_fit(args: ModelArgs, free: int, device: Device) -> list[Choice]:
    """For each precision the largest context that fits `free` bytes: the model's own, or a power of two.

    Those below 1024 tokens are left out.
    """
    choices = (_largest(args, precision, free, device) for precision in _PRECISIONS)
    return [choice for choice in choices if choice]


def select(
    args: ModelArgs, order: Sequence[Precision], device: Device, free: int | None, *, context: int | None = None
) -> Selection:
    """The first precision of `order` that fits `free` bytes with the context that is asked for, or all of the model's.

    Where none does and no context is asked for, the last one with the largest context that fits, down to 1024; where
    that is none either, the first, which `check_fits` will refuse. None for `free`: nobody knows, and the first is
    taken.
    """
    wanted = min(context or args.context, args.context)
    order = [precision for precision in order if runs(args, precision, device)]
    if free is None:
        return Selection(order[0], wanted)
    first = estimate(args, order[0], wanted, device).total
    short = f"since {order[0]} needs {_gb(first)} with a context of {wanted} tokens and {_gb(free)} are free"
    for precision in order:
        if estimate(args, precision, wanted, device).total <= free:
            return Selection(precision, wanted, "" if precision == order[0] else f"{precision}, {short}")
    largest = None if context else _largest(args, order[-1], free, device)
    if largest is None:
        return Selection(order[0], wanted)
    return Selection(largest.precision, largest.context, f"{largest.precision} and {largest.context} tokens, {short}")


def check_fits(
    args: ModelArgs, precision: Precision, context: int, device: Device, free: int | None, host: int | None = None
) -> None:
    """`ModelError` with the choices that would fit, if the model needs more than `free` bytes (None: nobody knows), and
    for a model that the precision cannot run. Where no choice fits a GPU, those of the CPU are told, with `host` bytes
    free.
    """
    if problem := _refusal(args, precision, device):
        raise ModelError(f"{precision} needs {problem}; choose bf16, fp32 or auto")
    need = estimate(args, precision, context, device)
    if free is None or need.total <= free:
        return
    needs = _needs(need, precision, context)
    raise ModelError(
        f"{needs}, and {_where(device)} has {_gb(free)} free; {_advice(args, precision, device, free, host)}"
    )


def ran_out(
    args: ModelArgs, precision: Precision, context: int, device: Device, free: int | None, host: int | None = None
) -> ModelError:
    """What is to be said where memory did not hold out though `check_fits` let the model pass: with the choices that
    take less than this one and fit `free` bytes, which are free when the model's own are given back.
    """
    need = estimate(args, precision, context, device)
    left = "" if free is None else f", and {_where(device)} has {_gb(free)} free now"
    fits = need.total - 1 if free is None else min(free, need.total - 1)
    return ModelError(
        f"memory of {_where(device)} ran out while the model was loaded; {_needs(need, precision, context)}{left}; "
        f"{_advice(args, precision, device, fits, host)}"
    )


def _needs(need: Estimate, precision: Precision, context: int) -> str:
    return (
        f"the model needs {_gb(need.total)} in {precision} with a context of {context} tokens "
        f"(weights {_gb(need.weights)}, KV {_gb(need.kv)}, workspace {_gb(need.workspace)})"
    )


def _where(device: Device) -> str:
    return "the GPU" if device == "cuda" else "this machine"


def _advice(args: ModelArgs, precision: Precision, device: Device, free: int, host: int | None) -> str:
    """What to take where `precision` does not fit."""
    if options := _options(args, free, device, precision):
        return f"what fits: {options}"
    if device == "cuda" and host is not None and (options := _options(args, host, "cpu", precision, "--device cpu ")):
        return f"nothing fits there, but on the CPU: {options}"
    return f"no precision fits with a context of {_SHORTEST}: free memory or choose a smaller model"


def runs(args: ModelArgs, precision: Precision, device: Device) -> bool:
    """Whether the ops of a precision take the model's matrices."""
    return not _refusal(args, precision, device)


def int4_group(args: ModelArgs, device: Device) -> int:
    """Weights that share a scale and a minimum in int4; 0 for a model that int4 cannot run.

    32 on the CPU, where 4 and 5 bits a weight take the same time, most of it in instructions, and where the blocks of
    GGUF files stay what they are. 64 on a GPU, whose time is bytes: a group of 128 would read 5.6% less and err 13%
    more, one of 32 read 11% more and err 13% less (of normal weights, by their expected range). 32 where the matrices
    do not have whole pairs of 64.
    """
    if device == "cpu":
        whole = all(inputs % 32 == 0 for inputs in _inputs(args)) and not any(each % OUTPUTS for each in _outputs(args))
        return 32 if whole else 0
    return next((group for group in (64, 32) if all(inputs % (2 * group) == 0 for inputs in _inputs(args))), 0)


def _refusal(args: ModelArgs, precision: Precision, device: Device) -> str:
    """What a precision asks of matrices and the model's lack; empty where they do not."""
    odd = next((inputs for inputs in _inputs(args) if inputs % 32), None)
    if precision in ("int8", "int4") and odd is not None:
        return f"matrices with a multiple of 32 inputs, not {odd}"
    if precision == "int4" and int4_group(args, device) == 0:
        if device == "cpu":
            odd = next(outputs for outputs in _outputs(args) if outputs % OUTPUTS)
            return f"matrices with a multiple of {OUTPUTS} outputs, not {odd}"
        return f"matrices with a multiple of 64 inputs, not {next(each for each in _inputs(args) if each % 64)}"
    return ""


def _largest(args: ModelArgs, precision: Precision, free: int, device: Device) -> Choice | None:
    """A precision with the largest context that fits, none below 1024 tokens."""
    if runs(args, precision, device):
        for context in _contexts(args.context):
            total = estimate(args, precision, context, device).total
            if total <= free:
                return Choice(precision, context, total)
    return None


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


def _weights(args: ModelArgs, precision: Precision, device: Device) -> int:
    q_dim, kv_dim = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    rows = args.n_layers * (q_dim + 2 * kv_dim + args.dim + 2 * args.hidden_dim + args.dim)
    values = args.n_layers * args.dim * (2 * q_dim + 2 * kv_dim + 3 * args.hidden_dim)
    head = args.vocab_size * args.dim
    plain = head + args.dim * (2 * args.n_layers + 1)
    if precision == "int8":
        return (values + head) + 4 * (rows + args.vocab_size) + _PACKED[device] * plain
    if precision == "int4":
        pairs = values // int4_group(args, device)
        return values // 2 + 4 * pairs + head + 4 * args.vocab_size + _PACKED[device] * plain
    return (values + plain + (0 if args.tied_embeddings else head)) * _SIZES[precision]


def _activations(args: ModelArgs, chunk: int, size: int) -> int:
    """At the widest of a chunk's steps, the attention or the MLP, beside the residual; and a batch's logits in fp32."""
    attention = 3 * (args.n_heads + 2 * args.n_kv_heads) * args.head_dim
    mlp = 4 * args.hidden_dim
    return chunk * (max(attention, mlp) + 4 * args.dim) * size + 2 * _BATCH * args.vocab_size * 4


def _inputs(args: ModelArgs) -> tuple[int, ...]:
    """Of the matrices."""
    return args.dim, args.n_heads * args.head_dim, args.hidden_dim


def _outputs(args: ModelArgs) -> tuple[int, ...]:
    """Of the matrices, each by itself before any are stacked; the head aside, which is int8."""
    return args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.dim, args.hidden_dim


def _contexts(longest: int) -> Iterator[int]:
    yield longest
    power = 1 << (longest - 1).bit_length() - 1 if longest > 1 else 0
    while power >= _SHORTEST:
        yield power
        power >>= 1


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
