"""The torch reference of LoRA adapters: a row depends on no other, on no padding and on no number of threads."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from tests.kernels.lora_adapters import adapters, packed, scales


def test_the_reference_gives_a_row_the_same_whatever_its_neighbours() -> None:
    """Bit by bit, at any number of rows and with any number of threads; and it is the formula."""
    lora, slots = adapters(576, (96, 160), (5, 3)), torch.arange(150, dtype=torch.int32) % 3 - 1
    x, y, threads = torch.randn(150, 576), torch.randn(150, 160), torch.get_num_threads()
    scale = scales(slots)
    together = reference.lora_shrink(x, lora, slots, scale)
    expanded = reference.lora_expand(together, lora, slots, y.clone())
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for rows in (1, 2, 5, 17, 64):
                some = slice(3, 3 + rows)
                shrunk = reference.lora_shrink(x[some], lora, slots[some], scale[some])
                assert torch.equal(shrunk, together[some])
                assert torch.equal(reference.lora_expand(shrunk, lora, slots[some], y[some].clone()), expanded[some])
    finally:
        torch.set_num_threads(threads)
    for row, slot in ((0, -1), (1, 0), (2, 1)):
        assert int(slots[row]) == slot
        parts = [x[row].double() @ a.double().t() * float(scale[row]) for a in lora.a[slot].split(5)]
        update = torch.cat([b.double() @ part for b, part in zip(lora.b[slot].split((96, 64)), parts, strict=True)])
        expected = y[row].double() + update if slot >= 0 else y[row].double()
        torch.testing.assert_close(expanded[row].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("features", [576, 1536])
def test_the_reference_gives_a_prompts_rows_the_same_with_any_number_of_threads(features: int) -> None:
    """Bit by bit: how many there are is chosen by the clock."""
    lora, slots, threads = adapters(features, (192, 384, 576), (8, 8)), torch.zeros(128, dtype=torch.int32), []
    x, y, usual = torch.randn(128, features), torch.randn(128, 576), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4, 8):
            torch.set_num_threads(count)
            shrunk = reference.lora_shrink(x, lora, slots, scales(slots))
            threads.append((shrunk, reference.lora_expand(shrunk, lora, slots, y.clone())))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(usual)
    for shrunk, expanded in threads:
        assert torch.equal(shrunk, threads[0][0])
        assert torch.equal(expanded, threads[0][1])


@pytest.mark.parametrize("n", [5, reference.lora.FEW + 1])
def test_the_reference_reads_no_padding_of_known_ranks(n: int) -> None:
    """Which may be of any kind; a slot of rank 0 is none."""
    padded = adapters(40, (20, 33), (7, 3, 1, 16))
    known = packed(padded, (7, 3, 0, 16))
    for slot in (0, 1, 3):
        slots, x, scale = torch.full((n,), slot, dtype=torch.int32), torch.randn(n, 40), torch.rand(n)
        shrunk = reference.lora_shrink(x, known, slots, scale)
        torch.testing.assert_close(shrunk, reference.lora_shrink(x, padded, slots, scale))
        y = torch.randn(n, 33)
        expected = reference.lora_expand(shrunk, padded, slots, y.clone())
        torch.testing.assert_close(reference.lora_expand(shrunk, known, slots, y), expected)
    slots, y = torch.full((n,), 2, dtype=torch.int32), torch.randn(n, 33)
    shrunk = reference.lora_shrink(x, known, slots, scale)
    assert not shrunk.any()
    assert torch.equal(reference.lora_expand(shrunk, known, slots, y.clone()), y)


@pytest.mark.parametrize(("inputs", "ends"), [(576, (576, 768, 960)), (64, (64, 128)), (1536, (576,))])
def test_a_row_of_the_reference_does_not_depend_on_its_neighbours(inputs: int, ends: tuple[int, ...]) -> None:
    """Bit by bit, with any number of threads: alone, among others of its adapter, of its rank, of other ranks."""
    torch.manual_seed(inputs)
    ranks = (8, 8, 8, 3, 16, 16, 8, 64)
    lora = packed(adapters(inputs, ends, ranks), ranks)
    batches: list[tuple[int, ...]] = [(slot,) for slot in range(8)]
    batches += [tuple(range(8)), (7, 6, 5, 4, 3, 2, 1, 0), (2, 2, -1, 0, 0, 3, 1, 0), (5, -1, 4, 4), (1, 2), (0,) * 8]
    x, y, usual = torch.randn(9, inputs), torch.randn(9, ends[-1]), torch.get_num_threads()
    alone: dict[tuple[int, int], Tensor] = {}
    try:
        for threads, batch in itertools.product((1, 2, 3), batches):
            torch.set_num_threads(threads)
            n, slots = len(batch), torch.tensor(batch, dtype=torch.int32)
            together = reference.Adapting(slots, 0.5 + slots / 4).update(x[:n], lora, y[:n].clone())
            shrunk = reference.lora_shrink(x[:n], lora, slots, 0.5 + slots / 4)
            assert torch.equal(together, reference.lora_expand(shrunk, lora, slots, y[:n].clone()))
            for row, slot in enumerate(batch):
                one = torch.tensor([slot], dtype=torch.int32)
                if (row, slot) not in alone:
                    step = reference.Adapting(one, 0.5 + one / 4)
                    alone[row, slot] = step.update(x[row : row + 1], lora, y[row : row + 1].clone())[0]
                assert torch.equal(together[row], alone[row, slot]), (threads, batch, row)
    finally:
        torch.set_num_threads(usual)
