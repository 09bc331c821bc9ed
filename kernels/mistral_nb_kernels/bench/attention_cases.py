"""The attention ops at the shapes of Mistral-7B and of a model of head_dim 64: cases, and torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench.case import Case, Device
from mistral_nb_kernels.paged import PAGE, PagedKV, Rows

__all__ = [
    "CONTEXT",
    "banded",
    "copy_case",
    "decode_case",
    "decode_peers",
    "flash_window",
    "prefill_case",
    "prefill_peers",
    "reading",
    "rope_case",
    "sdpa",
    "takes",
]

HEADS = {64: (32, 8), 128: (32, 8)}
"""Query and KV heads by head dimension."""
THETA = 1e6
CONTEXT = 32768
"""Tokens that a sequence's row of the page table has room for, as the engine's."""
BF16 = torch.bfloat16


def paged(batch: int, t: int, head_dim: int, page: int, capacity: int, dtype: torch.dtype, device: Device) -> PagedKV:
    """Full sequences of t tokens, their pages shuffled; page 0 is nobody's, and what is past t names it."""
    _, hkv = HEADS[head_dim]
    each = -(-t // page)
    pool = torch.randn(2, batch * each + 1, hkv, page, head_dim, dtype=dtype, device=device)
    table = torch.zeros(batch, max(each, capacity // page), dtype=torch.int32, device=device)
    table[:, :each] = torch.randperm(batch * each, device=device).view(batch, each) + 1
    return PagedKV(pool[0], pool[1], table)


def packed(n: int, head_dim: int, dtype: torch.dtype, device: Device) -> tuple[Tensor, ...]:
    """q, k, v of n rows, as parts of one projection."""
    hq, hkv = HEADS[head_dim]
    qkv = torch.randn(n, hq + 2 * hkv, head_dim, dtype=dtype, device=device)
    return qkv[:, :hq], qkv[:, hq : hq + hkv], qkv[:, hq + hkv :]


def prefill_case(
    t: int,
    head_dim: int,
    page: int = PAGE,
    *,
    window: int | None = None,
    dtype: torch.dtype = BF16,
    device: Device = "cuda",
) -> Case:
    """A prompt of t tokens."""
    hq, hkv = HEADS[head_dim]
    q = torch.randn(t, hq, head_dim, dtype=dtype, device=device)
    seen = t * (t + 1) // 2 if window is None or window >= t else window * (window + 1) // 2 + (t - window) * window
    traffic = 2 * t * (hq + hkv) * head_dim * dtype.itemsize
    kv = paged(1, t, head_dim, page, CONTEXT, dtype, device)
    inputs = (q, Rows.of((t,), (t,), device), kv, window)
    return Case("prefill_attention", inputs, reference.prefill_attention, 4 * hq * head_dim * seen, traffic)


def decode_case(
    batch: int,
    t: int,
    head_dim: int,
    page: int = PAGE,
    *,
    window: int | None = None,
    dtype: torch.dtype = BF16,
    device: Device = "cuda",
) -> Case:
    """One token of each of `batch` sequences of t tokens: un-rotated q, k, v, as the engine decodes."""
    hq, hkv = HEADS[head_dim]
    cos, sin = reference.rope_table(t, head_dim, THETA, device)
    lengths = torch.full((batch,), t, dtype=torch.int32, device=device)
    seen = batch * min(t, window or t)
    traffic = 2 * seen * hkv * head_dim * dtype.itemsize
    kv = paged(batch, t, head_dim, page, CONTEXT, dtype, device)
    inputs = (*packed(batch, head_dim, dtype, device), cos, sin, lengths, kv, window)
    return Case("rope_decode_attention", inputs, reference.rope_decode_attention, 4 * seen * hq * head_dim, traffic)


def reading(case: Case) -> Case:
    """Of a case of `decode_case` what is left without RoPE and the KV write, on queries that count as rotated."""
    q, _, _, _, _, lengths, kv, window = case.inputs
    inputs = (q, lengths, kv, window)
    return replace(case, op="decode_attention", inputs=inputs, reference=reference.decode_attention)


def rope_case(t: int, head_dim: int, page: int = PAGE, *, dtype: torch.dtype = BF16, device: Device = "cuda") -> Case:
    """RoPE and the KV write of a prompt of t tokens."""
    hq, hkv = HEADS[head_dim]
    cos, sin = reference.rope_table(t, head_dim, THETA, device)
    traffic = 2 * t * (hq + 2 * hkv) * head_dim * dtype.itemsize + 2 * t * head_dim // 2 * 4
    kv = paged(1, t, head_dim, page, CONTEXT, dtype, device)
    inputs = (*packed(t, head_dim, dtype, device), cos, sin, Rows.of((t,), (t,), device), kv)
    return Case("rope_write", inputs, reference.rope_write, 6 * t * (hq + hkv) * head_dim // 2, traffic)


def copy_case(like: Case, device: Device = "cuda") -> Case:
    """A plain copy that moves the bytes of another case, half of them read and half written."""
    source = torch.randint(0, 128, (like.bytes // 2,), dtype=torch.int8, device=device)
    return Case("copy", (torch.empty_like(source), source), Tensor.copy_, 0, like.bytes)


def prefill_peers(case: Case) -> dict[str, Callable[[], Tensor]]:
    """What torch has for a case of `prefill_case`, on contiguous KV, by name: -> [1, hq, t, d].

    Flash and cuDNN with the KV heads shared and repeated; with a window flash by the operator beneath SDPA, which alone
    takes one, and those kernels of SDPA that take a mask. Only what runs on this machine.
    """
    q, rows, kv, window = case.inputs
    q = q.transpose(0, 1)[None].contiguous()
    k, v = (x[None].contiguous() for x in kv.of(0, int(rows.lengths[0])))
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    flash, cudnn, efficient = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
    if window is None:
        return dict(
            [
                *_sdpa("flash", flash, q, k, v),
                *_sdpa("flash, KV repeated", flash, q, keys, values),
                *_sdpa("cudnn", cudnn, q, k, v),
                *_sdpa("cudnn, KV repeated", cudnn, q, keys, values),
            ]
        )
    mask = banded(q.shape[2], window, q.device)
    return dict(
        [
            *flash_window(q, k, v, window),
            *_sdpa("efficient, masked", efficient, q, keys, values, mask),
            *_sdpa("cudnn, masked", cudnn, q, keys, values, mask),
        ]
    )


def banded(t: int, window: int, device: Device) -> Tensor:
    """[t, t]: which keys each of t queries sees."""
    at = torch.arange(t, device=device)
    return (at <= at[:, None]) & (at > at[:, None] - window)


def decode_peers(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Flash on contiguous KV for a case of `decode_case` without a window, without RoPE and the KV write."""
    q, _, _, _, _, lengths, kv, _ = case.inputs
    k, v = (torch.stack(x) for x in zip(*(kv.of(s, int(t)) for s, t in enumerate(lengths)), strict=True))
    grouped = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    return dict(_sdpa("flash", SDPBackend.FLASH_ATTENTION, grouped, k, v, causal=False))


def _sdpa(
    name: str, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = True
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """SDPA by one kernel, if that takes these inputs here."""
    if takes(backend, q, k, v, mask, causal=causal):
        yield name, sdpa(backend, q, k, v, mask, causal=causal)


def sdpa(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = True
) -> Callable[[], Tensor]:
    """A call of SDPA by one kernel; q [batch, hq, n, d], k and v [batch, hkv, t, d], fewer KV heads are shared."""
    shared, causal = q.shape[1] != k.shape[1], causal and mask is None

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)

    return call


def takes(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool = True
) -> bool:
    """Whether a kernel of SDPA for GPUs takes these inputs on this machine."""
    asked: Callable[[Any], bool] = {
        SDPBackend.FLASH_ATTENTION: cuda.can_use_flash_attention,
        SDPBackend.CUDNN_ATTENTION: cuda.can_use_cudnn_attention,
        SDPBackend.EFFICIENT_ATTENTION: cuda.can_use_efficient_attention,
    }[backend]
    with sdpa_kernel(backend):
        return asked(cuda.SDPAParams(q, k, v, mask, 0.0, causal and mask is None, q.shape[1] != k.shape[1]))


def flash_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Flash with a window by the operator beneath SDPA, if that takes these inputs here."""
    operator = torch.ops.aten._flash_attention_forward.default
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        if "window_size_left" not in str(operator._schema) or not cuda.can_use_flash_attention(
            cuda.SDPAParams(q, k, v, None, 0.0, True, True)
        ):
            return
    rows, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    t = q.shape[2]

    def call() -> Tensor:
        sides = {"window_size_left": window - 1, "window_size_right": 0}
        out: Tensor = operator(rows, keys, values, None, None, t, t, 0.0, True, False, **sides)[0]
        return out.transpose(1, 2)

    yield "flash", call
