"""Prefill attention over paged KV, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV, Rows

prefill_attention = pytest.importorskip("mistral_nb_kernels.attention").prefill_attention

CONFIG = Config(warps=4, block_m=16, block_n=16)
COUNTS, LENGTHS = (1, 15, 16, 17, 0, 33, 20), (1, 15, 16, 40, 7, 33, 75)

MakeKV = Callable[..., PagedKV]
Exact = Callable[[Tensor, Tensor, Tensor], None]
Guarded = Callable[[PagedKV], PagedKV]


def double(kv: PagedKV) -> PagedKV:
    return PagedKV(kv.k.double(), kv.v.double(), kv.table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("hq", "hkv", "d", "window", "page"),
    [(3, 1, 64, None, 16), (2, 2, 64, 20, 32), (4, 2, 128, None, 32), (1, 1, 64, 1, 16), (2, 1, 64, 33, 16)],
)
def test_equals_the_reference(
    make_kv: MakeKV, exact: Exact, hq: int, hkv: int, d: int, window: int | None, page: int, dtype: torch.dtype
) -> None:
    kv = make_kv(LENGTHS, hkv, d, page, dtype)
    q = torch.randn(sum(COUNTS), 2 * hq, d).to(dtype)[:, ::2]
    rows = Rows.of(COUNTS, LENGTHS)
    exact(
        prefill_attention(q, rows, kv, window, config=CONFIG),
        reference.prefill_attention(q, rows, kv, window),
        reference.prefill_attention(q.double(), rows, double(kv), window),
    )


@pytest.mark.parametrize(("block_m", "block_n"), [(32, 16), (16, 32), (64, 16)])
@pytest.mark.parametrize("window", [None, 1, 16, 17, 50])
def test_tiles_of_any_shape(make_kv: MakeKV, exact: Exact, block_m: int, block_n: int, window: int | None) -> None:
    kv = make_kv((97,), 1, 64, 32, torch.float32)
    q, rows = torch.randn(70, 1, 64), Rows.of((70,), (97,))
    exact(
        prefill_attention(q, rows, kv, window, config=Config(warps=4, block_m=block_m, block_n=block_n)),
        reference.prefill_attention(q, rows, kv, window),
        reference.prefill_attention(q.double(), rows, double(kv), window),
    )


@pytest.mark.parametrize("window", [None, 20])
def test_nothing_is_looked_up_behind_the_table(
    make_kv: MakeKV, exact: Exact, guarded: Guarded, window: int | None
) -> None:
    """Of the last sequence, whose length fills it."""
    kv = guarded(make_kv((20, 64), 1, 64, 16, torch.float32, spare=0))
    q, rows = torch.randn(50, 1, 64), Rows.of((10, 40), (20, 64))
    exact(
        prefill_attention(q, rows, kv, window, config=CONFIG),
        reference.prefill_attention(q, rows, kv, window),
        reference.prefill_attention(q.double(), rows, double(kv), window),
    )


@pytest.mark.parametrize("window", [None, 20])
def test_a_row_gets_the_same_however_the_prompt_is_cut(make_kv: MakeKV, window: int | None) -> None:
    """Bit by bit: in one piece, in chunks, and beside another sequence.

    Of numbers whose sums are exact: numpy's matrix product, which stands for the matrix unit here, adds in an order of
    its own for each row of a tile.
    """
    kv = make_kv((61, 30), 1, 64, 16, torch.float16)
    kv.k.round_(), kv.v.round_()
    q = torch.randint(-1, 2, (61, 2, 64)).half() * (torch.rand(61, 2, 64) < 0.2)
    alone = PagedKV(kv.k, kv.v, kv.table[:1])
    whole = prefill_attention(q, Rows.of((61,), (61,)), alone, window, config=CONFIG)
    for begin, end in ((0, 9), (9, 10), (10, 42), (42, 61)):
        chunk = prefill_attention(q[begin:end], Rows.of((end - begin,), (end,)), alone, window, config=CONFIG)
        assert torch.equal(chunk, whole[begin:end]), (begin, end)
    other = torch.randint(-1, 2, (30, 2, 64)).half()
    beside = prefill_attention(torch.cat((q[40:], other)), Rows.of((21, 30), (61, 30)), kv, window, config=CONFIG)
    assert torch.equal(beside[:21], whole[40:])


def test_pages_and_rows_past_two_to_the_31_elements(exact: Exact) -> None:
    far = 2**31
    storage = torch.empty_strided((far + 2**15,), (1,), dtype=torch.float16)
    shape, strides = (3, 1, 16, 64), (far // 2, 1024, 64, 1)
    kv = PagedKV(
        storage.as_strided(shape, strides),
        storage.as_strided(shape, strides, 4096),
        torch.tensor([[2]], dtype=torch.int32),
    )
    kv.k[2].normal_(), kv.v[2].normal_()
    q = storage.as_strided((3, 1, 64), (far // 2, 64, 1), 2**14)
    q.copy_(torch.randn(3, 1, 64))
    near = PagedKV(kv.k[2:].clone(), kv.v[2:].clone(), torch.zeros(1, 1, dtype=torch.int32))
    rows = Rows.of((3,), (9,))
    exact(
        prefill_attention(q, rows, kv, config=CONFIG),
        reference.prefill_attention(q.clone(), rows, near),
        reference.prefill_attention(q.double(), rows, double(near)),
    )
