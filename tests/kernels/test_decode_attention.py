"""Decode attention by splits, under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.paged import PagedKV

kernels = pytest.importorskip("mistral_nb_kernels.decode_attention")

CONFIG = Config(warps=4, block_n=16, split=32)
LENGTHS = (1, 0, 15, 16, 17, 32, 33, 70)

MakeKV = Callable[..., PagedKV]
Exact = Callable[[Tensor, Tensor, Tensor], None]
Guarded = Callable[[PagedKV], PagedKV]


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
    """The newest token's place holds NaN before: nobody reads it unwritten."""
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
    exact(*(x.k[written].view(-1, d) for x in (mine, expected, truth)))
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


@pytest.mark.parametrize("group", [1, 5])
def test_more_splits_than_the_combining_step_adds_at_a_time(
    make_kv: MakeKV, exact: Exact, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """At the capacity, to which the table's last entry belongs."""
    monkeypatch.setattr(kernels, "COMBINED", 4 * 64 * triton.next_power_of_2(group))
    kv = make_kv((192,), 1, 64, 32, torch.float32, spare=0)
    q, lengths = torch.randn(1, group, 64), torch.tensor([192], dtype=torch.int32)
    config = Config(warps=4, block_n=16, split=16)
    exact(
        kernels.decode_attention(q, lengths, kv, config=config),
        reference.decode_attention(q, lengths, kv),
        reference.decode_attention(q.double(), lengths, double(kv)),
    )


@pytest.mark.parametrize(("rope", "window"), [(True, None), (True, 40), (False, None)])
def test_bits_do_not_depend_on_the_number_of_programs_and_counters_end_at_zero(
    make_kv: MakeKV, monkeypatch: pytest.MonkeyPatch, rope: bool, window: int | None
) -> None:
    kv = make_kv((70, 0, 96), 2, 64, 16, torch.float16)
    q, k, v = torch.randn(3, 8, 64).half().split((4, 2, 2), dim=1)
    lengths, angles = torch.tensor((70, 0, 96), dtype=torch.int32), reference.rope_table(96, 64, 1e4)
    config = Config(warps=4, block_n=16, split=16)
    found = []
    for count in (1, 2, 100):
        monkeypatch.setattr(kernels, "programs", lambda splits, *_, count=count: min(splits, count))
        if rope:
            found.append(kernels.rope_decode_attention(q, k, v, *angles, lengths, kv, window, config=config))
        else:
            found.append(kernels.decode_attention(q, lengths, kv, window, config=config))
        assert torch.equal(found[-1], found[0]), count
        assert not kv.arrived.any()
    assert not found[0].isnan().any()


def test_of_a_length_past_the_capacity_nothing_is_written(make_kv: MakeKV) -> None:
    """As of a step that runs ahead of the host's stop: the pages stay as they are, and the last token of a full one is
    written once more where the length is the capacity.
    """
    kv = make_kv((32, 32, 32), 1, 64, 16, torch.float32, spare=0)
    q, k, v = torch.randn(3, 3, 64).split(1, dim=1)
    cos, sin = reference.rope_table(64, 64, 1e4)
    within, past = (torch.tensor(lengths, dtype=torch.int32) for lengths in ((32, 32, 32), (33, 32, 40)))
    before, before_v = kv.k.clone(), kv.v.clone()
    out = kernels.rope_decode_attention(q, k, v, cos, sin, past, kv, config=CONFIG)
    last = kv.table[1, 1]
    before[last, :, 15], before_v[last, :, 15] = reference.rope(k[1:2], cos[31:32], sin[31:32])[0], v[1]
    assert torch.allclose(kv.k, before, atol=1e-5, equal_nan=True)
    assert torch.equal(kv.v.nan_to_num(), before_v.nan_to_num())
    turned = reference.rope(q, *(x[31:32].expand(3, -1) for x in (cos, sin)))
    torch.testing.assert_close(out, reference.decode_attention(turned, within, kv))
    assert torch.equal(
        kernels.decode_attention(q, past, kv, config=CONFIG), kernels.decode_attention(q, within, kv, config=CONFIG)
    )


@pytest.mark.parametrize(("rope", "window"), [(False, None), (True, 20)])
def test_nothing_is_looked_up_behind_the_table(
    make_kv: MakeKV, exact: Exact, guarded: Guarded, rope: bool, window: int | None
) -> None:
    """Of the last sequence, whose length fills it."""
    kv = guarded(make_kv((20, 96), 1, 64, 16, torch.float32, spare=0))
    q, k, v = torch.randn(2, 4, 64).split((2, 1, 1), dim=1)
    lengths, (cos, sin) = torch.tensor((20, 96), dtype=torch.int32), reference.rope_table(96, 64, 1e4)
    if rope:
        got = kernels.rope_decode_attention(q, k, v, cos, sin, lengths, kv, window, config=CONFIG)
        at = lengths.long() - 1
        q = reference.rope(q, cos[at], sin[at])
    else:
        got = kernels.decode_attention(q, lengths, kv, window, config=CONFIG)
    expected = reference.decode_attention(q, lengths, kv, window)
    exact(got, expected, reference.decode_attention(q.double(), lengths, double(kv), window))


def test_counters_are_their_owners(make_kv: MakeKV) -> None:
    """One set for all layers, which a CUDA graph that was captured over one of them finds where it was."""
    kv = make_kv((33, 40), 2, 64, 16, torch.float16)
    owned = torch.zeros(3, 2, dtype=torch.int32)
    layers = [PagedKV(kv.k, kv.v, kv.table, owned[:2]) for _ in range(2)]
    assert [layer.arrived.data_ptr() for layer in layers] == [owned.data_ptr()] * 2
    q, lengths = torch.randn(2, 4, 64).half(), torch.tensor((33, 40), dtype=torch.int32)
    first, second = (kernels.decode_attention(q, lengths, layer, config=CONFIG) for layer in layers)
    assert torch.equal(first, second)
    assert not owned.any()
    for wrong in (owned, owned[:2].long(), torch.zeros(2, 2, 2, dtype=torch.int32)[..., 0]):
        with pytest.raises(AssertionError):
            PagedKV(kv.k, kv.v, kv.table, wrong)


def test_a_batch_that_the_table_has_no_rows_for_is_refused(make_kv: MakeKV) -> None:
    """It would be read and counted in memory of others."""
    kv = make_kv((33,), 2, 64, 16, torch.float32)
    q, lengths = torch.randn(2, 4, 64), torch.tensor((33, 33), dtype=torch.int32)
    cos, sin = reference.rope_table(40, 64, 1e4)
    for wrong in ((q, lengths), (q[:1], lengths), (q[:1, :3], lengths[:1])):
        with pytest.raises(AssertionError):
            kernels.decode_attention(*wrong, kv, config=CONFIG)
    for k in (q[:, :2], q[:1, :1], q[:1, :2, :32]):
        with pytest.raises(AssertionError):
            kernels.rope_decode_attention(q[:1], k, k, cos, sin, lengths[:1], kv, config=CONFIG)


def test_the_grid_is_what_the_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 132)
    device = torch.device("cuda")
    assert kernels.programs(512, 8, device) == 66
    assert kernels.programs(512, 64, device) == 9
    assert kernels.programs(512, 256, device) == kernels.FEWEST
    assert kernels.programs(3, 8, device) == 3


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
