"""Who runs an op beside our kernels: each gives the op's result, or that of the part of it that it does."""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mistral_nb_kernels
from mistral_nb_kernels import reference
from mistral_nb_kernels.bench import attention_cases, linear_cases, providers, sampling_cases
from mistral_nb_kernels.bench.attention_cases import decode_case, prefill_case, reading, rope_case
from mistral_nb_kernels.bench.case import Case
from mistral_nb_kernels.bench.linear_cases import (
    Shape,
    expand_case,
    linear_case,
    norm_case,
    rms_case,
    shrink_case,
    swiglu_case,
)
from mistral_nb_kernels.bench.providers import Absent, Provider
from mistral_nb_kernels.bench.registry import OPS, SUBJECTS, providers_of
from mistral_nb_kernels.bench.sampling_cases import sample_case

SHAPES = {
    "qkv": Shape(256, (16, 24, 32), norm=True),
    "gate, up": Shape(256, (32, 64), norm=True, gated=True),
    "down": Shape(256, (32,), residual=True),
    "head": Shape(256, (33,), norm=True),
}
HOW: dict[str, Any] = {"device": "cpu", "dtype": torch.float16}
MAKERS: dict[str, Callable[..., Case]] = {
    "prefill": functools.partial(prefill_case, 40, 64),
    "prefill, window": functools.partial(prefill_case, 40, 64, window=9),
    "prefill, wide window": functools.partial(prefill_case, 40, 64, window=90),
    "decode": functools.partial(decode_case, 2, 70, 64),
    "decode, window": functools.partial(decode_case, 2, 70, 64, window=9),
    "decode alone": lambda **how: reading(decode_case(2, 70, 64, **how)),
    "rope": functools.partial(rope_case, 5, 64),
    "dense": functools.partial(linear_case, "gate, up", 2),
    "int8": functools.partial(linear_case, "down", 2, "int8"),
    "shrink": functools.partial(shrink_case, "qkv", 3, 2),
    "expand": functools.partial(expand_case, "qkv", 3, 2),
    "add norm": functools.partial(norm_case, 3),
    "norm": functools.partial(rms_case, 3),
    "swiglu": functools.partial(swiglu_case, 3),
    **{asked: functools.partial(sample_case, asked, 3, 100) for asked in sampling_cases.ASKED},
}


def made(name: str, dtype: torch.dtype) -> Case:
    return MAKERS[name](device="cpu", dtype=dtype)


CASES: dict[str, Callable[[], Case]] = {name: functools.partial(made, name, torch.float16) for name in MAKERS}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cases, "HEADS", {64: (4, 2), 128: (4, 2)})
    monkeypatch.setattr(attention_cases, "CONTEXT", 256)
    monkeypatch.setattr(linear_cases, "SHAPES", SHAPES)


def wrong(provider: Provider, case: Case) -> str:
    """As `measure` holds it against the reference."""
    its = case if provider.does is None else provider.does(case)
    assert (its.flops > 0) == (its.op != "sample")
    assert its.bytes > 0
    return its.wrong_as(provider.bind, provider.result)


def named(op: str, name: str) -> Provider:
    (provider,) = (each for each in providers_of(op) if each.name == name)
    return provider


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_what_runs_on_a_cpu_is_right(name: str, dtype: torch.dtype) -> None:
    case, ran = made(name, dtype), set()
    for provider in providers_of(case.op):
        with contextlib.suppress(Absent):
            assert wrong(provider, case) == "", provider.name
            ran.add(provider.name)
    also = {op: {"sdpa flash", "sdpa math"} for op in OPS if op.endswith("attention")} | {
        "linear": {"blas" if name == "dense" else "torch int8"},
        "sample": {"torch"} if "penalties" not in name else set(),
    }
    compiled = {"compile"} if case.op not in providers.READS else set()
    assert ran - {"compile"} == {"eager"} | also.get(case.op, set())
    assert compiled <= ran


def spoiled(case: Case, spoil: Callable[[Tensor], Any], which: int) -> str:
    """What is found of a provider that is right, but for one tensor of its result, or of the pages that it writes."""

    def bind(its: Case) -> Callable[[], Any]:
        def call() -> Any:
            out = its.reference(*its.inputs, **its.keywords)
            results = out if isinstance(out, tuple) else (out,)
            written = [its.inputs[-1].k, its.inputs[-1].v] if its.op == "rope_write" else []
            spoil((*results, *written)[which])
            return out

        return call

    return case.wrong_as(bind)


def zero_the_last_column(x: Tensor) -> None:
    x[..., -1] = 0


def spoil_one_number(x: Tensor) -> None:
    """The least of the last row, by less than the whole row may be off; of integers the least."""
    row = x.view(-1, x.shape[-1])[-1]
    row[int(row.abs().argmin())] += 0.015 * row.norm() if x.is_floating_point() else 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spoil", [zero_the_last_column, spoil_one_number])
@pytest.mark.parametrize("name", MAKERS)
def test_one_wrong_number_is_seen(name: str, spoil: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    case = made(name, dtype)
    tensors = {"add_rms_norm": 2, "rope_write": 3}.get(case.op, 1)
    for which in range(tensors):
        if case.op == "sample" and spoil is zero_the_last_column:
            case.inputs[0][-1, 0] = -1e4  # or the first token may be right
        assert " is off in " in spoiled(case, spoil, which), which


def test_a_wrong_column_of_a_wide_row_is_seen() -> None:
    """The last of 14336, at every number of rows that is timed."""
    for rows in (1, 2, 8):
        gate_up = torch.randn(rows, 2 * 14336)
        gate_up[:, 14335] = gate_up[:, -1] = 0.5  # 0.16 comes out, where a row's largest is about 10
        case = Case("swiglu", (gate_up,), reference.swiglu, 1, 1)
        assert spoiled(case, zero_the_last_column, 0) == f"swiglu: tensor 0 is off in {rows} of {rows} rows"


@pytest.fixture(autouse=True)
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """What torch.compile was given, which gives it back."""
    found: list[Callable[..., Any]] = []

    def compiled(function: Callable[..., Any], *, dynamic: bool) -> Callable[..., Any]:
        assert not dynamic
        found.append(function)
        return lambda *inputs, **keywords: function(*inputs, **keywords)

    monkeypatch.setattr(torch, "compile", compiled)
    providers._compiled_for.cache_clear()
    return found


def test_one_shape_is_compiled_once(compilations: list[Callable[..., Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in (2, 2, 3):
        for _ in range(2):
            named("swiglu", "compile").bind(swiglu_case(rows, **HOW))()
    assert compilations == [reference.swiglu] * 2
    monkeypatch.setattr(providers, "shutil", SimpleNamespace(which=lambda name: None))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Absent, match=r"no C\+\+ compiler: install g\+\+"):
        named("swiglu", "compile").bind(swiglu_case(2, **HOW))
    with pytest.raises(Absent, match="reads slots on the host"):
        named("lora_shrink", "compile").bind(CASES["shrink"]())


def test_each_op_has_ours_and_its_reference() -> None:
    for op, subject in OPS.items():
        names = [provider.name for provider in providers_of(op)]
        assert names[:3] == ["ours", "eager", "compile"]
        assert len(set(names)) == len(names)
        assert op in SUBJECTS[subject].ops
        assert set(names) <= set(SUBJECTS[subject].names)
        assert len(set(SUBJECTS[subject].names)) == len(SUBJECTS[subject].names)
    ops = set(mistral_nb_kernels.Ops.__dataclass_fields__) - {"choices"}
    assert set(OPS) == ops


@pytest.mark.parametrize("name", ["add norm", "expand", "int8", "greedy", "decode"])
def test_ours_are_the_kernels_that_an_engine_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for 9.0, under the interpreter."""
    pytest.importorskip("triton")
    case = CASES[name]()
    with pytest.raises(Absent, match="no NVIDIA GPU with Triton"):
        named(case.op, "ours").bind(case)
    monkeypatch.setattr(mistral_nb_kernels, "_triton_on", lambda device: (90, ""))
    assert wrong(named(case.op, "ours"), case) == ""
    choices: list[Any] = []
    choose = mistral_nb_kernels.choose
    monkeypatch.setattr(mistral_nb_kernels, "choose", lambda *how: choices.append(how) or choose(*how))
    named(case.op, "ours").bind(case)
    ((_, width, dtype),) = choices
    assert dtype == torch.float16
    assert case.op != "rope_decode_attention" or width == 64


def test_ours_is_absent_where_the_table_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mistral_nb_kernels, "_triton_on", lambda device: (90, ""))
    case = linear_case("down", 2, "int8", device="cpu", dtype=torch.float32)
    with pytest.raises(Absent, match="activations of 16 bits only"):
        named("linear", "ours").bind(case)


def test_a_product_of_another_kind_of_weights_is_nobodys_business() -> None:
    for case, name in ((CASES["dense"](), "torch int8"), (CASES["int8"](), "torch int4"), (CASES["int8"](), "blas")):
        with pytest.raises(Absent, match=r"^$"):
            named("linear", name).bind(case)
    with pytest.raises(Absent, match="for NVIDIA GPUs only"):
        named("linear", "cublas").bind(CASES["dense"]())


def test_scores_that_do_not_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    from mistral_nb_kernels.bench import attention_peers

    monkeypatch.setattr(attention_peers, "SCORES", {"cpu": 3 * 4 * 4 * 40 * 40 - 1})
    with pytest.raises(Absent, match="its scores take some 0 GB"):
        named("prefill_attention", "sdpa math").bind(CASES["prefill"]())
    monkeypatch.setattr(attention_peers, "SCORES", {"cpu": 3 * 4 * 4 * 40 * 40})
    named("prefill_attention", "sdpa math").bind(CASES["prefill"]())


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it would not help."""
    with pytest.raises(Absent, match="liger-kernel runs on NVIDIA GPUs only"):
        named("swiglu", "liger").bind(CASES["swiglu"]())
    monkeypatch.setattr(providers, "device_of", lambda case: torch.device("cuda"))
    for op, name, package in (
        ("swiglu", "liger", "liger-kernel"),
        ("prefill_attention", "flash-attn", "flash-attn"),
        ("decode_attention", "flashinfer", "flashinfer-python"),
    ):
        monkeypatch.setitem(sys.modules, package.removesuffix("-python").replace("-", "_"), None)
        monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(Absent, match=f"^{package} is not installed: pip install {package}$"):
            named(op, name).bind(CASES[{"swiglu": "swiglu", "prefill_attention": "prefill"}.get(op, "decode alone")]())


class _Applied:
    """An autograd function."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.apply = forward


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """In place, of q and k [1, heads, t, d]."""
    for x in (q, k):
        x[0] = reference.rope(x[0].transpose(0, 1), cos[0], sin[0]).transpose(0, 1)
    return q, k, cos, sin


def _fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    residual += x
    x.copy_(reference.rms_norm(residual, weight, eps))


def _flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """[batch, t, heads, d]."""
    assert causal
    window = None if window_size == (-1, -1) else window_size[0] + 1
    rows = (
        reference.attention(a, b.transpose(0, 1), c.transpose(0, 1), window) for a, b, c in zip(q, k, v, strict=True)
    )
    return torch.stack(list(rows))


def _flash_attn_with_kvcache(q: Tensor, keys: Tensor, values: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """Writes k and v [batch, 1, hkv, d] at cache_seqlens, rotated as q is by cos and sin [positions, d / 2]."""
    assert how["causal"]
    assert not how["rotary_interleaved"]
    cos, sin = (torch.cat((x, x), dim=-1) for x in (how["rotary_cos"], how["rotary_sin"]))
    assert cos.dtype == q.dtype
    found = []
    for sequence, place in enumerate(how["cache_seqlens"].tolist()):
        at = slice(place, place + 1)
        keys[sequence, at] = reference.rope(k[sequence], cos[at], sin[at])
        values[sequence, at] = v[sequence]
        turned = reference.rope(q[sequence], cos[at], sin[at])[None]
        own = (x[None, sequence, : place + 1] for x in (keys, values))
        found.append(_flash_attn_func(turned, *own, causal=True, window_size=how["window_size"])[0])
    return torch.stack(found)


class _Wrapper:
    """FlashInfer's, for prompts and for steps that decode, whose plans begin otherwise."""

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "HND"

    def plan(self, *where: Any, window_left: int, q_data_type: torch.dtype, causal: bool | None = None) -> None:
        *rows, begins, self.pages, last, self.hq, self.hkv, self.d, page = where
        assert begins.dtype == self.pages.dtype == last.dtype == torch.int32
        self.rows = rows[0].tolist() if rows else list(range(len(begins)))
        assert causal is (True if rows else None)
        self.begins, self.last, self.page, self.dtype = begins.tolist(), last.tolist(), page, q_data_type
        self.window = None if window_left < 0 else window_left + 1

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        assert q.shape[1:] == (self.hq, self.d)
        assert q.dtype == self.dtype
        found = []
        for sequence, last in enumerate(self.last):
            own = self.pages[self.begins[sequence] : self.begins[sequence + 1]].long()
            t = (len(own) - 1) * self.page + last
            k, v = (x[own].transpose(0, 1).flatten(1, 2)[:, :t] for x in pages)
            rows = q[self.rows[sequence] : self.rows[sequence + 1]]
            found.append(reference.attention(rows, k, v, self.window))
        return torch.cat(found)


FAKES: dict[str, dict[str, Any]] = {
    "liger_kernel": {},
    "liger_kernel.ops": {},
    "liger_kernel.ops.rope": {"LigerRopeFunction": _Applied(_turned)},
    "liger_kernel.ops.rms_norm": {"LigerRMSNormFunction": _Applied(reference.rms_norm)},
    "liger_kernel.ops.fused_add_rms_norm": {"LigerFusedAddRMSNormFunction": _Applied(reference.add_rms_norm)},
    "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": _Applied(lambda gate, up: F.silu(gate) * up)},
    "flash_attn": {"flash_attn_func": _flash_attn_func, "flash_attn_with_kvcache": _flash_attn_with_kvcache},
    "flashinfer": {
        "BatchPrefillWithPagedKVCacheWrapper": _Wrapper,
        "BatchDecodeWithPagedKVCacheWrapper": _Wrapper,
    },
    "flashinfer.norm": {"rmsnorm": reference.rms_norm, "fused_add_rmsnorm": _fused_add_rmsnorm},
    "flashinfer.activation": {"silu_and_mul": reference.swiglu},
}


@pytest.mark.parametrize("name", ["liger", "flash-attn", "flashinfer"])
def test_packages_are_given_what_they_take(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their functions in torch, by their documentation: shapes, layouts, what is written in place."""
    for module, members in FAKES.items():
        fake = ModuleType(module)
        fake.__spec__ = importlib.machinery.ModuleSpec(module, None)
        vars(fake).update(members)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(providers, "device_of", lambda case: torch.device("cuda"))
    ran = set()
    for key, make in CASES.items():
        case = make()
        for provider in providers_of(case.op):
            if provider.name == name:
                assert wrong(provider, case) == "", key
                ran.add(key)
    attends = {"prefill", "prefill, window", "prefill, wide window", "decode", "decode, window"}
    assert (
        ran
        == {
            "liger": {"rope", "norm", "add norm", "swiglu"},
            "flash-attn": attends,
            "flashinfer": {*attends, "decode alone", "norm", "add norm", "swiglu"},
        }[name]
    )


def test_draws_among_equal_tokens_are_those_of_the_exact_distribution() -> None:
    """As in bf16, where many of the likeliest are equal."""
    case = sample_case("top-p", 64, 500, device="cpu", dtype=torch.float32)
    case.inputs[0].round_()
    assert wrong(named("sample", "torch"), case) == ""


def test_who_does_a_part_wrong_is_seen() -> None:
    case = CASES["decode"]()
    flash = named(case.op, "sdpa flash")
    assert flash.partial == "no RoPE, no KV write, contiguous KV"
    off = Provider("off", flash.bind, lambda case, out: flash.result(case, out) * 1.1, flash.partial, flash.does)
    assert "decode_attention: tensor 0 is off in 8 of 8 rows" in wrong(off, case)
    biased = Provider("biased", lambda case: lambda: F.linear(*case.inputs[:1], case.inputs[1].weight) + 1)
    blas = named("linear", "blas")
    assert "linear: tensor 0 is off" in blas.does(CASES["dense"]()).wrong_as(biased.bind)
