"""The attention ops, launched in Mistral-7B's layout at head_dim 128, in SmolLM2's at 64."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.attention import prefill_attention
from mistral_nb_kernels.configs import Row
from mistral_nb_kernels.decode_attention import decode_attention, rope_decode_attention
from mistral_nb_kernels.paged import PAGE, PagedKV, Rows
from mistral_nb_kernels.rope import rope_write

__all__ = ["FIXED", "FORMS", "HALF", "MATRIX", "ORDERS", "Forms", "Order"]

Forms = Iterator[tuple[str, Callable[[], object]]]

HEADS = {64: (9, 3), 128: (32, 8)}
"""Query and KV heads by head dimension: SmolLM2-135M's and Mistral-7B's."""
TOKENS = 256


@dataclass(frozen=True, slots=True)
class Order:
    """What no test of results can be sure to see: in the code of `kernel`, in its forms that begin with `form`,
    `pattern` is found among the barriers and accesses of device memory, one after another; else it has no `what`.
    """

    kernel: str
    form: str
    what: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """Two sequences of one token: q, k, v as parts of a packed projection, angles, rows and pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    rows: Rows
    kv: PagedKV

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype) -> Inputs:
        hq, hkv = HEADS[head_dim]
        packed = torch.zeros(2, hq + 2 * hkv, head_dim, dtype=dtype)
        pool = torch.zeros(2, 2, hkv, PAGE, head_dim, dtype=dtype)
        kv = PagedKV(pool[0], pool[1], torch.zeros(2, TOKENS // PAGE, dtype=torch.int32))
        q, k, v = packed[:, :hq], packed[:, hq : hq + hkv], packed[:, hq + hkv :]
        cos, sin = reference.rope_table(TOKENS, head_dim, 1e6)
        return cls(q, k, v, cos, sin, Rows.of((1, 1), (1, 1)), kv)


def _rope(row: Row, dtype: torch.dtype) -> Forms:
    x = Inputs.of(row.width, dtype)
    yield "", lambda: rope_write(x.q, x.k, x.v, x.cos, x.sin, x.rows, x.kv, config=row.config)


def _prefill(row: Row, dtype: torch.dtype) -> Forms:
    x = Inputs.of(row.width, dtype)
    if dtype != torch.float32:  # the form with a window has every loop of the one without
        yield "", lambda: prefill_attention(x.q, x.rows, x.kv, config=row.config)
    yield "window", lambda: prefill_attention(x.q, x.rows, x.kv, 64, config=row.config)


def _decode(row: Row, dtype: torch.dtype) -> Forms:
    x, config, dot = Inputs.of(row.width, dtype), row.config, row.arch >= 80
    lengths = x.rows.lengths
    turned = functools.partial(
        rope_decode_attention, x.q, x.k, x.v, x.cos, x.sin, lengths, x.kv, config=config, dot=dot
    )
    if dtype != torch.float16 or row.arch < 80:  # beside bf16, the form that has the most to hold
        yield "", lambda: decode_attention(x.q, lengths, x.kv, config=config, dot=dot)
        yield "RoPE", turned
    yield "RoPE, window", lambda: turned(window=64)


FORMS = {"rope_write": _rope, "prefill_attention": _prefill, "decode_attention": _decode}
MATRIX: dict[str, dict[int, str]] = {
    "prefill_kernel": {90: "HGMMA", 100: "UTCHMMA"},
    "split_kernel": {},
}
"""wgmma on 9.0 and tcgen05 on 10.0 where a tile has rows enough."""
ORDERS = (
    Order(
        "split_kernel",
        "",
        "barrier and release before it counts itself, or acquire and barrier before it adds up",
        r"STG( LDG)*( BAR)+ MEMBAR\.\S+\.GPU ATOMG\.\S+\.STRONG\.GPU CCTL\.IVALL BAR",
    ),
    Order(
        "split_kernel",
        "RoPE",
        "barrier between the newest token's stores and the loads",
        r"^((?!STG)\S+ )*(STG |LDG )*STG BAR",
    ),
)
"""A program's sums reach the one that adds them; the newest token is in its page before its tile is loaded."""
FIXED: tuple[str, ...] = ()
HALF = ("decode_attention",)
"""RoPE is in the type's own conversions; prefill differs in the type of its products alone."""
