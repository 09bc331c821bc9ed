"""What needs a GPU, as far as it goes without one: cases, gate, tuner, results, and the GPU tests themselves."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from mistral_nb_kernels import configs, reference, tune
from mistral_nb_kernels.bench import TUNABLES, attention_cases, timing
from mistral_nb_kernels.bench.attention_cases import decode_case, prefill_case, rope_case
from mistral_nb_kernels.bench.case import Case, Tunable
from mistral_nb_kernels.bench.linear_cases import norm_case, rms_case
from mistral_nb_kernels.bench.results import Results
from mistral_nb_kernels.bench.timing import Timing
from mistral_nb_kernels.configs import Config
from mistral_nb_kernels.data_sheets import data_sheet
from mistral_nb_kernels.paged import PAGE, PagedKV
from tests.gpu import test_attention as gpu
from tests.kernels.untimed import FACTS, untimed

CPU = torch.device("cpu")
TIMING = {name: getattr(timing, name) for name in ("time_calls", "rotated", "device_facts")}
SMALL = {"device": CPU, "dtype": torch.float16}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of four heads."""
    untimed(monkeypatch)
    monkeypatch.setattr(attention_cases, "HEADS", {64: (4, 2), 128: (4, 2)})
    monkeypatch.setattr(attention_cases, "CONTEXT", 256)


def test_calls_are_captured_as_often_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is counted in calls here: a third of a millisecond each."""
    ran: list[str] = []

    class Graph:
        def replay(self) -> None:
            ran.extend(self.calls)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(ran)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.at - self.at) / 3

    @contextlib.contextmanager
    def captured(graph: Graph) -> Iterator[None]:
        before = len(ran)
        yield
        graph.calls = ran[before:]
        del ran[before:]

    fakes = {"CUDAGraph": Graph, "Event": Event, "graph": captured, "synchronize": lambda: None}
    fakes |= {"get_device_name": lambda: "NVIDIA H100 80GB HBM3", "get_device_capability": lambda: (9, 0)}
    fakes |= {"get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda mode: None}
    fakes["get_device_properties"] = lambda index: SimpleNamespace(L2_cache_size=100)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    took = TIMING["time_calls"]([lambda: ran.append("a"), lambda: ran.append("b")], repeats=5)
    assert took == Timing(*[pytest.approx(1000 / 3)] * 3, 5, "graph")
    assert ran == ["a", "b", "a", *["a", "b"] * (3 + 3 * (2 + 5))]
    ran.clear()

    def uncapturable(graph: Graph) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", uncapturable)
    took = TIMING["time_calls"]([lambda: ran.append("a")])
    assert took == Timing(*[pytest.approx(1000 / 3)] * 3, took.runs, "events")
    modes = [0]

    def waiting() -> None:
        ran.append("a")
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "graph", None)
    took = TIMING["time_calls"]([waiting])
    assert (took.timer, modes) == ("events", [0, "error", 0])
    assert took.runs >= timing.RUNS
    assert timing.replayed(waiting) is None
    monkeypatch.setattr(torch.cuda, "graph", uncapturable)
    assert timing.replayed(lambda: 1) is None
    monkeypatch.setattr(torch.cuda, "graph", captured)
    replay = timing.replayed(lambda: ran.append("b") or "its result")
    assert replay is not None
    ran.clear()
    assert [replay(), replay()] == ["its result"] * 2
    assert ran == ["b", "b"]
    assert len(TIMING["rotated"](lambda: Case("op", (), max, 1, 90))) == 6
    assert len(TIMING["rotated"](lambda: Case("op", (), max, 1, 9000))) == 2
    facts = TIMING["device_facts"]()
    assert (facts["capability"], facts["spec_gbs"], facts["spec_tflops"]) == ("9.0", 3350, 989)


@pytest.mark.parametrize(
    ("device", "gbs"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2039),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA L40S", 864),
        ("NVIDIA L4", 300),
        ("Tesla T4", 320),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L40", None),
        ("T400 4GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_a_data_sheet_is_of_the_whole_name(device: str, gbs: int | None) -> None:
    sheet = data_sheet(device)
    assert (sheet and sheet.gbs) == gbs


def test_a_copy_moves_the_bytes_of_its_case() -> None:
    case = CASES["rope"]()
    copied = attention_cases.copy_case(case, CPU)
    target, source = copied.inputs
    assert target.nbytes + source.nbytes == copied.bytes == case.bytes
    assert copied.wrong(torch.Tensor.copy_) == ""
    assert "copy: tensor 0 is off" in copied.wrong(lambda target, source: target.fill_(7))


CASES: dict[str, Callable[[], Case]] = {
    "prefill": lambda: prefill_case(70, 64, **SMALL),
    "prefill, windowed, contiguous": lambda: prefill_case(70, 128, 256, window=30, **SMALL),
    "decode": lambda: decode_case(2, 70, 64, **SMALL),
    "decode, windowed": lambda: decode_case(2, 70, 64, window=30, **SMALL),
    "rope": lambda: rope_case(70, 64, **SMALL),
}


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_and_is_right_by_its_reference(name: str) -> None:
    case = CASES[name]()
    assert case.flops > 0 < case.bytes
    (kv,) = (x for x in case.inputs if isinstance(x, PagedKV))
    assert kv.table.shape[1] * kv.page == 256
    before = kv.k.clone()
    assert case.wrong(case.reference) == ""
    assert torch.equal(kv.k, before)
    assert case.call(case.reference)().shape == case.inputs[0].shape
    assert torch.equal(kv.k, before) == (case.op == "prefill_attention")


def test_a_wrong_result_and_a_forgotten_write_are_seen() -> None:
    case = CASES["rope"]()
    q, _, _, cos, sin, _, _ = case.inputs

    def unwritten(*inputs: Any) -> torch.Tensor:
        return reference.rope(q, cos, sin)

    assert case.wrong(unwritten) == f"rope_write: tensor 10 is off in {2 * len(q)} of {2 * 3 * PAGE} rows"
    case = CASES["decode"]()

    def late(*inputs: Any) -> torch.Tensor:
        out = case.reference(*inputs)
        out[1, 2] *= 1.05
        return out

    assert case.wrong(late) == "rope_decode_attention: tensor 0 is off in 1 of 8 rows"
    assert case.wrong(lambda *inputs: case.reference(*inputs) * torch.nan).endswith("8 of 8 rows")

    def renumbered(*inputs: Any) -> torch.Tensor:
        out = case.reference(*inputs)
        inputs[5][0] += 1
        return out

    assert "rope_decode_attention: tensor 6 is off" in case.wrong(renumbered)


def test_a_result_of_another_kind_is_wrong() -> None:
    """Where values alone would do: another type or shape, a list, a tensor more or less, one that is made later."""

    class Lazy(torch.Tensor):
        pass

    case = norm_case(3, **SMALL)
    right = reference.add_rms_norm
    assert case.wrong(right) == ""
    for other, words in (
        (lambda *inputs: tuple(x.float() for x in right(*inputs)), "tensor 0 has the dtype float32, not float16"),
        (lambda *inputs: tuple(x[None] for x in right(*inputs)), "tensor 0 has the shape [1, 3, 4096], not [3, 4096]"),
        (lambda *inputs: list(right(*inputs)), "the result is a list, not a tuple"),
        (lambda *inputs: right(*inputs)[0], "the result is a Tensor, not a tuple"),
        (lambda *inputs: (*right(*inputs), inputs[0]), "3 tensors came out, not 2"),
        (lambda *inputs: None, "the result is a NoneType, not a tuple"),
        (lambda *inputs: tuple(map(Lazy, right(*inputs))), "a result is a Lazy, not a plain tensor"),
    ):
        assert case.wrong(other) == f"add_rms_norm: {words}"
    alone = rms_case(3, **SMALL)
    assert "the result is a tuple, not a Tensor" in alone.wrong(lambda *inputs: (reference.rms_norm(*inputs),))
    assert "the result is a NoneType, not a Tensor" in alone.wrong(lambda *inputs: None)


def test_every_op_of_a_head_dimension_is_tuned_by_what_can_run() -> None:
    assert {(t.op, width, t.bits) for t in TUNABLES for width in t.widths if width} == {
        (row.op, row.width, row.bits) for row in configs.read() if row.bits == 16 and row.width
    }
    for tunable in TUNABLES[:3]:
        every = [variant for config in tunable.first for variant in tunable.variants(config)]
        assert len(every) == len(set(every)) > len(tunable.shapes)
        for config in every:
            assert config.block_n <= PAGE
            assert config.split % max(config.block_n, 1) == 0


def test_a_wrong_case_is_not_timed() -> None:
    took, case = timing.time_case(CASES["rope"], reference.rope_write)
    assert (took.ms, case.op) == (1.0, "rope_write")
    with pytest.raises(ValueError, match="rope_write: tensor 0 is off in 280 of 280 rows"):
        timing.time_case(CASES["rope"], lambda *inputs: -reference.rope_write(*inputs))


def tiny(op: str, shape: Callable[..., Case], first: tuple[Config, ...]) -> Tunable:
    (tunable,) = (tunable for tunable in TUNABLES if tunable.op == op)
    makers = (lambda width, dtype, device: shape(width, dtype=dtype, device=device),) * 2
    return replace(tunable, widths=(64,), shapes=makers, first=first)


def test_the_tuner_takes_the_best_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of every op, its kernel under the interpreter, as on 7.5; prefill has no row there."""
    table = tmp_path / "configs.json"
    configs.write(configs.read(), table)
    before = configs.read(table)
    candidates = (
        tiny("rope_write", functools.partial(rope_case, 3), (Config(1), Config(2), Config(4), Config(8))),
        tiny("prefill_attention", functools.partial(prefill_case, 3), (Config(4, block_m=16, block_n=16),)),
        tiny("decode_attention", functools.partial(decode_case, 1, 20), (Config(2, block_n=32, split=256),)),
    )
    rope = candidates[0].kernel

    def kernel(config: Config, arch: int) -> Callable[..., Any]:
        if config.warps == 1:
            return lambda *inputs: reference.rope_write(*inputs) * 1.1
        if config.warps == 2:
            raise OutOfResources(2, 1, "shared memory")
        return rope(config, arch)

    def lazy(config: Config, arch: int) -> Callable[..., Any]:
        return lambda *inputs: kernel(config, arch)(*inputs)

    took = iter((5.0, 3.0, 4.0, 4.0, 2.0, 2.0))
    times = tune.time_calls
    monkeypatch.setattr(tune, "time_calls", lambda calls, repeats: replace(times(calls), us=1e3 * next(took, 1.0)))
    monkeypatch.setattr(tune, "TUNABLES", (replace(candidates[0], kernel=lazy), *candidates[1:]))
    monkeypatch.setattr(sys, "argv", ["tune", "--table", str(table)])
    monkeypatch.setattr(tune, "tune", functools.partial(tune.tune, device=CPU))
    tune.main()
    changed = {row.op: row for row in configs.read(table) if row not in before}
    assert {(row.arch, row.width, row.bits) for row in changed.values()} == {(75, 64, 16)}
    assert changed["rope_write"].config == Config(4)
    assert changed["decode_attention"].config == Config(2, block_n=32, split=64)
    assert changed["rope_write"].measured == "A card, 80GB, triton 3"
    assert len(changed) == 2
    assert len(configs.read(table)) == len(before)
    said = capsys.readouterr().out
    assert "WRONG, rope_write: tensor 0" in said
    assert "out of resource: shared memory" in said


def test_a_tuner_without_a_right_candidate_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(
        tiny("rope_write", functools.partial(rope_case, 3), (Config(1),)),
        kernel=lambda config, arch: lambda *inputs: reference.rope_write(*inputs) * 2,
    )
    monkeypatch.setattr(tune, "TUNABLES", (wrong,))
    monkeypatch.setattr(sys, "argv", ["tune", "--table", str(tmp_path / "none.json")])
    monkeypatch.setattr(tune, "tune", functools.partial(tune.tune, device=CPU))
    with pytest.raises(SystemExit, match="no candidate of rope_write 64 16 is right"):
        tune.main()
    assert not (tmp_path / "none.json").exists()


def test_results_are_written_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results("attention", ("decode", "rope"), FACTS)
    row = results.record(
        "decode",
        Timing(500, 400, 600, 20, "graph"),
        Case("decode", (), max, 10**9, 10**7),
        "read_gbs",
        t=8,
        head_dim=64,
    )
    assert row == {
        **{"op": "decode", "t": 8, "head_dim": 64, "us": 500, "p20": 400, "p80": 600, "tflops": 2.0, "gbs": 20},
        **{"share": 0.2, "share_of_spec": 0.1},
    }
    results.finished("decode")
    assert results.write(tmp_path) is None
    assert "nothing is written, for rope did not run to its end" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    results.finished("rope")
    path = results.write(tmp_path)
    assert path == tmp_path / "a-card-80gb" / "attention.json"
    assert json.loads(path.read_text()) == {**FACTS, "rows": [row]}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The GPU tests on small shapes, where torch's reference runs every op."""
    monkeypatch.setattr(gpu, "DEVICE", CPU)
    monkeypatch.setattr(gpu, "CONTEXT", 256)
    monkeypatch.setattr(gpu, "LONG", (129, 0, 256, 200))
    monkeypatch.setattr(gpu, "PREFILLS", (70,))
    monkeypatch.setattr(gpu, "DECODES", [(2, 65)])
    return gpu


def test_the_gpu_tests_themselves_are_in_order(on_the_cpu: ModuleType) -> None:
    on_the_cpu.test_decode_is_exact_and_writes_the_newest_token(9, 3, 64, 100, torch.bfloat16)
    on_the_cpu.test_prefill_is_exact_and_rope_before_it(9, 3, 64, None, torch.float32)
    on_the_cpu.test_long_contexts_are_exact_in_pages_and_contiguous(256, 100, torch.bfloat16)
    right = torch.ones(3, 2, 4)
    wrong = right.clone()
    wrong[1, 1, 3] = -1
    with pytest.raises(AssertionError, match=r"1 of 6 rows, first \[1, 1\]: error 2"):
        on_the_cpu.exact(wrong, right, right.double())


def test_the_gpu_speed_tests_themselves_are_in_order(
    on_the_cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capsys = SimpleNamespace(disabled=contextlib.nullcontext)
    results = on_the_cpu.no_results()

    def broken() -> None:
        raise RuntimeError("no plan")

    peers = {"flash": lambda: None, "cudnn": lambda: None}
    monkeypatch.setattr(attention_cases, "prefill_peers", lambda case: peers)
    monkeypatch.setattr(attention_cases, "decode_peers", lambda case: {"flash": lambda: None, "cudnn": broken})
    on_the_cpu.test_decode_speed(results, capsys)
    for head_dim in (128, 64):
        for windowed in (False, True):
            with pytest.raises(pytest.skip.Exception, match="prefill is torch's"):
                on_the_cpu.test_prefill_speed(head_dim, windowed, results, capsys)
    on_the_cpu.test_rope_speed(results, capsys)
    path = results.write(tmp_path, on_the_cpu.PLOTS)
    assert path is not None
    plots = {f"attention-{plot.name}.png" for plot in on_the_cpu.PLOTS}
    assert plots | {path.name} == {each.name for each in path.parent.iterdir()} | (
        set() if importlib.util.find_spec("matplotlib") else plots
    )
    assert {row["op"] for row in json.loads(path.read_text())["rows"]} == {
        *("prefill contiguous", "prefill paged", "prefill paged double", "sdpa flash", "sdpa cudnn", "rope_write"),
        "rope_write copy",
        *("window contiguous", "window paged", "window sdpa flash", "window sdpa cudnn", "decode", "decode sdpa flash"),
    }
    took = iter((1.0, 0.8))
    monkeypatch.setattr(timing, "time_calls", lambda calls: Timing(1e3 * next(took), 0.0, 2e3, 20, "graph"))
    with pytest.raises(AssertionError, match=r"70: 0\.8"):
        on_the_cpu.test_rope_speed(on_the_cpu.no_results(), capsys)
    assert on_the_cpu.slower_than_flash([3.0, 5.0], {"contiguous": 4.0, "paged": 4.0}) != ""
    assert on_the_cpu.slower_than_flash([3.0], {"contiguous": 4.0, "paged": 3.5}) != ""
    assert on_the_cpu.slower_than_flash([], {"contiguous": 4.0, "paged": 3.7}) == ""


@pytest.mark.parametrize("window", [None, 30])
def test_torchs_own_kernels_give_the_same(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that torch has on a CPU too, and what is asked of the others."""
    for name in ("flash", "cudnn", "efficient"):
        monkeypatch.setattr(torch.backends.cuda, f"can_use_{name}_attention", lambda params: True)
    case = prefill_case(70, 64, window=window, **SMALL)
    peers = attention_cases.prefill_peers(case)
    assert list(peers) == (
        ["flash", "flash, KV repeated", "cudnn", "cudnn, KV repeated"]
        if window is None
        else ["flash", "efficient, masked", "cudnn, masked"]
    )
    expected = case.reference(*case.inputs).transpose(0, 1)[None]
    if window is None:
        for name in ("flash", "flash, KV repeated"):
            torch.testing.assert_close(peers[name](), expected, atol=2e-3, rtol=1e-2)
    else:
        called: list[Any] = []
        operator = torch.ops.aten._flash_attention_forward.default
        fake = functools.partial(_windowed, called)
        fake._schema = operator._schema  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.ops.aten._flash_attention_forward, "default", fake)
        peers = attention_cases.prefill_peers(case)
        torch.testing.assert_close(peers["flash"](), expected, atol=2e-3, rtol=1e-2)
        assert called == [{"window_size_left": 29, "window_size_right": 0}]
    decode = decode_case(2, 70, 64, **SMALL)
    (call,) = attention_cases.decode_peers(decode).values()
    assert call().shape == (2, 2, 2, 64)


def _windowed(called: list[Any], q: Any, k: Any, v: Any, *rest: Any, **sides: Any) -> tuple[torch.Tensor]:
    """The operator beneath SDPA, in torch: [batch, t, heads, d]."""
    called.append(sides)
    out = reference.attention(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1), sides["window_size_left"] + 1)
    return (out[None],)
