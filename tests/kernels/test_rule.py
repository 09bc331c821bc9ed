"""Which code runs an op: the rule, the table of configs, and what users are told of it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mistral_nb_kernels
from mistral_nb_kernels import Dense, Int8, Norm, PagedKV, Parameters, Rows, choose, configs, paged, reference, rule
from mistral_nb_kernels.configs import Config, Row, config_for
from mistral_nb_kernels.packed import quantize_int4

if (
    importlib.util.find_spec("triton") is not None
):  # a module's first import decides whether its kernels are interpreted
    for kernel in mistral_nb_kernels.KERNELS.values():
        importlib.import_module(f"mistral_nb_kernels.{kernel.module}")


def kernels_on(
    arch: int | None, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, asked: str = "auto"
) -> set[str]:
    return {choice.op for choice in rule(arch, head_dim, dtype, asked) if choice.config}


def test_kernels_run_where_the_table_has_them() -> None:
    every = set(mistral_nb_kernels.KERNELS)
    for arch in (80, 86, 87, 89, 90, 100, 103, 120, 121):
        for head_dim in (64, 128):
            assert kernels_on(arch, head_dim) == every
            assert kernels_on(arch, head_dim, torch.float32) == every - {"linear int8", "linear int4"}
    assert kernels_on(75, dtype=torch.float16) == every - {"prefill_attention"}
    assert kernels_on(75) == kernels_on(70, dtype=torch.float16) == kernels_on(None) == set()
    assert kernels_on(90, head_dim=96) == {op for op, kernel in mistral_nb_kernels.KERNELS.items() if not kernel.headed}
    assert kernels_on(90, asked="torch") == set()


def test_triton_asked_for_by_name_is_never_replaced_but_for_packed_weights_in_32_bits() -> None:
    assert kernels_on(90, asked="triton") == set(mistral_nb_kernels.KERNELS)
    assert kernels_on(90, dtype=torch.float32, asked="triton") == kernels_on(90, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"prefill_attention has no kernel here.*sm_75; ask for auto"):
        rule(75, 128, torch.float16, "triton")
    with pytest.raises(ValueError, match="no NVIDIA GPU"):
        choose(torch.device("cpu"), 64, torch.float32, "triton")


def test_a_graph_holds_no_step_in_which_torch_reads_numbers_on_the_host() -> None:
    """Attention, where a head dimension has no kernel; all ops, where Triton cannot run or has none for a type."""
    ops = choose(torch.device("cpu"), 64, torch.float32)

    def capturable(*where: Any) -> bool:
        return dataclasses.replace(ops, choices=tuple(rule(*where, "auto"))).capturable

    assert capturable(90, 128, torch.bfloat16)
    assert capturable(75, 128, torch.float16)
    assert not capturable(90, 96, torch.bfloat16)
    assert not capturable(75, 128, torch.bfloat16)
    assert not ops.capturable


def test_without_a_c_compiler_triton_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It builds its launchers with one, gcc or clang: of the name cc it knows nothing."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "cc").touch(0o755)
    assert str(choose(torch.device("cuda"), 64, torch.float16)) == (
        "torch (Triton finds no C compiler: install gcc, or set CC): all ops"
    )
    monkeypatch.setenv("CC", "a compiler")
    assert "Triton (unmeasured)" in str(choose(torch.device("cuda"), 64, torch.float16))


def test_a_user_is_told_what_runs_and_what_nobody_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = choose(torch.device("cpu"), 64, torch.float32)
    assert str(ops) == "torch (no NVIDIA GPU with Triton): all ops"
    assert ops.decode_attention is reference.decode_attention
    old = str(dataclasses.replace(ops, choices=tuple(rule(75, 128, torch.float16, "auto")[:4])))
    assert old == (
        "Triton (unmeasured): rope_write, decode_attention, rope_decode_attention; "
        "torch (no kernel for head_dim 128 in torch.float16 on sm_75): prefill_attention"
    )
    table = (Row("rope_write", 90, 64, 16, Config(warps=4), "a card"),)
    monkeypatch.setattr(configs, "_table", lambda: table)
    assert str(rule(90, 64, torch.float16, "auto")[0]) == "Triton (measured on a card)"
    assert str(rule(103, 64, torch.float16, "auto")[0]) == "Triton (unmeasured)"


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_a_gpu_gets_its_architectures_kernels(
    capability: tuple[int, int], make_kv: Callable[..., PagedKV], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound once to their config, and run here under the interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ops = choose(torch.device("cuda"), 64, torch.float16)
    arch = 10 * capability[0] + capability[1]
    row = config_for("decode_attention", arch, 64, 16)
    for op in (ops.decode_attention, ops.rope_decode_attention):
        assert isinstance(op, functools.partial)
        assert row is not None
        assert op.keywords == {"config": row.config, "dot": arch >= 80}
    assert (ops.prefill_attention is reference.prefill_attention) == (arch == 75)
    kv, q = make_kv((70, 3), 1, 64, 64, torch.float16), torch.randn(2, 3, 64).half()
    rows = Rows.of((1, 1), (70, 3))
    expected = reference.decode_attention(q, rows.lengths, kv)
    torch.testing.assert_close(ops.decode_attention(q, rows.lengths, kv), expected, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(ops.prefill_attention(q, rows, kv), expected, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_every_kind_of_weights_has_its_kernel(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    ops = choose(torch.device("cuda"), 64, torch.float16)
    x, gain, weight = torch.randn(2, 128).half(), torch.rand(128).half(), torch.randn(24, 128)
    kinds = (Dense(weight.half()), Int8(*reference.quantize_int8(weight)), quantize_int4(weight, 32))
    for kind in kinds:
        how = {"norm": Norm(gain, 1e-5), "gated": True}
        torch.testing.assert_close(ops.linear(x, kind, **how), reference.linear(x, kind, **how), atol=0.1, rtol=2e-2)
    normed, summed = ops.add_rms_norm(x, x, gain, 1e-5)
    torch.testing.assert_close(normed, reference.rms_norm(summed, gain, 1e-5), atol=2e-3, rtol=2e-3)
    n, zeros = 2, torch.zeros(2)
    parameters = Parameters(
        zeros, zeros + 1, zeros + 1, zeros, zeros, zeros.int(), torch.arange(n), torch.zeros(n, dtype=torch.int64)
    )
    assert torch.equal(ops.sample(weight[:2], parameters), weight[:2].argmax(-1).int())


def test_the_table_is_complete_and_survives_a_rewrite(tmp_path: Path) -> None:
    rows = configs.read()
    assert len({(r.op, r.arch, r.width, r.bits) for r in rows}) == len(rows)
    for arch in configs.ARCHITECTURES:
        for head_dim in configs.HEAD_DIMS:
            for bits in (16, 32):
                for op in ("rope_write", "decode_attention", *(["prefill_attention"] if arch > 75 else [])):
                    row = config_for(op, arch, head_dim, bits)
                    assert row in rows
    for row in rows:
        assert row.config.split % max(row.config.block_n, 1) == 0
    configs.write(rows, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == configs.PATH.read_text()


def test_rows_come_whole_and_aligned_to_another_device() -> None:
    """At multiples of 16 bytes, whatever their numbers: kernels are compiled for that."""
    parts = [torch.arange(n, dtype=torch.int32) + n for n in (3, 1, 9, 8)]
    there = paged._sent(parts, "cpu", pinned=False)
    assert all(torch.equal(part, sent) for part, sent in zip(parts, there, strict=True))
    assert [part.data_ptr() % 16 for part in there] == [0] * 4
    rows, sent = (Rows.of((3, 1, 20), (40, 17, 20), device) for device in ("cpu", "meta"))
    for name in ("starts", "lengths", "sequences", "positions"):
        assert getattr(sent, name).shape == getattr(rows, name).shape
        assert getattr(sent, name).dtype == torch.int32


def test_the_paged_reference_is_the_reference_of_one_sequence(make_kv: Callable[..., PagedKV]) -> None:
    """Over one page as over many, prefill as decode, and RoPE before it or in it."""
    counts, lengths = (3, 1, 20), (40, 17, 20)
    kv = make_kv(lengths, 2, 64, 16, torch.float32)
    rows = Rows.of(counts, lengths)
    assert rows.starts.tolist() == [0, 3, 4, 24]
    assert rows.positions.tolist() == [37, 38, 39, 16, *range(20)]
    assert rows.sequences.tolist() == [0] * 3 + [1] + [2] * 20
    assert rows.longest == 20
    q, k, v = torch.randn(24, 4, 64), torch.randn(24, 2, 64), torch.randn(24, 2, 64)
    cos, sin = reference.rope_table(64, 64, 1e4)
    turned = reference.rope_write(q, k, v, cos, sin, rows, kv)
    got = reference.prefill_attention(turned, rows, kv, 30)
    for sequence, (begin, end) in enumerate(zip((0, 3, 4), (3, 4, 24), strict=True)):
        length = lengths[sequence]
        angles = cos[length - (end - begin) : length], sin[length - (end - begin) : length]
        keys, values = kv.of(sequence, length)
        assert torch.equal(turned[begin:end], reference.rope(q[begin:end], *angles))
        assert torch.equal(keys[:, length - (end - begin) :], reference.rope(k[begin:end], *angles).transpose(0, 1))
        assert torch.equal(values[:, length - (end - begin) :], v[begin:end].transpose(0, 1))
        expected = reference.attention(turned[begin:end], keys, values, 30)
        assert torch.equal(got[begin:end], expected)
    newest = [2, 3, 23]
    lengths_now = torch.tensor(lengths, dtype=torch.int32)
    together = reference.rope_decode_attention(q[newest], k[newest], v[newest], cos, sin, lengths_now, kv, 30)
    torch.testing.assert_close(together, got[newest], atol=1e-6, rtol=1e-5)
    one = PagedKV(kv.k[:, :, :, :], kv.v, torch.tensor([[int(kv.table[1, 0])]], dtype=torch.int32))
    assert one.of(0, 16)[0].data_ptr() == kv.k[kv.table[1, 0]].data_ptr()
