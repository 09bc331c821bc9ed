"""LoRA adapters of a batch, under Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config, read
from mistral_nb_kernels.packed import Lora, Norm
from tests.kernels.lora_adapters import adapters, scales

kernels = pytest.importorskip("mistral_nb_kernels.lora")

CONFIG = Config(warps=1, stages=1, block_m=16, block_n=32, block_k=16)
SLOTS = (0, -1, 1, 3, 1, -1, 0)
"""Slot 2 is nobody's."""
MANY = (*SLOTS, 3, 3, 3, -1, 0, 0, 1, 1, 1, 1, 0, 3)
"""More than a tile of rows."""
FAR = 2**31

Exact = Callable[[Tensor, Tensor, Tensor], None]


@pytest.fixture(params=["few", "many"])
def slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The slots of a batch, for the form of few rows and for that of many, two steps of a product to a program."""
    if request.param == "many":
        monkeypatch.setattr(kernels, "FEW", 0)
        monkeypatch.setattr(kernels, "SPLIT", 32)
    return torch.tensor(SLOTS if request.param == "few" else MANY, dtype=torch.int32)


def double(lora: Lora) -> Lora:
    return dataclasses.replace(lora, a=lora.a.double(), b=lora.b.double())


def rows_of(n: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers between NaN."""
    wide = torch.full((n, columns + 24), torch.nan, dtype=dtype)
    wide[:, 8:-16] = torch.randn(n, columns)
    return wide[:, 8:-16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("inputs", "parts", "ranks"),
    [
        (1, 1, (1, 1, 0, 1)),
        (15, 3, (1, 7, 0, 3)),
        (16, 2, (16, 5, 0, 1)),
        (17, 1, (40, 5, 0, 1)),
        (32, 1, (1, 2, 0, 1)),
        (33, 3, (16, 5, 0, 1)),
        (513, 1, (1, 2, 0, 1)),
    ],
)
def test_shrink_equals_the_reference(
    exact: Exact, slots: Tensor, inputs: int, parts: int, ranks: tuple[int, ...], normed: bool, dtype: torch.dtype
) -> None:
    lora = adapters(inputs, [10 * (part + 1) for part in range(parts)], ranks, dtype)
    x, norm = rows_of(len(slots), inputs, dtype), Norm(torch.rand(inputs).to(dtype), 1e-5) if normed else None
    scale = scales(slots)
    got = kernels.lora_shrink(x, lora, slots, scale, norm=norm, config=CONFIG)
    wide = Norm(norm.weight.double(), norm.eps) if norm is not None else None
    exact(
        got,
        reference.lora_shrink(x, lora, slots, scale, norm=norm),
        reference.lora_shrink(x.double(), double(lora), slots, scale, norm=wide),
    )
    assert not got[slots < 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("ends", "ranks"),
    [((31,), (1, 1, 0, 1)), ((32, 33), (7, 3, 0, 1)), ((33, 65, 96), (16, 5, 0, 1)), ((8, 9, 50), (65, 5, 0, 64))],
)
def test_expand_equals_the_reference(
    exact: Exact, slots: Tensor, ends: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Into strided rows, whose surroundings stay."""
    lora = adapters(4, ends, ranks, dtype)
    shrunk, y = rows_of(len(slots), len(ends) * max(ranks), torch.float32), rows_of(len(slots), ends[-1], dtype)
    before = y.clone()
    got = kernels.lora_expand(shrunk, lora, slots, y, config=CONFIG)
    assert got is y
    exact(
        got,
        reference.lora_expand(shrunk, lora, slots, before.clone()),
        reference.lora_expand(shrunk.double(), double(lora), slots, before.double()),
    )
    assert torch.equal(got[slots < 0], before[slots < 0])
    assert y._base is not None
    assert int(y._base.isnan().sum()) == 24 * len(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ranks_1_7_16_64_and_none_in_a_batch_equal_merged_weights(
    exact: Exact, slots: Tensor, dtype: torch.dtype
) -> None:
    """Against W + scale B A of each row, in fp64."""
    ends, inputs = (20, 33), 40
    lora, base = adapters(inputs, ends, (1, 7, 0, 16, 64), dtype), torch.randn(ends[-1], inputs).to(dtype)
    slots = torch.where(slots == 0, 4, slots)[:17]
    slots[0] = 0
    assert slots.unique().tolist() == [-1, 0, 1, 3, 4]
    x, scale = torch.randn(len(slots), inputs).to(dtype), scales(slots)
    y = reference.lora_expand(reference.lora_shrink(x, lora, slots, scale), lora, slots, x @ base.t())
    got = kernels.lora_expand(
        kernels.lora_shrink(x, lora, slots, scale, config=CONFIG), lora, slots, x @ base.t(), config=CONFIG
    )
    truth = torch.empty(len(x), ends[-1], dtype=torch.float64)
    for row, slot in enumerate(slots.tolist()):
        weight = base.double()
        if slot >= 0:
            a = lora.a[slot].double().unflatten(0, (2, -1))
            b = lora.b[slot].double().split((20, 13))
            weight = weight + float(scale[row]) * torch.cat([b[part] @ a[part] for part in range(2)])
        truth[row] = weight @ x[row].double()
    exact(got, y, truth)


def test_shrunk_values_beyond_fp16(exact: Exact, slots: Tensor) -> None:
    """Above its largest and below its normal numbers, where what they add is neither; beside each other in a row."""
    lora = adapters(4, (33, 40), (40, 40, 0, 40))
    size = torch.tensor([1e-3, 1e3, 1.0, 1.0])[:, None, None]
    lora = dataclasses.replace(lora, b=(lora.b * size).half(), a=lora.a.half())
    shrunk = torch.randn(len(slots), 80) / size[slots.clamp(min=0), 0] ** 2
    shrunk *= torch.cat((torch.ones(24), torch.full((16,), 1e-6))).repeat(2)
    shrunk[-1] = 0
    y = torch.randn(len(slots), 40).half() / 1024
    exact(
        kernels.lora_expand(shrunk, lora, slots, y.clone(), config=CONFIG),
        reference.lora_expand(shrunk, lora, slots, y.clone()),
        reference.lora_expand(shrunk.double(), double(lora), slots, y.double()),
    )


def test_a_scale_of_zero_is_the_base_to_the_bit(slots: Tensor) -> None:
    lora = adapters(33, (20, 40), (5, 5, 0, 5), torch.float16)
    scale = torch.zeros(len(slots))
    x, y = torch.randn(len(slots), 33).half(), torch.randn(len(slots), 40).half()
    shrunk = kernels.lora_shrink(x, lora, slots, scale, config=CONFIG)
    assert torch.equal(kernels.lora_expand(shrunk, lora, slots, y.clone(), config=CONFIG), y)


def test_a_row_depends_on_no_other(slots: Tensor) -> None:
    """Bit by bit, alone and in another order, beside rows of NaN too; of numbers whose sums are exact: numpy's matrix
    product, which stands for the matrix unit here, adds in an order of its own.
    """
    lora = adapters(50, (20, 33), (4, 7, 0, 2), torch.float16)
    lora = dataclasses.replace(lora, a=(lora.a * 8).round_(), b=(lora.b * 2).round_())
    x, y = torch.randint(-2, 3, (len(slots), 50)).half(), torch.randint(-9, 9, (len(slots), 33)).half()

    def update(which: Tensor) -> Tensor:
        shrunk = kernels.lora_shrink(x[which], lora, slots[which], torch.ones(len(which)), config=CONFIG)
        return kernels.lora_expand(shrunk, lora, slots[which], y[which], config=CONFIG)

    together = update(torch.arange(len(slots)))
    for row in range(7):
        assert torch.equal(update(torch.tensor([row]))[0], together[row])
    order = torch.randperm(len(slots))
    assert torch.equal(update(order), together[order])
    x[2], y[3] = torch.nan, torch.nan
    rest = (torch.arange(len(slots)) != 2) & (torch.arange(len(slots)) != 3)
    assert torch.equal(update(torch.arange(len(slots)))[rest], together[rest])


def test_few_rows_sum_in_one_order(exact: Exact) -> None:
    """Bit by bit, of any numbers."""
    lora, slots = adapters(1100, (40,), (3, 7, 0, 1)), torch.tensor(SLOTS, dtype=torch.int32)
    scale = scales(slots)
    x, norm = torch.randn(len(slots), 1100), Norm(torch.rand(1100), 1e-5)
    together = kernels.lora_shrink(x, lora, slots, scale, norm=norm, config=CONFIG)
    updated = kernels.lora_expand(together, lora, slots, torch.ones(len(slots), 40), config=CONFIG)
    for row in range(len(slots)):
        one = slice(row, row + 1)
        alone = kernels.lora_shrink(x[one], lora, slots[one], scale[one], norm=norm, config=CONFIG)
        assert torch.equal(alone, together[one])
        got = kernels.lora_expand(alone, lora, slots[one], torch.ones(1, 40), config=CONFIG)
        assert torch.equal(got, updated[one])


@pytest.mark.parametrize("n", [1, 64, 65])
def test_grids_depend_on_shapes_alone_and_the_host_reads_nothing(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So one CUDA graph serves every mix of adapters."""
    lora = adapters(32, (40, 50), (4, 4))
    grids: list[tuple[str, tuple[int, ...]]] = []

    class Launches:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append((self.name, grid))
            return lambda *args, **options: None

    def forbidden(*args: Any) -> Any:
        raise AssertionError("the host waits for the device")

    for name in ("lora_shrink_kernel", "lora_shrink_rows_kernel", "lora_expand_kernel", "lora_expand_rows_kernel"):
        monkeypatch.setattr(kernels, name, Launches(name))
    seen = []
    for slot in (-1, 0, 1):
        slots, x, scale = torch.full((n,), slot, dtype=torch.int32), torch.zeros(n, 32), torch.ones(n)
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__"):
                patch.setattr(Tensor, name, forbidden)
            shrunk = kernels.lora_shrink(x, lora, slots, scale, config=CONFIG)
            kernels.lora_expand(shrunk, lora, slots, torch.zeros(n, 50), config=CONFIG)
        seen.append(list(grids))
        grids.clear()
    assert seen[0] == seen[1] == seen[2]
    form = "" if n <= kernels.FEW else "_rows"
    assert [name for name, _ in seen[0]] == [f"lora_shrink{form}_kernel", f"lora_expand{form}_kernel"]
    assert [grid for _, grid in seen[0]] == ([(n, 8), (n, 3)] if not form else [(5, 1, 1), (3, 5)])


def test_no_matrix_unit_without_tiles_of_rows(exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """On sm_75 the table has none: more than a few rows are summed too."""
    monkeypatch.setattr(kernels, "FEW", 2)
    slots = torch.tensor(SLOTS, dtype=torch.int32)
    lora, x = adapters(20, (9,), (1, 2, 0, 1)), torch.randn(len(slots), 20)
    config, scale, rows = Config(warps=1, block_n=16), scales(slots), [slice(i, i + 1) for i in range(len(slots))]
    few = [kernels.lora_shrink(x[row], lora, slots[row], scale[row], config=config) for row in rows]
    shrunk = kernels.lora_shrink(x, lora, slots, scale, config=config)
    assert torch.equal(shrunk, torch.cat(few))
    y = kernels.lora_expand(shrunk, lora, slots, torch.zeros(len(slots), 9), config=config)
    exact(
        y,
        reference.lora_expand(shrunk, lora, slots, torch.zeros(len(slots), 9)),
        reference.lora_expand(shrunk.double(), double(lora), slots, torch.zeros(len(slots), 9).double()),
    )


@pytest.mark.parametrize(("parts", "inputs", "grid"), [(1, 14336, (5, 1, 28)), (2, 576, (5, 1, 2)), (5, 64, (5, 2, 1))])
def test_a_program_of_many_rows_takes_few_inputs_and_no_more_outputs_than_there_are(
    parts: int, inputs: int, grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """65 rows: tiles as wide as the outputs, up to the table's width."""
    launched: list[tuple[tuple[int, ...], int]] = []

    class Launches:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: launched.append((grid, options["BLOCK_N"]))

    monkeypatch.setattr(kernels, "lora_shrink_rows_kernel", Launches())
    lora = Lora(torch.zeros(1, 16 * parts, inputs), torch.zeros(1, 8, 16), (8,))
    config = Config(warps=8, block_m=16, block_n=64, block_k=64)
    x, slots, scale = torch.zeros(65, inputs), torch.zeros(65, dtype=torch.int32), torch.ones(65)
    kernels.lora_shrink(x, lora, slots, scale, config=config)
    assert launched == [(grid, min(64, 16 * parts))]
    whole = dataclasses.replace(config, block_k=1024)
    with pytest.raises(AssertionError):  # of a wider step the next program's inputs would be a part
        kernels.lora_shrink(x, lora, slots, scale, config=whole)


def test_a_number_of_rows_is_no_reason_to_compile_again() -> None:
    for kernel in (kernels.lora_shrink_rows_kernel, kernels.lora_expand_rows_kernel):
        assert kernel.kwargs["do_not_specialize"] == ["rows"]


def test_the_norm_before_the_matrix_unit_is_the_table_s() -> None:
    assert {row.config for row in read() if row.op == "rms_norm"} == {kernels.NORMED}


def test_what_a_kernel_would_read_wrongly_is_refused() -> None:
    lora, slots, x = adapters(20, (9,), (2, 2)), torch.zeros(3, dtype=torch.int32), torch.zeros(3, 20)
    norm, shrunk, y, scale = torch.ones(20, 2), torch.zeros(3, 2), torch.zeros(3, 9), torch.ones(3)
    strided = torch.zeros(3, 2, dtype=torch.int32)[:, 0]
    for wrong in (
        lambda: kernels.lora_shrink(x, lora, slots, scale, norm=Norm(norm[:, 0], 1e-5), config=CONFIG),
        lambda: kernels.lora_shrink(x, lora, slots, scale, norm=Norm(norm[:10, 0].clone(), 1e-5), config=CONFIG),
        lambda: kernels.lora_shrink(x[:, :19], lora, slots, scale, config=CONFIG),
        lambda: kernels.lora_shrink(x, lora, slots[:2], scale, config=CONFIG),
        lambda: kernels.lora_shrink(x, lora, strided, scale, config=CONFIG),
        lambda: kernels.lora_shrink(x, lora, slots, scale[:1], config=CONFIG),
        lambda: kernels.lora_shrink(x, lora, slots, scale.half(), config=CONFIG),
        lambda: kernels.lora_shrink(x, lora, slots, torch.ones(3, 2)[:, 0], config=CONFIG),
        lambda: kernels.lora_expand(shrunk, lora, strided, y, config=CONFIG),
        lambda: kernels.lora_expand(shrunk, lora, slots[:2], y, config=CONFIG),
        lambda: kernels.lora_expand(shrunk[:, :1], lora, slots, y, config=CONFIG),
        lambda: kernels.lora_expand(shrunk.half(), lora, slots, y, config=CONFIG),
        lambda: kernels.lora_expand(shrunk, lora, slots, y[:, :8], config=CONFIG),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_no_rows_are_no_launch() -> None:
    lora, slots = adapters(20, (9,), (1, 2)), torch.zeros(0, dtype=torch.int32)
    shrunk = kernels.lora_shrink(torch.zeros(0, 20), lora, slots, torch.zeros(0), config=CONFIG)
    assert shrunk.shape == (0, 2)
    assert kernels.lora_expand(shrunk, lora, slots, torch.zeros(0, 9), config=CONFIG).shape == (0, 9)


def test_slots_and_rows_past_two_to_the_31_elements(exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is touched of the storage takes memory."""
    storage = torch.empty_strided((FAR + 2**15,), (1,), dtype=torch.float16)

    def far(*shape: int, at: int) -> Tensor:
        inner = (shape[2], 1) if len(shape) == 3 else (1,)
        return storage.as_strided(shape, (FAR // 2, *inner), at).copy_(torch.randn(shape))

    a, b, x, y = far(3, 2, 24, at=0), far(3, 20, 2, at=64), far(3, 24, at=1024), far(3, 20, at=2048)
    lora, slots = Lora(a, b, (20,)), torch.tensor([2, 0, 2], dtype=torch.int32)
    scale = scales(slots)
    before = y.clone()
    for few in (64, 0):
        monkeypatch.setattr(kernels, "FEW", few)
        y.copy_(before)
        shrunk = kernels.lora_shrink(x, lora, slots, scale, config=CONFIG)
        truth = reference.lora_shrink(x.double(), double(lora), slots, scale)
        exact(shrunk, reference.lora_shrink(x, lora, slots, scale), truth)
        exact(
            kernels.lora_expand(shrunk, lora, slots, y, config=CONFIG),
            reference.lora_expand(shrunk, lora, slots, before.clone()),
            reference.lora_expand(shrunk.double(), double(lora), slots, before.double()),
        )
