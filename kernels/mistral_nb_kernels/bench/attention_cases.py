"""The attention ops at the shapes of Mistral-7B and of a model of head_dim 64, with their bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mistral_nb_kernels import reference
from mistral_nb_kernels.paged import PagedKV, Rows

__all__ = ["Case", "decode_case", "prefill_case", "rope_case", "sdpa_case"]

HEADS = {64: (32, 8), 128: (32, 8)}
THETA = 1e6


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one set of random inputs. `inputs` are the op's; FLOPs, and the least bytes it moves."""

    op: str
    inputs: tuple[Any, ...]
    flops: int
    bytes: int

    def call(self, function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*self.inputs)


def paged(batch: int, t: int, head_dim: int, page: int, dtype: torch.dtype) -> PagedKV:
    """Full sequences of t tokens, their pages shuffled; page 0 is nobody's."""
    _, hkv = HEADS[head_dim]
    each = -(-t // page)
    pool = torch.randn(2, batch * each + 1, hkv, page, head_dim, dtype=dtype, device="cuda")
    table = (torch.randperm(batch * each, device="cuda") + 1).view(batch, each).int()
    return PagedKV(pool[0], pool[1], table)


def prefill_case(
    t: int, head_dim: int, page: int, window: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """A prompt of t tokens."""
    hq, hkv = HEADS[head_dim]
    q = torch.randn(t, hq, head_dim, dtype=dtype, device="cuda")
    seen = t * (t + 1) // 2 if window is None or window >= t else window * (window + 1) // 2 + (t - window) * window
    traffic = 2 * t * (hq + hkv) * head_dim * dtype.itemsize
    inputs = (q, Rows.of((t,), (t,), "cuda"), paged(1, t, head_dim, page, dtype), window)
    return Case("prefill_attention", inputs, 4 * hq * head_dim * seen, traffic)


def sdpa_case(t: int, head_dim: int, backend: SDPBackend, dtype: torch.dtype = torch.bfloat16) -> Callable[[], Tensor]:
    """The same prompt through torch's attention, its KV heads repeated beforehand."""
    q, k, v = (torch.randn(1, HEADS[head_dim][0], t, head_dim, dtype=dtype, device="cuda") for _ in range(3))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def decode_case(
    batch: int, t: int, head_dim: int, page: int, window: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Case:
    """One token of each of `batch` sequences of t tokens: un-rotated q, k, v, as the engine decodes."""
    hq, hkv = HEADS[head_dim]
    packed = torch.randn(batch, hq + 2 * hkv, head_dim, dtype=dtype, device="cuda")
    q, k, v = packed[:, :hq], packed[:, hq : hq + hkv], packed[:, hq + hkv :]
    cos, sin = reference.rope_table(t, head_dim, THETA, "cuda")
    lengths = torch.full((batch,), t, dtype=torch.int32, device="cuda")
    seen = batch * min(t, window or t)
    traffic = 2 * seen * hkv * head_dim * dtype.itemsize
    inputs = (q, k, v, cos, sin, lengths, paged(batch, t, head_dim, page, dtype), window)
    return Case("rope_decode_attention", inputs, 4 * seen * hq * head_dim, traffic)


def rope_case(t: int, head_dim: int, page: int, dtype: torch.dtype = torch.bfloat16) -> Case:
    """RoPE and the KV write of a prompt of t tokens."""
    hq, hkv = HEADS[head_dim]
    packed = torch.randn(t, hq + 2 * hkv, head_dim, dtype=dtype, device="cuda")
    q, k, v = packed[:, :hq], packed[:, hq : hq + hkv], packed[:, hq + hkv :]
    cos, sin = reference.rope_table(t, head_dim, THETA, "cuda")
    traffic = 2 * packed.numel() * dtype.itemsize + 2 * t * head_dim // 2 * 4
    inputs = (q, k, v, cos, sin, Rows.of((t,), (t,), "cuda"), paged(1, t, head_dim, page, dtype))
    return Case("rope_write", inputs, 6 * t * (hq + hkv) * head_dim // 2, traffic)
