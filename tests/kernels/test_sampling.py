"""Sampling on a GPU, under Triton's interpreter: the reference's tokens, one by one."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.parameters import Parameters, Penalties
from mistral_nb_kernels.reference.sampling import weigh

triton = pytest.importorskip("triton")
sampling = pytest.importorskip("mistral_nb_kernels.sampling")
tl = triton.language

SMALL, SHIPPED = Config(warps=4, block_n=64), Config(warps=16, block_n=8192)


@pytest.fixture(autouse=True)
def found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter searches triton.language anew at every call of one function by another: a third of the time."""
    from triton.runtime import interpreter

    replace: Callable[..., None] = interpreter._patch_builtin
    first: dict[Any, str] = {}

    def once(package: Any, *rest: Any) -> None:
        if package not in first or tl.core.is_builtin(getattr(package, first[package])):
            names = (name for name, member in vars(package).items() if tl.core.is_builtin(member))
            first[package] = next(names, "__name__")
            replace(package, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", once)


def parameters(n: int, vocab: int, source: random.Random) -> Parameters:
    """Every filter on and off, at every temperature, with seeds and positions of more than 32 bits."""

    def of(choices: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([source.choice(choices) for _ in range(n)], dtype=dtype)

    return Parameters(
        temperature=of((0.0, 1e-3, 0.3, 0.6, 1.0, 1.0, 2.5, 40.0)),
        top_p=of((1.0, 1.0, 0.0, 0.3, 0.9, 0.9, 0.999)),
        repetition_penalty=of((0.0, 1.0, 1.3, 0.8)),
        frequency_penalty=of((0.0, 0.0, 0.3, -0.5)),
        presence_penalty=of((0.0, 0.0, 0.4)),
        top_k=of((0, 0, 1, 3, 10, vocab // 2, vocab - 1, vocab, 2 * vocab), torch.int32),
        seed=of([source.getrandbits(bits) for bits in (1, 10, 31, 62)], torch.int64),
        position=of([source.getrandbits(bits) for bits in (1, 10, 31, 40)], torch.int64),
    )


def scores(n: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """A strided view between NaN; of three rows one has ties and another scores of -inf, and both zeros occur."""
    storage = torch.full((n, vocab + 7), torch.nan, dtype=dtype)
    logits = storage[:, 3 : 3 + vocab]
    logits.copy_(torch.randn(n, vocab) * 3)
    logits[::3].copy_(logits[::3].round())
    logits[1::3, 1::2] = -math.inf
    return logits


def penalties(n: int, vocab: int) -> Penalties:
    """Of n + 2 sequences, in another order; the first row has none."""
    counts = torch.full((n + 2, vocab + 5), 1000, dtype=torch.int32)[:, :vocab]
    counts.copy_(torch.randint(-2, 3, (n + 2, vocab)).clamp(min=0))
    prompt = torch.ones(n + 2, vocab + 9, dtype=torch.bool)[:, :vocab]
    prompt.copy_(torch.rand(n + 2, vocab) < 0.2)
    row = torch.randperm(n + 2)[:n].to(torch.int32)
    row[0] = -1
    return Penalties(counts, prompt, row)


def copied(penalties: Penalties) -> Penalties:
    return dataclasses.replace(penalties, counts=penalties.counts.clone())


def of_rows(parameters: Parameters, rows: Sequence[int]) -> Parameters:
    return Parameters(**{f.name: getattr(parameters, f.name)[list(rows)] for f in dataclasses.fields(Parameters)})


@pytest.mark.parametrize(
    ("n", "vocab", "dtype"),
    [
        (4, 1, torch.float32),
        (85, 7, torch.float16),
        (70, 63, torch.bfloat16),
        (50, 64, torch.float16),
        (60, 65, torch.float32),
        (15, 200, torch.float32),
        (10, 200, torch.bfloat16),
    ],
)
def test_the_same_tokens_as_the_reference(n: int, vocab: int, dtype: torch.dtype) -> None:
    """With the 6 rows at real vocabularies: 300 cases, and the tokens drawn are counted."""
    asked = parameters(n, vocab, random.Random(vocab + dtype.itemsize))
    logits, counted = scores(n, vocab, dtype), penalties(n, vocab)
    expected = copied(counted)
    tokens = sampling.sample(logits, asked, counted, config=SMALL)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == reference.sample(logits, asked, expected).tolist()
    assert torch.equal(counted.counts, expected.counts)


@pytest.mark.parametrize("vocab", [32000, 32768, 49152])
def test_the_same_tokens_at_real_vocabularies(vocab: int) -> None:
    n = 2
    logits, counted = scores(n, vocab, torch.float32), penalties(n, vocab)
    asked = dataclasses.replace(
        parameters(n, vocab, random.Random(vocab)),
        temperature=torch.tensor([1.0, 0.6]),
        top_p=torch.tensor([0.95, 1.0]),
        top_k=torch.tensor([0, 50], dtype=torch.int32),
    )
    expected = copied(counted)
    got = sampling.sample(logits, asked, counted, config=SHIPPED)
    assert got.tolist() == reference.sample(logits, asked, expected).tolist()
    assert torch.equal(counted.counts, expected.counts)


def test_a_draw_does_not_depend_on_the_batch() -> None:
    logits, asked = scores(12, 130, torch.float32), parameters(12, 130, random.Random(3))
    together = sampling.sample(logits, asked, config=SMALL).tolist()
    for rows in ([5], [11, 2, 5], [7, 7, 7, 7, 0]):
        alone = sampling.sample(logits[rows], of_rows(asked, rows), config=SMALL).tolist()
        assert alone == [together[row] for row in rows]


def plain(n: int, **changes: Tensor) -> Parameters:
    """Nothing asked for: temperature 1, each row with a seed of its own."""
    ones, zeros = torch.ones(n), torch.zeros(n)
    off = Parameters(ones, ones, ones, zeros, zeros, zeros.int(), torch.arange(n), zeros.long())
    return dataclasses.replace(off, **changes)


def test_top_k_among_more_tokens_than_are_finite_and_than_a_tile_holds() -> None:
    """k beyond a tile, k beyond the finite scores, and ties with the k-th."""
    logits = torch.randn(4, 200)
    logits[1, 40:] = -math.inf
    logits[2, 150:] = logits[2].sort(descending=True).values[99]
    asked = plain(4, top_k=torch.tensor([190, 60, 100, 63], dtype=torch.int32), temperature=torch.full((4,), 1e3))
    for position in range(2):
        again = dataclasses.replace(asked, position=torch.full((4,), position))
        expected = reference.sample(logits, again).tolist()
        assert sampling.sample(logits, again, config=SMALL).tolist() == expected


def test_broken_rows_are_minus_one_and_their_neighbours_are_not() -> None:
    logits = scores(6, 70, torch.float32)
    logits[1, 65], logits[2, 3] = math.nan, math.inf
    logits[3] = -math.inf
    logits[4, 69] = -math.nan
    counted = penalties(6, 70)
    before = counted.counts.clone()
    for cold in (0.0, 1.0):
        asked = plain(6, temperature=torch.full((6,), cold))
        tokens = sampling.sample(logits, asked, counted, config=SMALL).tolist()
        assert [token >= 0 for token in tokens] == [True, False, False, False, False, True]
    assert int((counted.counts - before).sum()) == 2  # the first row has no penalties


def test_the_ends_of_the_distribution() -> None:
    """One token of any weight; the lowest of the largest where cold; a zero of either sign is the same score; of two
    that weigh the most, both."""
    logits = torch.full((5, 130), -math.inf)
    logits[0, 129] = -5.0
    logits[1, [70, 3, 90]] = 2.5
    logits[2, 40], logits[2, 66] = -0.0, 0.0
    logits[3, 8], logits[3, 100] = 0.0, -0.0
    logits[4] = torch.where(torch.arange(130) % 60 == 9, 3.0, torch.rand(130))
    asked = plain(
        5,
        temperature=torch.tensor([1.0, 0.0, 0.0, 1.0, 0.1]),
        top_k=torch.tensor([1, 0, 0, 1, 0], dtype=torch.int32),
        top_p=torch.tensor([1.0, 1, 1, 1, 0.1]),
    )
    drawn = [
        sampling.sample(logits, dataclasses.replace(asked, seed=torch.full((5,), s)), config=SMALL) for s in range(6)
    ]
    rows = [set(row) for row in torch.stack(drawn, 1).tolist()]
    assert rows == [{129}, {3}, {40}, {8, 100}, {9, 69, 129}]


def test_what_the_kernel_would_read_wrongly_is_refused() -> None:
    """Columns of one tensor, too."""
    logits, asked, counted = torch.zeros(3, 9), plain(3), penalties(3, 9)
    columns = torch.ones(3, 2)
    for field in dataclasses.fields(Parameters):
        values = columns.to(getattr(asked, field.name).dtype)
        for wrong in (values[:, 0], values[:2, 0].clone()):
            with pytest.raises(AssertionError):
                sampling.sample(logits, dataclasses.replace(asked, **{field.name: wrong}), config=SMALL)
    rows = torch.zeros(3, 2, dtype=torch.int32)
    for other in (
        dataclasses.replace(counted, row=rows[:, 0]),
        dataclasses.replace(counted, row=counted.row[:2]),
        dataclasses.replace(counted, counts=counted.counts[:, :8]),
        dataclasses.replace(counted, prompt=counted.prompt[:, :8]),
    ):
        with pytest.raises(AssertionError):
            sampling.sample(logits, asked, other, config=SMALL)


def test_no_rows_are_no_launch() -> None:
    assert sampling.sample(torch.empty(0, 9), plain(0), config=SMALL).shape == (0,)


def test_rows_past_two_to_the_31_elements() -> None:
    """Only what is touched of the storage takes memory."""
    far, vocab = 2**30, 70
    logits, counts, prompt = (
        torch.empty_strided((2 * far + 100,), (1,), dtype=dtype).as_strided((3, vocab), (far, 1))
        for dtype in (torch.float16, torch.int32, torch.bool)
    )
    logits.copy_(torch.randn(3, vocab) * 2)
    counts.zero_()
    prompt.copy_(torch.rand(3, vocab) < 0.5)
    asked = plain(3, repetition_penalty=torch.full((3,), 5.0))
    counted = Penalties(counts, prompt, torch.tensor([0, 1, 2], dtype=torch.int32))
    near = Penalties(counts.clone(), prompt.clone(), counted.row)
    tokens = sampling.sample(logits, asked, counted, config=SMALL)
    assert tokens.tolist() == reference.sample(logits.clone(), asked, near).tolist()
    assert torch.equal(counts, near.counts)


@triton.jit
def _weights_kernel(x, out, largest, rate, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, sampling._weight(tl.load(x + at), tl.load(largest), tl.load(rate)))


@pytest.mark.parametrize("temperature", [0.01, 0.6, 1.0, 30.0])
def test_weights_are_the_reference_s_to_the_bit(temperature: float) -> None:
    x = torch.cat((torch.linspace(-40, 4, 4000), torch.full((96,), -math.inf)))
    out = torch.empty(4096, dtype=torch.int32)
    rate = torch.tensor(sampling.LOG2E) / torch.tensor(temperature)
    _weights_kernel[(1,)](x, out, x.max(), rate, BLOCK=4096)
    assert torch.equal(out, weigh(x, x.max(), temperature))


def test_every_place_is_drawn_by_the_same_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles anew for a tensor that does not begin at a multiple of 16 bytes: while everybody waits."""
    launched: list[Any] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return lambda *arguments, **options: launched.append([x for x in arguments if isinstance(x, Tensor)])

    monkeypatch.setattr(sampling, "sample_kernel", Kernel())
    asked = parameters(8, 100, random.Random(3))
    penalties = Penalties(torch.zeros(8, 112).int(), torch.zeros(8, 112).bool(), torch.arange(8).int())
    for place in range(8):
        mine = slice(place, place + 1)
        cut = Parameters(**{field.name: getattr(asked, field.name)[mine] for field in dataclasses.fields(asked)})
        row = Penalties(penalties.counts, penalties.prompt, penalties.row[mine])
        sampling.sample(torch.randn(1, 112), cut, row, config=SMALL)
        tensors = launched.pop()
        assert len(tensors) == 14
        assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        assert tensors[-1].tolist() == [place]
        assert [tensor.item() for tensor in tensors[9:11]] == [asked.seed[place], asked.position[place]]
