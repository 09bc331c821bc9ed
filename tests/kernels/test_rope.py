"""RoPE with the KV write, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV, Rows

rope_write = pytest.importorskip("mistral_nb_kernels.rope").rope_write

CONFIG = Config(warps=4)
COUNTS, LENGTHS = (1, 3, 18), (1, 17, 34)


def projection(n: int, hq: int, hkv: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as views of one packed projection."""
    packed = torch.randn(n, (hq + 2 * hkv) * d).to(dtype).view(n, hq + 2 * hkv, d)
    return packed[:, :hq], packed[:, hq : hq + hkv], packed[:, hq + hkv :]


def blank(kv: PagedKV, dtype: torch.dtype) -> PagedKV:
    """The same table over pages of NaN."""
    return PagedKV(
        torch.full_like(kv.k, torch.nan, dtype=dtype), torch.full_like(kv.v, torch.nan, dtype=dtype), kv.table
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("hq", "hkv", "d"), [(9, 3, 64), (4, 2, 128), (1, 1, 64)])
def test_turns_and_writes_what_the_reference_does(
    make_kv: Callable[..., PagedKV],
    exact: Callable[[Tensor, Tensor, Tensor], None],
    hq: int,
    hkv: int,
    d: int,
    dtype: torch.dtype,
) -> None:
    """Also: nothing else in the pages is touched."""
    q, k, v = projection(sum(COUNTS), hq, hkv, d, dtype)
    rows = Rows.of(COUNTS, LENGTHS)
    pages = make_kv(LENGTHS, hkv, d, 16, dtype)
    got, expected, truth = (blank(pages, x) for x in (dtype, dtype, torch.float64))
    cos, sin = reference.rope_table(64, d, 1e4)
    turned = rope_write(q, k, v, cos, sin, rows, got, config=CONFIG)
    exact(
        turned,
        reference.rope_write(q, k, v, cos, sin, rows, expected),
        reference.rope_write(q.double(), k.double(), v.double(), cos.double(), sin.double(), rows, truth),
    )
    written = ~truth.k.isnan()
    assert int(written.sum()) == sum(COUNTS) * hkv * d
    assert torch.equal(~got.k.isnan(), written)
    exact(*(x.k[written].view(-1, d) for x in (got, expected, truth)))
    assert torch.equal(got.v.nan_to_num(), expected.v.nan_to_num())


def test_a_padding_row_writes_nothing(make_kv: Callable[..., PagedKV]) -> None:
    q, k, v = projection(3, 2, 1, 64, torch.float32)
    kv = make_kv((20, 20), 1, 64, 16, torch.float32)
    before = kv.k.clone(), kv.v.clone()
    cos, sin = reference.rope_table(64, 64, 1e4)
    rows = Rows.of((1, 2), (1, 2))
    rows.positions.fill_(-1)
    rope_write(q, k, v, cos, sin, rows, kv, config=CONFIG)
    assert torch.equal(kv.k.nan_to_num(), before[0].nan_to_num())
    assert torch.equal(kv.v.nan_to_num(), before[1].nan_to_num())


def test_no_rows_are_no_launch(make_kv: Callable[..., PagedKV]) -> None:
    q, k, v = projection(0, 2, 1, 64, torch.float32)
    kv = make_kv((1,), 1, 64, 16, torch.float32)
    cos, sin = reference.rope_table(64, 64, 1e4)
    assert rope_write(q, k, v, cos, sin, Rows.of((0,), (1,)), kv, config=CONFIG).shape == (0, 2, 64)


def test_pages_and_rows_past_two_to_the_31_elements() -> None:
    """Only what is touched of the storage takes memory."""
    far = 2**31
    storage = torch.empty_strided((far + 2**17,), (1,), dtype=torch.float16)
    shape, strides = (3, 1, 16, 64), (far // 2, 1024, 64, 1)
    kv = PagedKV(
        storage.as_strided(shape, strides),
        storage.as_strided(shape, strides, 4096),
        torch.tensor([[0, 2]], dtype=torch.int32),
    )
    q, k, v = (
        storage.as_strided((3, heads, 64), (far // 2, 64, 1), 2**16 + at) for heads, at in ((2, 0), (1, 128), (1, 192))
    )
    for x in (q, k, v):
        x.copy_(torch.randn(x.shape))
    cos, sin = reference.rope_table(64, 64, 1e4)
    rows = Rows.of((3,), (18,))
    turned = rope_write(q, k, v, cos, sin, rows, kv, config=CONFIG)
    angles = cos[15:18], sin[15:18]
    torch.testing.assert_close(turned, reference.rope(q, *angles), atol=2e-3, rtol=1e-3)
    assert torch.equal(kv.v[2, :, :2], v[1:].transpose(0, 1))
    torch.testing.assert_close(kv.k[2, :, :2], reference.rope(k, *angles)[1:].transpose(0, 1), atol=2e-3, rtol=1e-3)
