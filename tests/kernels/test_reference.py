"""The reference ops against fp64 formulas and against the field's own definitions."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mistral_nb_kernels import PagedKV, Rows
from mistral_nb_kernels import reference as ops
from mistral_nb_kernels.packed import Int8, Int8Cpu, dequantize
from mistral_nb_kernels.reference.attention import _shares_heads
from mistral_nb_kernels.reference.linear import _sums_are_exact

ROWS = (1, 2, 3, 5, 8, 17, 64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def naive_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One query at a time in fp64."""
    n, hq, d = q.shape
    t, group = k.shape[1], hq // k.shape[0]
    out = torch.empty(n, hq, d, dtype=torch.float64)
    for row in range(n):
        end = t - n + row + 1
        start = 0 if window is None else max(0, end - window)
        for head in range(hq):
            keys, values = (x[head // group, start:end].double() for x in (k, v))
            out[row, head] = torch.softmax(keys @ q[row, head].double() / math.sqrt(d), 0) @ values
    return out


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize(("n", "t"), [(1, 1), (1, 9), (7, 7), (3, 10), (2, 33)])
@pytest.mark.parametrize(("hq", "hkv", "d"), [(9, 3, 64), (4, 4, 128), (8, 2, 64)])
def test_attention(n: int, t: int, hq: int, hkv: int, d: int, window: int | None) -> None:
    q, k, v = torch.randn(n, hq, d), torch.randn(hkv, t + 5, d), torch.randn(hkv, t + 5, d)
    k[:, t:], v[:, t:] = torch.nan, torch.nan
    k, v = k[:, :t], v[:, :t]
    assert relative(ops.attention(q, k, v, window), naive_attention(q, k, v, window)) < 1e-6


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("page", [64, 16])
def test_a_prompts_chunks_with_rounded_keys_and_values(page: int, window: int | None) -> None:
    """A sequence of 40 tokens in two chunks, beside one in one chunk: a chunk's own are not rounded when it is attended
    to, and those before it are.
    """
    n, d = 40, 16
    q, k, v = (torch.randn(2 * n, heads, d) for heads in (6, 2, 2))
    cos, sin = ops.rope_table(64, d, 1e4)
    positions = torch.arange(n).repeat(2)
    turned, own = ops.rope(q, cos[positions], sin[positions]), ops.rope(k, cos[positions], sin[positions])
    table = torch.arange(2 * 64 // page, dtype=torch.int32).reshape(2, -1)
    pages = (torch.full((2 * 64 // page, 2, page, d), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    kv = PagedKV(*pages, table)
    for counts, lengths in (((24, 40), (24, 40)), ((16, 0), (40, 0))):
        rows = Rows.of(counts, lengths)
        mine = [int(sequence * n + position) for sequence, position in zip(rows.sequences, rows.positions, strict=True)]
        got = ops.rope_prefill_attention(q[mine], k[mine], v[mine], cos, sin, rows, kv, window)
        for sequence, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            seen = slice(sequence * n, sequence * n + length)
            keys, values = (x[seen].bfloat16().float() for x in (own, v))
            keys[length - count :], values[length - count :] = own[seen][length - count :], v[seen][length - count :]
            newest = slice(seen.stop - count, seen.stop)
            expected = naive_attention(turned[newest], keys.transpose(0, 1), values.transpose(0, 1), window)
            found = got[rows.starts[sequence] : rows.starts[sequence + 1]]
            torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for sequence in range(2):
        for written, x in zip(kv.of(sequence, n), (own, v), strict=True):
            assert torch.equal(written, x[sequence * n : (sequence + 1) * n].bfloat16().transpose(0, 1))
    wide = PagedKV(*(torch.zeros(kv.k.shape) for _ in range(2)), table)
    rows = Rows.of((n, n), (n, n))
    expected = ops.prefill_attention(ops.rope_write(q, k, v, cos, sin, rows, wide), rows, wide, window)
    torch.testing.assert_close(ops.rope_prefill_attention(q, k, v, cos, sin, rows, kv, window), expected)


@pytest.mark.parametrize(("n", "t"), [(7, 7), (3, 10)])
def test_attention_with_repeated_heads_is_the_same(n: int, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where no fused kernel of torch shares them."""
    q, k, v = torch.randn(n, 6, 64), torch.randn(2, t, 64), torch.randn(2, t, 64)
    monkeypatch.setitem(ops.attention.__globals__, "_shares_heads", lambda q, mask: False)
    assert relative(ops.attention(q, k, v), naive_attention(q, k, v, None)) < 1e-6


@pytest.mark.parametrize(
    ("capability", "dtype", "masked", "shared"),
    [
        ((9, 0), torch.bfloat16, False, True),
        ((8, 0), torch.float16, False, True),
        ((7, 5), torch.float16, False, False),
        ((9, 0), torch.float32, False, False),
        ((9, 0), torch.bfloat16, True, False),
    ],
)
def test_heads_are_shared_where_flash_runs(
    capability: tuple[int, int], dtype: torch.dtype, masked: bool, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = SimpleNamespace(device=torch.device("cuda"), itemsize=dtype.itemsize)
    mask = torch.ones(1, dtype=torch.bool) if masked else None
    assert _shares_heads(q, mask) == shared  # type: ignore[arg-type]


def test_rms_norm_is_its_formula() -> None:
    x, weight = torch.randn(5, 576), torch.rand(576)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert relative(ops.rms_norm(x, weight, 1e-5), expected) < 1e-6


def test_swiglu_is_its_formula() -> None:
    packed = torch.randn(4, 300)
    gate, up = packed[:, :150].double(), packed[:, 150:].double()
    assert relative(ops.swiglu(packed), gate / (1 + (-gate).exp()) * up) < 1e-6


def test_rope_turns_pairs_half_a_head_apart() -> None:
    d, theta, position = 8, 1e4, 7
    cos, sin = ops.rope_table(16, d, theta)
    x = torch.randn(1, 2, d)
    got = ops.rope(x, cos[position : position + 1], sin[position : position + 1])
    for i in range(d // 2):
        angle = position * theta ** (-2 * i / d)
        pair = torch.complex(x[0, :, i].double(), x[0, :, i + d // 2].double())
        turned = pair * complex(math.cos(angle), math.sin(angle))
        torch.testing.assert_close(got[0, :, i].double(), turned.real, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(got[0, :, i + d // 2].double(), turned.imag, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_rope_is_scaled_as_by_transformers(kind: Literal["linear", "llama3"], theta: float) -> None:
    factors: dict[str, Any] = {"factor": 8.0}
    if kind == "llama3":
        factors |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=2,
        max_position_embeddings=65536,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **factors},
    )
    inverse, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert attention_factor == 1
    angles = torch.outer(torch.arange(9000).float(), inverse)
    cos, sin = ops.rope_table(9000, 128, theta, scaling=ops.RopeScaling(kind, **factors))
    assert torch.equal(cos, torch.cat((angles, angles), 1).cos())
    assert torch.equal(sin, torch.cat((angles, angles), 1).sin())
    plain = ops.rope_table(9000, 128, theta)[0]
    kept = (cos == plain).all(0)
    assert kept.any() == (kind == "llama3")
    assert not kept.all()


@pytest.mark.parametrize("inputs", [32, 96, 576, 1536])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_linear_int8_rounds_inputs_and_sums_to_bf16(n: int, inputs: int) -> None:
    x = torch.randn(n, inputs) * torch.logspace(-3, 2, n)[:, None]
    weight, scale = ops.quantize_int8(torch.randn(320, inputs))
    exact = weight.double() * scale.double()[:, None]
    rounded = x.bfloat16().double() @ exact.t()
    # a bf16 step of the sum, and fp32's own error where products cancel
    allowed = 2**-8 * rounded.abs() + 1e-5 * (x.double().abs() @ exact.abs().t())
    got = ops.linear_int8(x, weight, scale)
    assert ((got - rounded).abs() <= allowed).all()
    assert relative(got, x.double() @ exact.t()) < 4e-3


def test_linear_int8_takes_rows_that_lie_apart() -> None:
    """In bf16, which is not converted: strided, and as columns of another tensor."""
    weight, scale = ops.quantize_int8(torch.randn(33, 64))
    x = torch.randn(5, 64).bfloat16()
    expected = ops.linear_int8(x, weight, scale)
    wide = torch.full((5, 96), torch.nan, dtype=torch.bfloat16)
    for apart in (x.t().contiguous().t(), wide[:, 8:72].copy_(x)):
        assert not apart.is_contiguous()
        assert torch.equal(ops.linear_int8(apart, weight, scale), expected)


@pytest.fixture
def exact_products() -> None:
    if not _sums_are_exact():
        pytest.skip("oneDNN adds products of int8 up in 16 bits on this processor")


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("outputs", [1, 40, 960])
@pytest.mark.parametrize("inputs", [32, 96, 576, 14336])
@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_linear_int8_cpu_is_the_product(n: int, inputs: int, outputs: int) -> None:
    x = torch.randn(n, inputs) * torch.logspace(-3, 2, n)[:, None]
    weight = Int8(*ops.quantize_int8(torch.randn(outputs, inputs)))
    blocked = ops.blocked_int8(weight)
    assert isinstance(blocked, Int8Cpu)
    assert blocked.shape == weight.shape
    assert torch.equal(blocked.plain.values, weight.values)
    exact = dequantize(weight, torch.float64)
    assert torch.equal(dequantize(blocked, torch.float64), exact)
    # half a step of the second of two int8 numbers, of which each row's largest is 127 * 254 steps
    allowed = (0.51 / (127 * 254) * x.double().abs().amax(1, keepdim=True)) * exact.abs().sum(1) + 1e-30
    got = ops.linear_int8_cpu(x, blocked)
    expected = x.double() @ exact.t()
    assert got.dtype == torch.float32
    assert ((got - expected).abs() <= allowed + 3e-7 * x.double().abs() @ exact.abs().t()).all()


@pytest.mark.usefixtures("exact_products")
def test_linear_int8_cpu_of_numbers_at_their_limits() -> None:
    """The largest sums there can be are whole; zeros, the smallest numbers and none at all stay in their rows."""
    signs = torch.where(torch.rand(64, 14336) < 0.5, -1.0, 1.0)
    blocked = ops.blocked_int8(Int8(*ops.quantize_int8(signs)))
    assert isinstance(blocked, Int8Cpu)
    x = torch.stack((signs[3], -signs[3], torch.zeros(14336), torch.full((14336,), 1e-42), signs[5] * torch.nan))
    got = ops.linear_int8_cpu(x, blocked)
    assert got[0, 3].item() == pytest.approx(14336, rel=1e-6)
    assert got[1, 3].item() == pytest.approx(-14336, rel=1e-6)
    assert (got[2] == 0).all()
    assert got[3].abs().max() < 1e-30
    assert got[4].isnan().all()
    assert got[:4].isfinite().all()


def test_quantize_int8_keeps_within_half_a_step() -> None:
    x = torch.randn(40, 96)
    x[3] = 0
    values, scale = ops.quantize_int8(x)
    assert values.dtype == torch.int8
    assert ((values * scale[:, None] - x).abs() <= scale[:, None] * 0.5001).all()
    assert torch.equal(ops.linear_int8(torch.zeros(2, 96), values, scale), torch.zeros(2, 40))
    out = torch.empty_like(x, dtype=torch.int8), torch.empty(len(x))
    for again in (ops.quantize_int8(x), ops.quantize_int8(x.clone(), out=out), out):
        assert torch.equal(again[0], values)
        assert torch.equal(again[1], scale)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit by bit, at every number of rows, at any place among them and with any number of threads."""
    threads = torch.get_num_threads()
    weight, scale = ops.quantize_int8(torch.randn(960, 576))
    norm = torch.rand(576)
    head = ops.blocked_int8(Int8(weight, scale))
    cos, sin = ops.rope_table(200, 64, 1e4)
    cases = {
        "linear_int8": (torch.randn(200, 576), lambda x: ops.linear_int8(x, weight, scale)),
        "linear of the head": (torch.randn(200, 576), lambda x: ops.linear(x, head)),
        "rms_norm": (torch.randn(200, 576), lambda x: ops.rms_norm(x, norm, 1e-5)),
        "swiglu": (torch.randn(200, 3072), ops.swiglu),
        "swiglu of Mistral-7B": (torch.randn(70, 2 * 14336), ops.swiglu),
        "rope": (torch.randn(200, 12, 64), lambda x: ops.rope(x, cos[: len(x)], sin[: len(x)])),
    }
    try:
        for name, (x, op) in cases.items():
            torch.set_num_threads(1)
            together = op(x)
            for rows, count in itertools.product(ROWS, (1, 2, 3, 4)):
                torch.set_num_threads(count)
                assert torch.equal(op(x[:rows]), together[:rows]), (name, rows)
                if name != "rope":
                    assert torch.equal(op(x[3 : 3 + rows]), together[3 : 3 + rows]), (name, rows)
    finally:
        torch.set_num_threads(threads)
