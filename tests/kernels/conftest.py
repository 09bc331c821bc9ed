"""What the kernel tests share: poisoned, strided pages, and the rule by which a kernel is exact enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels.paged import PagedKV

MakeKV = Callable[..., PagedKV]
Exact = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers each time, Triton's interpreter for its own modules too, of which it imports some late, and NaN
    in every new tensor: what a kernel forgets to write shows.
    """
    torch.manual_seed(0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    empty = torch.empty

    def poisoned(*size: Any, **how: Any) -> Tensor:
        new = empty(*size, **how)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def make_kv() -> MakeKV:
    """Pages in random order inside a pool of several layers; whatever no sequence covers is NaN, page 0 all of it.

    Entries of the table past a sequence's length name that page.
    """

    def make(lengths: Sequence[int], hkv: int, d: int, page: int, dtype: torch.dtype, spare: int = 1) -> PagedKV:
        needed = [-(-length // page) for length in lengths]
        pool = torch.full((2, 2, sum(needed) + 1, hkv, page, d), torch.nan, dtype=dtype)
        table = torch.zeros((len(lengths), max(needed) + spare), dtype=torch.int32)
        order = iter((torch.randperm(sum(needed)) + 1).tolist())
        for sequence, length in enumerate(lengths):
            for index in range(needed[sequence]):
                table[sequence, index] = next(order)
                used = min(page, length - index * page)
                pool[1, :, table[sequence, index], :, :used] = torch.randn(2, hkv, used, d).to(dtype)
        return PagedKV(pool[1, 0], pool[1, 1], table)

    return make


@pytest.fixture
def exact() -> Exact:
    """A kernel's error against fp64 is at most twice that of the torch reference in its type, plus one unit in the
    last place.
    """

    def check(got: Tensor, reference: Tensor, truth: Tensor) -> None:
        assert got.dtype == reference.dtype
        allowed = 2 * (reference.double() - truth).abs().max() + torch.finfo(got.dtype).eps * truth.abs().max()
        error = (got.double() - truth).abs().max()
        assert error <= allowed, f"error {float(error):.3g}, allowed {float(allowed):.3g}"

    return check
