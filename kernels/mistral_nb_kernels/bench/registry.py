"""The subjects of the bench: what each measures by default, what of it can be asked for, and who runs it."""

from __future__ import annotations

from dataclasses import replace

from mistral_nb_kernels.bench import attention_peers, linear_peers, sweeps
from mistral_nb_kernels.bench.case import Device
from mistral_nb_kernels.bench.providers import COMPILE, EAGER, OURS, Provider
from mistral_nb_kernels.bench.subject import Asked, Point, Subject

__all__ = ["OPS", "SUBJECTS", "Asked", "Point", "Subject", "op_points", "providers_of"]

EVERYWHERE = (OURS, EAGER, COMPILE)
SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            "attention",
            "a prompt's attention over paged KV, whole and with windows",
            ("seq",),
            ("prefill_attention",),
            sweeps.attention,
            (*EVERYWHERE, *attention_peers.PREFILL),
        ),
        Subject(
            "decode_attention",
            "the newest tokens' attention over paged KV, with RoPE and the KV write",
            ("seq", "batch"),
            ("rope_decode_attention", "decode_attention"),
            sweeps.decode,
            (*EVERYWHERE, *attention_peers.DECODE),
        ),
        Subject(
            "rope",
            "RoPE and the KV write of a prompt",
            ("seq",),
            ("rope_write",),
            sweeps.rope,
            (*EVERYWHERE, *attention_peers.ROPE),
        ),
        Subject(
            "linear",
            "products with dense, int8 and int4 weights, with norm, gate or residual as a layer has them",
            ("seq", "batch"),
            ("linear",),
            sweeps.linear,
            (*EVERYWHERE, *linear_peers.LINEAR),
        ),
        Subject(
            "lora",
            "both halves of the adapters' products",
            ("seq", "batch"),
            ("lora_shrink", "lora_expand"),
            sweeps.lora,
            EVERYWHERE,
        ),
        Subject(
            "norm",
            "RMSNorm of a sum",
            ("seq", "batch"),
            ("add_rms_norm", "rms_norm"),
            sweeps.norm,
            (*EVERYWHERE, *linear_peers.NORM),
        ),
        Subject(
            "swiglu",
            "SwiGLU of a layer's gates",
            ("seq", "batch"),
            ("swiglu",),
            sweeps.swiglu,
            (*EVERYWHERE, *linear_peers.SWIGLU),
        ),
        Subject(
            "sample",
            "the next token: greedy, temperature, top-k, top-p, penalties",
            ("batch",),
            ("sample",),
            sweeps.sample,
            (*EVERYWHERE, *linear_peers.SAMPLE),
        ),
    )
}
"""By the words of the command line."""
OPS: dict[str, str] = {op: subject.name for subject in SUBJECTS.values() for op in subject.ops}
"""The subject of every op of `Ops`."""


def op_points(op: str, asked: Asked, device: Device) -> list[Point]:
    """The points of one op alone, as its subject sweeps it: where a candidate is timed."""
    return SUBJECTS[OPS[op]].points(replace(asked, ops=(op,)), device)


def providers_of(op: str) -> tuple[Provider, ...]:
    """Who runs an op, ours first."""
    return tuple(each for each in SUBJECTS[OPS[op]].providers if not each.ops or op in each.ops)
