"""The torch reference of a step that decodes: what a sequence gets does not depend on who else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mistral_nb_kernels import PagedKV, reference

LENGTHS = (1, 63, 64, 65, 0, 200, 257, 130, 511, 512, 513, 1000, 2047, 2048, 2049, 700, 255, 129)
CONTEXT = 4096
HKV, GROUP, D = 3, 3, 64
ROWS = len(LENGTHS)
Step = Callable[[Sequence[int], PagedKV], Tensor]


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


def contiguous(dtype: torch.dtype = torch.float32) -> PagedKV:
    """A page for each sequence, in an order of their own, with one that is nobody's among them."""
    order = [(7 * row + 3) % (ROWS + 1) for row in range(ROWS)]
    data = torch.zeros(ROWS + 1, 2, 2, HKV, CONTEXT, D, dtype=dtype)
    for row, length in enumerate(LENGTHS):
        data[order[row], ..., :length, :] = torch.randn(2, 2, HKV, length, D)
    return PagedKV(data[:, 1, 0], data[:, 1, 1], torch.tensor(order, dtype=torch.int32)[:, None])


def paged(kv: PagedKV, page: int) -> PagedKV:
    """The same tokens in short pages; what no sequence covers is NaN."""
    needed = [-(-length // page) for length in LENGTHS]
    k, v = (torch.full((sum(needed) + 1, HKV, page, D), torch.nan, dtype=kv.k.dtype) for _ in range(2))
    table = torch.zeros((ROWS, max(needed)), dtype=torch.int32)
    numbers = iter((torch.randperm(sum(needed)) + 1).tolist())
    for row, length in enumerate(LENGTHS):
        for index in range(needed[row]):
            table[row, index] = number = next(numbers)
            begin, end = index * page, min(length, (index + 1) * page)
            for new, old in ((k, kv.k), (v, kv.v)):
                new[number, :, : end - begin] = old[kv.table[row, 0], :, begin:end]
    return PagedKV(k, v, table)


def of(rows: Sequence[int], kv: PagedKV) -> PagedKV:
    return PagedKV(kv.k, kv.v, kv.table[list(rows)])


@pytest.fixture(params=[None, 100, 600])
def step(request: pytest.FixtureRequest) -> Step:
    """Attention of the newest tokens of some rows, which go to the pages first."""
    q, k, v = torch.randn(ROWS, HKV * GROUP, D), torch.randn(ROWS, HKV, D), torch.randn(ROWS, HKV, D)
    angles = reference.rope_table(CONTEXT, D, 1e4)

    def run(rows: Sequence[int], kv: PagedKV) -> Tensor:
        mine, lengths = list(rows), torch.tensor([LENGTHS[row] for row in rows], dtype=torch.int32)
        return reference.rope_decode_attention(q[mine], k[mine], v[mine], *angles, lengths, of(rows, kv), request.param)

    return run


@pytest.mark.parametrize(
    ("page", "dtype"),
    [(None, torch.float32), (16, torch.float32), (64, torch.float32), (None, torch.bfloat16), (64, torch.bfloat16)],
)
def test_a_sequence_does_not_depend_on_the_others(
    step: Step, page: int | None, dtype: torch.dtype, with_threads: Callable[[int], None]
) -> None:
    """Bit by bit, in any company, in any order and with any number of threads; also what is written."""
    torch.manual_seed(1)
    kv = contiguous(dtype) if page is None else paged(contiguous(dtype), page)
    with_threads(1)
    alone = torch.cat([step([row], kv) for row in range(ROWS)])
    written = kv.k.clone(), kv.v.clone()
    everyone = list(range(ROWS))
    for threads in (1, 2, 3):
        with_threads(threads)
        for rows in (everyone, everyone[::-1], everyone[3:11], [5, 0], everyone[::3], [4], [4, 8]):
            assert torch.equal(step(rows, kv), alone[rows]), (threads, rows)
    for now, before in zip((kv.k, kv.v), written, strict=True):
        assert torch.equal(now.nan_to_num(), before.nan_to_num())


def test_where_the_keys_lie_makes_no_difference(step: Step) -> None:
    torch.manual_seed(2)
    kv = contiguous()
    expected = step(range(ROWS), kv)
    for page in (16, 64):
        assert torch.equal(step(range(ROWS), paged(kv, page)), expected)
    apart = PagedKV(*(F.pad(each, (0, 8))[..., :D] for each in (kv.k, kv.v)), kv.table)
    assert apart.k.stride(-2) % D
    assert torch.equal(step(range(ROWS), apart), expected)
    assert torch.equal(apart.k, kv.k)


def test_in_bf16_it_is_what_it_is_in_fp32_but_for_the_rounding(step: Step) -> None:
    kv, everyone = contiguous(), list(range(ROWS))
    short = PagedKV(kv.k.bfloat16(), kv.v.bfloat16(), kv.table)
    found, expected = step(everyone, short), step(everyone, PagedKV(short.k.float(), short.v.float(), kv.table))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("window", [None, 100, 600])
def test_it_is_attention_of_each(window: int | None) -> None:
    torch.manual_seed(3)
    kv, q = contiguous(), torch.randn(ROWS, HKV * GROUP, D)
    got = reference.decode_attention(q, torch.tensor(LENGTHS, dtype=torch.int32), kv, window)
    for row, length in enumerate(LENGTHS):
        if length:
            keys, values = kv.of(row, length)
            expected = reference.attention(q[row : row + 1].double(), keys.double(), values.double(), window)[0]
            torch.testing.assert_close(got[row].double(), expected, atol=1e-6, rtol=1e-5)
        else:
            assert not got[row].any()


def test_steps_of_one_length_are_read_in_one_call_where_their_pages_are_neighbours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    usual: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def counted(q: Tensor, *rest: Any, **how: Any) -> Tensor:
        calls.append(len(q))
        return usual(q, *rest, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    data = torch.zeros(9, HKV, 512, D)
    table = torch.tensor([2, 0, 1, 3, 5, 6, 8], dtype=torch.int32)[:, None]
    lengths = torch.tensor([97, 100, 128, 120, 110, 300, 310], dtype=torch.int32)
    reference.decode_attention(torch.zeros(7, HKV * GROUP, D), lengths, PagedKV(data, data, table))
    assert sorted(calls) == [1, 1, 1, 4]
