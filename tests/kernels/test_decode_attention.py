"""Decode attention by splits, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV

kernels = pytest.importorskip("mistral_nb_kernels.decode_attention")

CONFIG = Config(warps=4, block_n=16, split=32)
LENGTHS = (1, 0, 15, 16, 17, 32, 33, 70)

MakeKV = Callable[..., PagedKV]
Exact = Callable[[Tensor, Tensor, Tensor], None]


def double(kv: PagedKV) -> PagedKV:
    return PagedKV(kv.k.double(), kv.v.double(), kv.table)


@pytest.mark.parametrize(("dtype", "dot"), [(torch.float32, False), (torch.float16, True), (torch.float16, False)])
@pytest.mark.parametrize(
    ("hq", "hkv", "d", "window"), [(6, 2, 64, None), (6, 2, 64, 20), (4, 1, 128, None), (2, 2, 64, 1)]
)
def test_equals_the_reference(
    make_kv: MakeKV, exact: Exact, hq: int, hkv: int, d: int, window: int | None, dtype: torch.dtype, dot: bool
) -> None:
    kv = make_kv(LENGTHS, hkv, d, 16, dtype)
    q = torch.randn(len(LENGTHS), 2 * hq, d).to(dtype)[:, ::2]
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    got = kernels.decode_attention(q, lengths, kv, window, config=CONFIG, dot=dot)
    exact(
        got,
        reference.decode_attention(q, lengths, kv, window),
        reference.decode_attention(q.double(), lengths, double(kv), window),
    )
    assert not got[1].any()


@pytest.mark.parametrize(("dtype", "dot"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize(("hq", "hkv", "d", "window"), [(3, 1, 64, None), (4, 2, 128, 20), (1, 1, 64, 1)])
def test_turns_writes_and_counts_the_newest_token(
    make_kv: MakeKV, exact: Exact, hq: int, hkv: int, d: int, window: int | None, dtype: torch.dtype, dot: bool
) -> None:
    """The newest token's place holds NaN before: it is counted without being read."""
    kv = make_kv(LENGTHS, hkv, d, 16, dtype)
    packed = torch.randn(len(LENGTHS), hq + 2 * hkv, d).to(dtype)
    q, k, v = packed.split((hq, hkv, hkv), dim=1)
    for sequence, length in enumerate(LENGTHS):
        if length:
            place = kv.table[sequence, (length - 1) // 16], slice(None), (length - 1) % 16
            kv.k[place], kv.v[place] = torch.nan, torch.nan
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    cos, sin = reference.rope_table(80, d, 1e4)
    mine, expected, truth = (PagedKV(kv.k.clone(), kv.v.clone(), kv.table), kv, double(kv))
    got = kernels.rope_decode_attention(q, k, v, cos, sin, lengths, mine, window, config=CONFIG, dot=dot)
    exact(
        got,
        reference.rope_decode_attention(q, k, v, cos, sin, lengths, expected, window),
        reference.rope_decode_attention(
            q.double(), k.double(), v.double(), cos.double(), sin.double(), lengths, truth, window
        ),
    )
    written = ~truth.k.isnan()
    assert torch.equal(~mine.k.isnan(), written)
    exact(mine.k[written], expected.k[written], truth.k[written])
    assert torch.equal(mine.v.nan_to_num(), expected.v.nan_to_num())


@pytest.mark.parametrize("dot", [True, False])
def test_a_sequence_gets_the_same_in_any_batch_and_under_any_capacity(make_kv: MakeKV, dot: bool) -> None:
    kv = make_kv((70, 5, 33), 1, 64, 16, torch.float16)
    q = torch.randn(3, 3, 64).half()
    lengths = torch.tensor((70, 5, 33), dtype=torch.int32)
    together = kernels.decode_attention(q, lengths, kv, config=CONFIG, dot=dot)
    wide = PagedKV(kv.k, kv.v, torch.cat((kv.table, torch.zeros(3, 9, dtype=torch.int32)), dim=1))
    assert torch.equal(kernels.decode_attention(q, lengths, wide, config=CONFIG, dot=dot), together)
    for row in range(3):
        one = slice(row, row + 1)
        alone = PagedKV(kv.k, kv.v, kv.table[one])
        got = kernels.decode_attention(q[one], lengths[one], alone, config=CONFIG, dot=dot)
        assert torch.equal(got[0], together[row])


def test_more_splits_than_the_combining_step_adds_at_a_time(make_kv: MakeKV, exact: Exact) -> None:
    length = 16 * kernels.COMBINED + 17
    kv = make_kv((length,), 1, 64, 32, torch.float32)
    q, lengths = torch.randn(1, 1, 64), torch.tensor([length], dtype=torch.int32)
    config = Config(warps=4, block_n=16, split=16)
    exact(
        kernels.decode_attention(q, lengths, kv, config=config),
        reference.decode_attention(q, lengths, kv),
        reference.decode_attention(q.double(), lengths, double(kv)),
    )


def test_great_scores_do_not_overflow(make_kv: MakeKV, exact: Exact) -> None:
    """Scores in the thousands, the first and the last of the splits far apart."""
    kv = make_kv((70,), 1, 64, 16, torch.float32)
    kv.k.mul_(100)
    q, lengths = torch.randn(1, 2, 64) * 10, torch.tensor([70], dtype=torch.int32)
    exact(
        kernels.decode_attention(q, lengths, kv, config=CONFIG),
        reference.decode_attention(q, lengths, kv),
        reference.decode_attention(q.double(), lengths, double(kv)),
    )


def test_pages_past_two_to_the_31_elements(exact: Exact) -> None:
    far = 2**31
    storage = torch.empty_strided((far + 2**15,), (1,), dtype=torch.float16)
    shape, strides = (3, 1, 16, 64), (far // 2, 1024, 64, 1)
    kv = PagedKV(
        storage.as_strided(shape, strides),
        storage.as_strided(shape, strides, 4096),
        torch.tensor([[2]], dtype=torch.int32),
    )
    kv.k[2].normal_(), kv.v[2].normal_()
    q, k, v = (torch.randn(1, 1, 64).half() for _ in range(3))
    cos, sin = reference.rope_table(16, 64, 1e4)
    lengths = torch.tensor([9], dtype=torch.int32)
    got = kernels.rope_decode_attention(q, k, v, cos, sin, lengths, kv, config=CONFIG)
    near = PagedKV(kv.k[2:].clone(), kv.v[2:].clone(), torch.zeros(1, 1, dtype=torch.int32))
    exact(
        got,
        reference.decode_attention(reference.rope(q, cos[8:9], sin[8:9]), lengths, near),
        reference.decode_attention(reference.rope(q, cos[8:9], sin[8:9]).double(), lengths, double(near)),
    )
    assert torch.equal(kv.v[2, 0, 8], v[0, 0])
