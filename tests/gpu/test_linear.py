"""Linear layers, adapters, norms, SwiGLU and sampling on an NVIDIA GPU: exactness, one CUDA graph for every mix, speed.

The figures go to kernels/results/<device>/linear.json, with plots where matplotlib is, and are printed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import mistral_nb_kernels  # noqa: E402
from mistral_nb_kernels import Ops, Parameters, Penalties, reference  # noqa: E402
from mistral_nb_kernels.bench import linear_cases, sampling_cases, timing  # noqa: E402
from mistral_nb_kernels.bench.exactness import exact  # noqa: E402
from mistral_nb_kernels.bench.results import Plot, Results  # noqa: E402
from mistral_nb_kernels.packed import LoraRows, Norm  # noqa: E402
from tests.gpu.linear_inputs import (  # noqa: E402
    KINDS,
    SANITIZED,
    adapters,
    between_nan,
    captured,
    doubled,
    fused_layer,
    on_the_cpu,
    scales,
    slots,
    weights,
)
from tests.kernels.chi_square import assert_drawn_from  # noqa: E402

# what other packages warn of on a host is no fault of the kernels
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).resolve().parent.parent.parent
DEVICE = torch.device("cuda")
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPES = [HALF, BF16, FP32]
COMBINATIONS = [
    *((kind, BF16) for kind in KINDS),
    *(("dense", HALF), ("int8", HALF), ("int4 g32", HALF), ("int4 g128", HALF), ("dense", FP32)),
]
"""In fp32 int8 and int4 are torch's."""
ODD = ((1, 1001, 4096), (3, 33, 129), (8, 64, 14336), (5, 1, 520), (2, 4099, 576), (9, 70, 513), (70, 129, 1025))
"""Rows, outputs and inputs; int4 takes the next whole number of its blocks as inputs."""
FUSED = ((1, 70, 1025), (8, 333, 4096), (20, 33, 513))
"""Rows, what comes out, inputs."""
DIM = 1025
LORA_ENDS = (1000, 1033, 1090)
RANKS = (1, 7, 0, 16, 64)
DIMS = (1, 63, 64, 65, 576, 4096, 4100, 16384)
VOCABULARIES = ((4, 1), (60, 63), (60, 64), (70, 65), (50, 200), (30, 300), (12, 32000), (8, 32768), (6, 49152))
"""300 rows, and their vocabularies."""
DRAWS, AT_ONCE = 100_000, 10_000
MANY = 2048
FLOORS = {"dense": (0.85, 0.92), "int8": (0.75, 0.85), "int4 g128": (0.6, 0.75), "int4 g32": (0.6, 0.75)}
"""Of the read ceiling, for a layer's four products at one row: the least, and the goal."""
BATCH = 1.3
"""What eight rows may take, of the time of one."""
ADAPTERS = ((1, 1, 1.05), (8, 8, 1.15))
"""Rows, adapters among them, and what a layer with them may take, of the time without."""
SAMPLING_US = 30.0
SECTIONS = (*FLOORS, "adapters", "sampling", "rows")
PLOTS = (
    Plot("share", "share", ("linear", "cublas", "torch"), "layer", "rows"),
    Plot("sampling", "us", ("sample",), "asked", "rows"),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ops(dtype: torch.dtype) -> Ops:
    return mistral_nb_kernels.choose(DEVICE, 128, dtype)


def served() -> torch.dtype:
    """The type that the engine runs in."""
    return HALF if torch.cuda.get_device_capability() < (8, 0) else BF16


def is_exact(op: Callable[..., torch.Tensor], plain: Callable[..., torch.Tensor], *inputs: Any, **how: Any) -> None:
    """Against the reference `plain` on the same inputs, and in fp64."""
    exact(op(*inputs, **how), plain(*inputs, **how), plain(*map(doubled, inputs), **{k: doubled(how[k]) for k in how}))


@pytest.mark.parametrize(("kind", "dtype"), COMBINATIONS)
def test_linear_is_exact_at_odd_sizes(kind: str, dtype: torch.dtype) -> None:
    """A lone output in 16 bits only: one sum in fp32 is as exact as its luck."""
    for n, outputs, inputs in ODD:
        weight = weights(kind, outputs if dtype != FP32 else max(outputs, 33), inputs, dtype)
        is_exact(ops(dtype).linear, reference.linear, between_nan(n, weight.shape[1], dtype=dtype), weight)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), COMBINATIONS)
def test_what_is_fused_is_exact(kind: str, dtype: torch.dtype, gated: bool) -> None:
    for n, hidden, inputs in FUSED:
        fused = fused_layer(kind, n, hidden, inputs, dtype, gated)
        exact(fused(ops(dtype).linear), fused(reference.linear), doubled(fused)(reference.linear))


@pytest.mark.parametrize("kind", [*FLOORS, "fp32"])
def test_a_row_gets_the_same_bits_among_any_rows_at_any_place(kind: str) -> None:
    kind, dtype = ("dense", FP32) if kind == "fp32" else (kind, served())
    linear = ops(dtype).linear
    for gated in (False, True):
        eight = fused_layer(kind, 8, *FUSED[1][1:], dtype, gated)
        together = eight(linear)
        for n in range(1, 9):
            for first in {0, (8 - n) // 2, 8 - n}:
                rows = slice(first, first + n)
                assert torch.equal(eight.of(rows)(linear), together[rows]), (n, first)
        order = torch.randperm(8, device=DEVICE)
        assert torch.equal(eight.of(order)(linear), together[order])


SEQUENCES = (*(0,) * 33, *(-1,) * 5, *(3,) * 20, 4, *(1,) * 31)
"""Slots of the rows of a few prompts."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True])
def test_adapters_are_exact_and_equal_merged_weights(many: bool, dtype: torch.dtype) -> None:
    """Of ranks 1, 7, 16, 64 and none among them in a batch; in the form for many rows both halves together."""
    lora = adapters(DIM, LORA_ENDS, RANKS, dtype)
    which = slots(*(SEQUENCES if many else (0, -1, 4, 3, 4, -1, 1, 0)))
    x, scale = between_nan(len(which), DIM, dtype=dtype), scales(which)
    base = (torch.randn(LORA_ENDS[-1], DIM, device=DEVICE) * DIM**-0.5).to(dtype)
    kernels = ops(dtype)
    if not many:
        norm = Norm((torch.rand(DIM, device=DEVICE) + 0.5).to(dtype), 1e-5)
        for how in ({}, {"norm": norm}):
            is_exact(kernels.lora_shrink, reference.lora_shrink, x, lora, which, scale, **how)
    shrunk = kernels.lora_shrink(x, lora, which, scale)
    assert not shrunk[which < 0].any()
    y = x @ base.t()
    plain = reference.lora_expand(reference.lora_shrink(x, lora, which, scale), lora, which, y.clone())
    truth = y.double()
    for row, slot in enumerate(which.tolist()):
        if slot >= 0:
            parts = lora.a[slot].double().unflatten(0, (len(LORA_ENDS), -1)) @ x[row].double()
            b = lora.b[slot].double().tensor_split(LORA_ENDS[:-1])
            update = torch.cat([matrix @ part for matrix, part in zip(b, parts, strict=True)])
            truth[row] += update * float(scale[row])
    got = kernels.lora_expand(shrunk, lora, which, y.clone())
    exact(got, plain, truth)
    assert torch.equal(got[which < 0], y[which < 0])


def test_an_adapter_s_row_gets_the_same_bits_in_any_batch() -> None:
    dtype = served()
    kernels, lora, which = ops(dtype), adapters(DIM, LORA_ENDS, RANKS, dtype), slots(0, -1, 3, 1, 3, 0, -1, 1)
    x, y = between_nan(8, DIM, dtype=dtype), between_nan(8, LORA_ENDS[-1], dtype=dtype)
    together = kernels.lora_shrink(x, lora, which, scales(which))
    expanded = kernels.lora_expand(together, lora, which, y.clone())
    for rows in (slice(0, 1), slice(2, 5), slice(7, 8), [5, 0, 3]):
        shrunk = kernels.lora_shrink(x[rows], lora, which[rows], scales(which)[rows])
        assert torch.equal(shrunk, together[rows])
        assert torch.equal(kernels.lora_expand(shrunk, lora, which[rows], y[rows].clone()), expanded[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_swiglu_are_exact(dtype: torch.dtype) -> None:
    """The norm of a sum is an addition and a norm, to the bit; a row is the same alone.

    SiLU of a lone number in 16 bits only: in fp32 its power is as exact as its luck.
    """
    kernels = ops(dtype)
    for dim in DIMS:
        x, residual = (between_nan(5, dim, dtype=dtype) for _ in range(2))
        weight = (torch.rand(dim, device=DEVICE) + 0.5).to(dtype)
        is_exact(kernels.rms_norm, reference.rms_norm, x, weight, 1e-5)
        normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, kernels.rms_norm(total, weight, 1e-5))
        assert torch.equal(normed[2:3], kernels.rms_norm(total[2:3], weight, 1e-5))
        if dim > 1 or dtype != FP32:
            gate_up = between_nan(5, 2 * dim, dtype=dtype)
            gate_up *= 3
            is_exact(kernels.swiglu, reference.swiglu, gate_up)


@pytest.mark.parametrize(("n", "vocab"), VOCABULARIES)
def test_sampling_is_the_reference_on_the_cpu_token_for_token(n: int, vocab: int) -> None:
    dtype = DTYPES[vocab % 3]
    logits, asked, counted = sampling_cases.mixed_case(
        n, vocab, random.Random(vocab), dtype=dtype, device=DEVICE
    ).inputs
    its = on_the_cpu(counted)
    expected = reference.sample(logits.cpu(), on_the_cpu(asked), its).tolist()
    sample = ops(dtype).sample
    before = counted.counts.clone()
    assert sample(logits, asked, counted).tolist() == expected
    assert torch.equal(counted.counts.cpu(), its.counts)
    counted.counts.copy_(before)
    order = torch.randperm(n, device=DEVICE)[: max(1, n // 2)]
    some = Parameters(**{field.name: getattr(asked, field.name)[order] for field in dataclasses.fields(asked)})
    again = sample(logits[order], some, dataclasses.replace(counted, row=counted.row[order]))
    assert again.tolist() == [expected[row] for row in order.tolist()]


@pytest.mark.parametrize("asked", sampling_cases.SETS, ids=str)
def test_draws_through_the_kernel_have_the_exact_distribution(asked: dict[str, float]) -> None:
    """Chi-square of 100,000 draws, below its 99.9% quantile. The numbers are the same on any machine."""
    how = sampling_cases.OFF | asked
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(300, generator=source) * 2
    counts = torch.randint(0, 3, (300,), generator=source, dtype=torch.int32)
    prompt = torch.rand(300, generator=source) < 0.2
    sample, drawn = ops(FP32).sample, []
    for first in range(0, DRAWS, AT_ONCE):
        n = min(AT_ONCE, DRAWS - first)
        numbers = {name: torch.full((n,), value, device=DEVICE) for name, value in how.items() if name != "top_k"}
        keys = {"top_k": torch.full((n,), int(how["top_k"]), dtype=torch.int32), "seed": torch.full((n,), 1234)}
        keys["position"] = torch.arange(first, first + n)
        places = torch.arange(n, dtype=torch.int32, device=DEVICE)
        counted = Penalties(counts.repeat(n, 1).to(DEVICE), prompt.repeat(n, 1).to(DEVICE), places)
        batch = Parameters(**numbers, **{name: key.to(DEVICE) for name, key in keys.items()})
        drawn.append(sample(logits.to(DEVICE).expand(n, 300), batch, counted).cpu())
    expected = DRAWS * sampling_cases.shares(logits, counts, prompt, how)
    observed = torch.bincount(torch.cat(drawn), minlength=300).double()
    assert_drawn_from(observed, expected)


@pytest.mark.parametrize("kind", FLOORS)
def test_one_graph_serves_every_mix_of_adapters_and_of_parameters(kind: str) -> None:
    """From a step's last row to its token."""
    dtype, n, vocab = served(), 4, FUSED[1][1]
    kernels, source = ops(dtype), random.Random(0)
    weight = weights(kind, vocab, 512, dtype)
    norm = Norm((torch.rand(weight.shape[1], device=DEVICE) + 0.5).to(dtype), 1e-5)
    lora = adapters(weight.shape[1], (vocab,), (16, 7, 0, 1), dtype)
    x, which = torch.empty(n, weight.shape[1], dtype=dtype, device=DEVICE), slots(*[-1] * n)
    scale = torch.ones(n, device=DEVICE)
    of_a_mix = functools.partial(sampling_cases.mixed_case, n, vocab, source, dtype=dtype, device=DEVICE)
    _, asked, counted = of_a_mix().inputs
    x.normal_()

    def step() -> tuple[torch.Tensor, ...]:
        shrunk = kernels.lora_shrink(x, lora, which, scale, norm=norm)
        logits = kernels.linear(x, weight, norm=norm, lora=LoraRows(lora, which, shrunk))
        return shrunk, logits, kernels.sample(logits, asked, counted)

    replay = captured(step)
    for mix in ((-1, -1, -1, -1), (0, 1, 3, -1), (3, 3, 0, 0)):
        x.normal_()
        which.copy_(slots(*mix))
        _, changed, _ = of_a_mix().inputs
        for field in dataclasses.fields(asked):
            getattr(asked, field.name).copy_(getattr(changed, field.name))
        counted.counts.zero_()
        replayed, counts = replay(), counted.counts.clone()
        counted.counts.zero_()
        assert all(map(torch.equal, replayed, step())), mix
        assert torch.equal(counts, counted.counts)


def test_the_sanitizer_finds_nothing(sanitize: Callable[[str], None]) -> None:
    sanitize(SANITIZED)


def no_results() -> Results:
    facts = {
        **timing.device_facts(),
        "dtype": str(served()).removeprefix("torch."),
        "command": "make gpu PART=linear",
        "read_gbs": round(timing.read_ceiling()),
        "copy_gbs": round(timing.copy_ceiling()),
        "runs": str(ops(served())),
    }
    return Results("linear", SECTIONS, facts)


@pytest.fixture(scope="module")
def results() -> Iterator[Results]:
    """Written at the end, if every speed was measured."""
    found = no_results()
    yield found
    found.write(ROOT / "kernels" / "results", PLOTS)


def here(make: Callable[..., Any], *how: Any, **more: Any) -> Callable[[], Any]:
    """A maker of cases for this machine."""
    return functools.partial(make, *how, dtype=served(), device=DEVICE, **more)


def missed(floor: float, one: dict[str, Any], eight: dict[str, Any], cublas: dict[str, Any] | None) -> str:
    """Which of a layer's floors is not met: its rows at one and at eight rows of x, and cuBLAS's at one."""
    if one["share"] < floor:
        return f"{one['share']} of the read ceiling, below {floor}"
    if cublas is not None and one["us"] >= cublas["us"]:
        return f"{one['us']} us, cuBLAS {cublas['us']}"
    if eight["us"] > BATCH * one["us"]:
        return f"{eight['us']} us for eight rows, {one['us']} for one"
    return ""


@pytest.mark.parametrize("kind", FLOORS)
def test_linear_speed(kind: str, results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    """Each product as it is fused, and a layer's four in sequence, beside the bare products by torch."""
    kernels, (floor, goal) = ops(served()), FLOORS[kind]
    run_layer = functools.partial(linear_cases.run_layer, kernels)
    mine, theirs = {}, {}
    with capsys.disabled():
        for rows in (1, 8):
            for layer in linear_cases.SHAPES:
                make, shape = here(linear_cases.linear_case, layer, rows, kind), {"layer": layer, "rows": rows}
                results.timed(f"linear {kind}", make, kernels.linear, "read_gbs", **shape)
                results.timed_peers(f"{{}}, {kind}", make, linear_cases.linear_peers, "read_gbs", **shape)
            make, shape = here(linear_cases.layer_case, rows, kind), {"layer": "all four", "rows": rows}
            goals = {"floor": floor, "goal": goal}
            mine[rows] = results.timed(f"linear {kind}", make, run_layer, "read_gbs", **shape, **goals)
            theirs[rows] = results.timed_peers(f"{{}}, {kind}", make, linear_cases.layer_peers, "read_gbs", **shape)
    results.finished(kind)
    wrong = missed(floor, mine[1], mine[8], theirs[1].get("cublas"))
    assert not wrong, wrong


def test_adapters_speed(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    """What rank 16 on all seven projections adds to a layer's four products."""
    kernels, slow = ops(served()), []
    run_layer = functools.partial(linear_cases.run_layer, kernels)
    with capsys.disabled():
        for rows, count, most in ADAPTERS:
            make = here(linear_cases.layer_case, rows)
            bare = results.timed("adapters none", make, run_layer, "read_gbs", rows=rows)
            make = here(linear_cases.layer_case, rows, slots=count)
            row = results.timed(f"adapters {count}", make, run_layer, "read_gbs", rows=rows, most=most)
            if row["us"] > most * bare["us"]:
                slow.append(f"{count} adapters: {row['us']} us, {bare['us']} without")
            for layer in linear_cases.LAYER:
                make = here(linear_cases.shrink_case, layer, rows, count)
                results.timed("lora_shrink", make, kernels.lora_shrink, "read_gbs", layer=layer, rows=rows)
    results.finished("adapters")
    assert not slow, slow


def test_sampling_speed(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 32000 scores, which come from L2 as they do after the product; flat ones are recorded."""
    sample, slow = ops(served()).sample, []
    with capsys.disabled():
        for rows in (1, 8):
            for asked in sampling_cases.ASKED:
                make, shape = here(sampling_cases.sample_case, asked, rows), {"asked": asked, "rows": rows}
                us = results.timed("sample", make, sample, "read_gbs", **shape)["us"]
                slow += [f"{asked}, {rows} rows: {us} us"] * (us >= SAMPLING_US)
                results.timed_peers("sample {}", make, sampling_cases.sample_peers, "read_gbs", **shape)
            make = here(sampling_cases.sample_case, "top-p", rows, spread=1.0)
            results.timed("sample", make, sample, "read_gbs", asked="top-p, flat", rows=rows)
    results.finished("sampling")
    assert not slow, slow


def test_speed_of_many_rows(results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    """What stands around cuBLAS in a prompt: norms and SwiGLU are at least as fast as torch's; the rest is recorded."""
    kernels, slow = ops(served()), []
    small = ((linear_cases.norm_case, kernels.add_rms_norm), (linear_cases.swiglu_case, kernels.swiglu))
    plain: Callable[..., Any] = lambda case: {"torch": case.call(case.reference)}  # noqa: E731
    halves = ((linear_cases.shrink_case, kernels.lora_shrink), (linear_cases.expand_case, kernels.lora_expand))
    with capsys.disabled():
        for rows, (case_of, op) in itertools.product((1, MANY), small):
            make = here(case_of, rows)
            mine = results.timed(make().op, make, op, "copy_gbs", rows=rows)
            peers = results.timed_peers(f"{mine['op']} {{}}", make, plain, "copy_gbs", rows=rows)
            slow += [f"{mine}, {peers}"] * (rows == MANY and mine["us"] > peers["torch"]["us"])
        for kind, rows in itertools.product(FLOORS, (16, MANY)):
            make = here(linear_cases.linear_case, "gate, up", rows, kind)
            results.timed(f"prompt {kind}", make, kernels.linear, rows=rows)
        for layer, (case_of, op) in itertools.product(linear_cases.LAYER, halves):
            make = here(case_of, layer, MANY, 1)
            results.timed(make().op, make, op, "copy_gbs", layer=layer, rows=MANY)
    results.finished("rows")
    assert not slow, slow
