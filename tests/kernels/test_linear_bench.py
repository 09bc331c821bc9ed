"""What measures linear layers, adapters and sampling on a GPU, as far as it goes without one."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mistral_nb_kernels import configs, reference, tune
from mistral_nb_kernels.bench import TUNABLES, linear_cases, sampling_cases, timing
from mistral_nb_kernels.bench.case import Case
from mistral_nb_kernels.bench.linear_cases import Shape
from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.linear import linear
from mistral_nb_kernels.lora import lora_expand, lora_shrink
from mistral_nb_kernels.packed import Int4, dequantize
from mistral_nb_kernels.rms_norm import add_rms_norm, rms_norm
from mistral_nb_kernels.sampling import sample
from mistral_nb_kernels.swiglu import swiglu
from tests.gpu import linear_inputs
from tests.gpu import test_linear as gpu
from tests.kernels.untimed import FACTS, untimed

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"device": CPU, "dtype": torch.float16}
LAYER = {
    "qkv": Shape(256, (16, 24, 32), norm=True),
    "o": Shape(256, (256,), residual=True),
    "gate, up": Shape(256, (256, 512), norm=True, gated=True),
    "down": Shape(256, (256,), residual=True),
}
SHAPES = {**LAYER, "head": Shape(256, (33,), norm=True)}
KERNELS = SimpleNamespace(
    linear=functools.partial(linear, config=Config(2, 2, block_n=64, block_k=64)),
    lora_shrink=functools.partial(lora_shrink, config=Config(4, block_m=32, block_n=32, block_k=128)),
    lora_expand=functools.partial(lora_expand, config=Config(4, block_m=64, block_n=128, block_k=32)),
    rms_norm=functools.partial(rms_norm, config=Config(4)),
    add_rms_norm=functools.partial(add_rms_norm, config=Config(4)),
    swiglu=functools.partial(swiglu, config=Config(4, block_n=1024)),
    sample=functools.partial(sample, config=Config(4, block_n=512)),
)
"""Cut up so that the interpreter has few programs."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 256 features."""
    untimed(monkeypatch)
    monkeypatch.setattr(linear_cases, "LAYER", LAYER)
    monkeypatch.setattr(linear_cases, "SHAPES", SHAPES)


def layer(**how: Any) -> Case:
    return linear_cases.layer_case(2, **how, **SMALL)


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"{name} {kind}": functools.partial(linear_cases.linear_case, name, 2, kind, **SMALL)
        for name, kind in zip(SHAPES, (*linear_cases.KINDS, "dense"), strict=True)
    },
    "adapters": lambda: linear_cases.linear_case("gate, up", 3, slots=2, **SMALL),
    "shrink": lambda: linear_cases.shrink_case("qkv", 3, 2, **SMALL),
    "expand": lambda: linear_cases.expand_case("qkv", 3, 2, **SMALL),
    "norm": lambda: linear_cases.norm_case(2, **SMALL),
    "swiglu": lambda: linear_cases.swiglu_case(2, **SMALL),
    **{asked: functools.partial(sampling_cases.sample_case, asked, 2, 100, **SMALL) for asked in sampling_cases.ASKED},
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_and_its_kernel_is_right(name: str) -> None:
    case = CASES[name]()
    assert (case.flops > 0) == (case.op != "sample")
    assert case.bytes > 0
    assert case.wrong(getattr(KERNELS, case.op)) == ""


@pytest.mark.parametrize("kind", linear_cases.KINDS)
def test_a_layer_is_right_and_its_weights_are_of_one_size(kind: str) -> None:
    case = layer(kind=kind, slots=2 if kind == "int8" else 0)
    assert case.wrong(functools.partial(linear_cases.run_layer, KERNELS if kind != "int8" else reference)) == ""
    qkv, x = case.call(case.reference)()
    assert 0.5 < float(qkv.float().std()) < 2
    assert 0.5 < float(x.float().std()) < 3
    assert set(case.wrong(lambda *inputs: tuple(y * 1.1 for y in case.reference(*inputs)))) > set("layer: tensor")


def test_the_least_bytes_are_the_weights_and_what_goes_in_and_out() -> None:
    rows = 2 * 2 * (256 + 32 + 256 + 2 * 256 + 256 + 256 + 256 + 2 * 256)
    dense = 2 * 256 * (32 + 256 + 512 + 256)
    assert layer().bytes == dense + 2 * 2 * 256 + rows
    assert layer(kind="int4 g32").bytes == dense // 4 + dense // 2 // 8 + 2 * 2 * 256 + rows
    lora = 2 * 16 * (256 * (3 + 1 + 2 + 1) + 32 + 256 + 512 + 256)
    assert layer(slots=1).bytes == layer().bytes + lora
    case = linear_cases.linear_case("o", 2, "int8", slots=1, **SMALL)
    assert case.bytes == 256 * 256 + 4 * 256 + 3 * 2 * 2 * 256 + 2 * 16 * 256 + 4 * 2 * 16
    assert CASES["norm"]().bytes == 2 * 256 * (4 * 2 + 1)
    assert CASES["swiglu"]().bytes == 2 * 2 * 3 * 256
    assert CASES["greedy"]().bytes == 2 * 2 * 100


def test_torchs_own_ops_give_the_same() -> None:
    case = layer()
    peers = linear_cases.layer_peers(case)
    assert list(peers) == ["cublas", "torch"]
    assert [tuple(y.shape) for y in peers["cublas"]()] == [(2, 32), (2, 256), (2, 512), (2, 256)]
    torch.testing.assert_close(peers["torch"](), case.call(case.reference)(), atol=2e-2, rtol=2e-2)
    case = linear_cases.linear_case("o", 2, "int8", dtype=torch.bfloat16, device=CPU)
    x, weight = case.inputs
    ((name, call),) = linear_cases.linear_peers(case).items()
    assert name == "torch int8"
    torch.testing.assert_close(call(), reference.linear(x, weight), atol=2e-2, rtol=2e-2)
    for asked in ("greedy", "all", "top-k", "top-p", "top-k, top-p"):
        (call,) = sampling_cases.sample_peers(CASES[asked]()).values()
        assert call().shape == (2,)
    assert sampling_cases.sample_peers(CASES["penalties, top-k, top-p"]()) == {}


def test_torchs_int4_gets_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its ops on a GPU: an even code in the high half of a byte, weights scale * (code - 8) + middle."""
    case = linear_cases.linear_case("o", 2, "int4 g128", **SMALL)
    x, weight = case.inputs
    assert isinstance(weight, Int4)

    def product(x: torch.Tensor, packed: torch.Tensor, group: int, affine: torch.Tensor) -> torch.Tensor:
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1).unflatten(1, (-1, group))
        scale, middle = affine.transpose(0, 1)[..., None].unbind(2)
        return x @ ((codes.to(x.dtype) - 8) * scale + middle).flatten(1).t()

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda packed, tiles: packed)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", product)
    ((name, call),) = linear_cases.linear_peers(case).items()
    assert name == "torch int4"
    torch.testing.assert_close(call(), x @ dequantize(weight, x.dtype).t(), atol=5e-2, rtol=2e-2)


def test_every_row_of_the_table_is_tuned_by_what_can_run() -> None:
    """In 16 bits, and of fewer; a tuner's first candidates contain what is shipped, or are near it."""
    mine = [tunable for tunable in TUNABLES if tunable.widths == (0,)]
    assert {(t.op, t.bits) for t in mine} == {(r.op, r.bits) for r in configs.read() if not r.width and r.bits <= 16}
    for tunable in mine:
        every = [variant for config in tunable.first for variant in tunable.variants(config)]
        assert len(every) == len(set(every)) >= 4
        row = configs.config_for(tunable.op, 90, 0, tunable.bits)
        assert row is not None
        assert replace(row.config, stages=0) in {replace(config, stages=0) for config in every}


@pytest.mark.parametrize("arch", [75, 90])
def test_a_candidate_of_every_op_is_right(arch: int) -> None:
    """By the kernel that is timed, at the shape of the least bytes."""
    for tunable in TUNABLES:
        if tunable.widths == (0,):
            *_, config = tunable.variants(tunable.first[-1])
            cases = [make(0, torch.float16, CPU) for make in tunable.shapes]
            assert min(cases, key=lambda case: case.bytes).wrong(tunable.kernel(config, arch)) == ""


def test_the_tuner_takes_the_rows_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their bits; the others stay."""
    table, best = tmp_path / "configs.json", Config(16, 7)
    before = configs.read()
    configs.write(before, table)
    monkeypatch.setattr(tune, "tune", lambda tunable, width, arch: iter([(best, 1.0)]))
    monkeypatch.setattr(sys, "argv", ["tune", "--op", "linear", "--bits", "8", "--bits", "4", "--table", str(table)])
    tune.main()
    changed = {(row.op, row.arch, row.bits) for row in configs.read(table) if row not in before}
    assert changed == {("linear", 75, 8), ("linear", 75, 4)}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The GPU tests on small shapes, where torch's reference runs every op."""
    for module in (gpu, linear_inputs):
        monkeypatch.setattr(module, "DEVICE", CPU)
    monkeypatch.setattr(gpu, "served", lambda: torch.float16)
    monkeypatch.setattr(gpu, "ODD", ((1, 1, 64), (3, 33, 96), (9, 20, 128)))
    monkeypatch.setattr(gpu, "FUSED", ((2, 20, 160), (8, 9, 64), (9, 20, 64)))
    monkeypatch.setattr(gpu, "DIM", 65)
    monkeypatch.setattr(gpu, "LORA_ENDS", (20, 33, 50))
    monkeypatch.setattr(gpu, "RANKS", (1, 3, 0, 2, 4))
    monkeypatch.setattr(gpu, "DIMS", (1, 65))
    monkeypatch.setattr(gpu, "MANY", 70)
    monkeypatch.setattr(gpu, "captured", lambda call: call)
    return gpu


@pytest.fixture
def by_kernels(on_the_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The same by the kernels."""

    def ops(dtype: torch.dtype) -> SimpleNamespace:
        dot = functools.partial(KERNELS.linear, dot=dtype != torch.float32)
        return SimpleNamespace(**vars(KERNELS) | {"linear": dot})

    monkeypatch.setattr(gpu, "ops", ops)
    return gpu


@pytest.mark.parametrize("kind", gpu.KINDS)
def test_the_tests_of_linear_are_in_order(kind: str, by_kernels: ModuleType) -> None:
    by_kernels.test_linear_is_exact_at_odd_sizes(kind, torch.float16)
    by_kernels.test_what_is_fused_is_exact(kind, torch.float16, gated=kind != "int8")
    if kind == "int4 g32":
        by_kernels.test_a_row_gets_the_same_bits_among_any_rows_at_any_place(kind)
        by_kernels.test_one_graph_serves_every_mix_of_adapters_and_of_parameters(kind)


def test_the_other_tests_of_exactness_are_in_order(by_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for many in (False, True):
        by_kernels.test_adapters_are_exact_and_equal_merged_weights(many, torch.float16)
    by_kernels.test_an_adapter_s_row_gets_the_same_bits_in_any_batch()
    by_kernels.test_norms_and_swiglu_are_exact(torch.float16)
    by_kernels.test_sampling_is_the_reference_on_the_cpu_token_for_token(8, 63)
    by_kernels.test_sampling_is_the_reference_on_the_cpu_token_for_token(4, 1)
    monkeypatch.setattr(gpu, "DRAWS", 24)
    monkeypatch.setattr(gpu, "AT_ONCE", 20)
    by_kernels.test_draws_through_the_kernel_have_the_exact_distribution({"top_k": 3, "presence_penalty": 0.2})
    assert sum(n for n, _ in gpu.VOCABULARIES) == 300


def test_what_is_wrong_turns_them_red(on_the_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op off by 2%, or by a token."""

    def off(op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **how: Any) -> Any:
            out = op(*inputs, **how)
            return tuple(x * 1.02 for x in out) if isinstance(out, tuple) else out * 1.02

        return call

    wrong = SimpleNamespace(**{name: off(getattr(reference, name)) for name in vars(KERNELS)})
    wrong.sample = lambda *inputs: reference.sample(*inputs) + 1
    monkeypatch.setattr(gpu, "ops", lambda dtype: wrong)
    for test in (
        lambda: on_the_cpu.test_linear_is_exact_at_odd_sizes("dense", torch.float16),
        lambda: on_the_cpu.test_what_is_fused_is_exact("int4 g32", torch.float16, True),
        lambda: on_the_cpu.test_adapters_are_exact_and_equal_merged_weights(False, torch.float16),
        lambda: on_the_cpu.test_adapters_are_exact_and_equal_merged_weights(True, torch.float16),
        lambda: on_the_cpu.test_norms_and_swiglu_are_exact(torch.float16),
        lambda: on_the_cpu.test_sampling_is_the_reference_on_the_cpu_token_for_token(8, 63),
    ):
        with pytest.raises(AssertionError):
            test()


def test_draws_of_the_reference_have_the_exact_distribution(
    on_the_cpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "DRAWS", 500)
    for asked in sampling_cases.SETS:
        on_the_cpu.test_draws_through_the_kernel_have_the_exact_distribution(asked)
    wrong = SimpleNamespace(sample=lambda logits, *rest: torch.arange(len(logits)) % 300)
    monkeypatch.setattr(gpu, "ops", lambda dtype: wrong)
    for asked in sampling_cases.SETS:
        with pytest.raises(AssertionError):
            on_the_cpu.test_draws_through_the_kernel_have_the_exact_distribution(asked)


def test_what_the_sanitizer_runs_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cpu = gpu.SANITIZED.replace('"cuda"', '"cpu"')
    assert cpu != gpu.SANITIZED
    exec(cpu, {})
    program: list[str] = []
    gpu.test_the_sanitizer_finds_nothing(program.append)
    assert program == [gpu.SANITIZED]


def test_the_speed_tests_are_in_order(on_the_cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capsys = SimpleNamespace(disabled=contextlib.nullcontext)
    monkeypatch.setattr(gpu, "FLOORS", {"dense": (0.0, 0.9), "int8": (0.0, 0.9)})
    monkeypatch.setattr(gpu, "SECTIONS", (*gpu.FLOORS, *gpu.SECTIONS[-3:]))
    results = on_the_cpu.no_results()
    for kind in gpu.FLOORS:
        if kind == "dense":
            with pytest.raises(AssertionError, match=r"1000.0 us, cuBLAS 1000.0"):
                on_the_cpu.test_linear_speed(kind, results, capsys)
        else:
            on_the_cpu.test_linear_speed(kind, results, capsys)
    on_the_cpu.test_adapters_speed(results, capsys)
    with pytest.raises(AssertionError, match="greedy, 1 rows: 1000"):
        on_the_cpu.test_sampling_speed(results, capsys)
    on_the_cpu.test_speed_of_many_rows(results, capsys)
    path = results.write(tmp_path, on_the_cpu.PLOTS)
    assert path == tmp_path / "a-card-80gb" / "linear.json"
    plots = {f"linear-{plot.name}.png" for plot in on_the_cpu.PLOTS}
    assert {each.name for each in path.parent.iterdir()} == {path.name} | (
        plots if importlib.util.find_spec("matplotlib") else set()
    )
    rows = json.loads(path.read_text())["rows"]
    (mine,) = (row for row in rows if row["op"] == "linear int8" and (row["layer"], row["rows"]) == ("all four", 8))
    assert (mine["floor"], mine["goal"], mine["us"]) == (0.0, 0.9, 1000)
    assert {row["op"] for row in rows} >= {"cublas, dense", "torch, dense", "adapters 8", "lora_shrink", "lora_expand"}


def test_what_misses_a_floor_is_told(on_the_cpu: ModuleType) -> None:
    one, eight = {"share": 0.9, "us": 100.0}, {"share": 0.8, "us": 120.0}
    assert on_the_cpu.missed(0.85, one, eight, {"us": 101.0}) == ""
    assert "below 0.95" in on_the_cpu.missed(0.95, one, eight, None)
    assert "cuBLAS 99.0" in on_the_cpu.missed(0.85, one, eight, {"us": 99.0})
    assert "for eight rows" in on_the_cpu.missed(0.85, one, {"share": 0.5, "us": 131.0}, None)
    slow = {"adapters 1": 1.06, "adapters 8": 1.2}

    def timed(op: str, *rest: Any, **shape: Any) -> dict[str, float]:
        return {"us": slow.get(op, 1.0)}

    results = SimpleNamespace(timed=timed, finished=lambda section: None)
    capsys = SimpleNamespace(disabled=contextlib.nullcontext)
    with pytest.raises(AssertionError, match=r"1 adapters: 1.06 us.*8 adapters: 1.2 us"):
        on_the_cpu.test_adapters_speed(results, capsys)


def test_the_facts_of_the_machine_are_in_the_results(on_the_cpu: ModuleType) -> None:
    facts = on_the_cpu.no_results().facts
    assert facts["runs"].startswith("torch")
    assert facts["read_gbs"] == FACTS["read_gbs"] == round(timing.read_ceiling())
