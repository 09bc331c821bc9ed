"""What the kernel tests share: poisoned, strided pages, and the rule by which a kernel is exact enough."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels.bench import exactness
from mistral_nb_kernels.paged import PagedKV

MakeKV = Callable[..., PagedKV]
Exact = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same numbers each time, Triton's interpreter for its own modules too, of which it imports some late, and NaN
    or the largest integer in every new tensor: what a kernel forgets to write shows. One thread, as a worker of the
    tests has: of such small tensors several wait for each other, for minutes where others want the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    empty = torch.empty

    def poisoned(*size: Any, **how: Any) -> Tensor:
        new = empty(*size, **how)
        if new.is_floating_point():
            return new.fill_(torch.nan)
        return new.fill_(torch.iinfo(new.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes may be started that compile. They want to know where this one's main module came from, and IPython
    leaves one that cannot say.
    """
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


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
def guarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[PagedKV], PagedKV]:
    """The same pages, by a table behind which there is a row that names a nonexistent page, and from which no load is
    let through: a page that is looked up in vain would not show.
    """
    from triton.runtime import interpreter

    load: Callable[..., Any] = interpreter._interpreter.load
    behind: list[tuple[int, int]] = []

    def watched(addresses: Any, mask: Any, *rest: Any) -> Any:
        for begin, end in behind:
            assert not (mask & (addresses >= begin) & (addresses < end)).any(), "read behind the page table"
        return load(addresses, mask, *rest)

    monkeypatch.setattr(interpreter._interpreter, "load", watched)

    def guard(kv: PagedKV) -> PagedKV:
        table = torch.cat((kv.table, torch.full_like(kv.table[:1], 2**30)))
        behind.append((table[-1].data_ptr(), table[-1].data_ptr() + table[-1].nbytes))
        return PagedKV(kv.k, kv.v, table[:-1])

    return guard


@pytest.fixture
def exact() -> Exact:
    """The rule of `bench.exactness`."""
    return exactness.exact
