"""Measuring: every provider at every point, what is skipped, what the machine gives, and the sweeps by default."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mistral_nb_kernels import reference
from mistral_nb_kernels.bench import ceilings as limits
from mistral_nb_kernels.bench import timing
from mistral_nb_kernels.bench.case import Case
from mistral_nb_kernels.bench.linear_cases import swiglu_case
from mistral_nb_kernels.bench.machine import busy, machine
from mistral_nb_kernels.bench.measure import Begin, Doing, measure
from mistral_nb_kernels.bench.providers import Absent, Provider
from mistral_nb_kernels.bench.record import Ceilings, Row, Skipped
from mistral_nb_kernels.bench.registry import OPS, SUBJECTS, Asked, op_points
from mistral_nb_kernels.bench.subject import Point
from mistral_nb_kernels.bench.timing import Timing

ROOT = Path(__file__).resolve().parent.parent.parent


def made(rows: int) -> Point:
    def make(device: Any) -> Case:
        return swiglu_case(rows, dtype=torch.float32, device=device)

    return Point("swiglu", f"{rows} rows", {"rows": rows}, torch.float32, make)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a millisecond, and there are two cases of a shape."""

    def time_calls(calls: list[Callable[[], Any]], device: Any) -> Timing:
        for call in calls:
            call()
        return Timing(1000.0, 900.0, 1100.0, len(calls), "wall")

    monkeypatch.setattr(timing, "time_calls", time_calls)
    monkeypatch.setattr(timing, "rotated", lambda make, device: [make(), make()])


def broken(case: Case) -> Callable[[], Any]:
    raise KeyError("no plan\nand more")


PROVIDERS = (
    Provider("right", lambda case: case.call(reference.swiglu)),
    Provider("half", lambda case: case.call(lambda x: 0.5 * reference.swiglu(x))),
    Provider("broken", broken),
    Provider("elsewhere", lambda case: (_ for _ in ()).throw(Absent("not here"))),
    Provider("nothing", lambda case: (_ for _ in ()).throw(Absent)),
)


@pytest.mark.usefixtures("quick")
def test_a_row_or_a_reason_for_each_provider_at_each_point() -> None:
    events = list(measure([made(2), made(3)], "cpu", (), PROVIDERS))
    assert events[0] == Begin(10)
    doing = [event for event in events if isinstance(event, Doing)]
    assert [(each.done, each.total, each.provider) for each in doing] == [
        (index, 10, PROVIDERS[index % 5].name) for index in range(10)
    ]
    assert {(each.op, each.dtype) for each in doing} == {("swiglu", "fp32")}
    rows = [event for event in events if isinstance(event, Row)]
    first = {"op": "swiglu", "case": "2 rows", "shape": {"rows": 2}, "dtype": "fp32", "provider": "right", "us": 1000.0}
    first |= {"p20": 900.0, "p80": 1100.0, "runs": 2, "flops": 3 * 2 * 28672, "bytes": 12 * 28672, "timer": "wall"}
    assert rows[0] == Row(**first)
    assert [row.case for row in rows] == ["2 rows", "3 rows"]
    skipped = [(each.case, each.provider, each.kind) for each in events if isinstance(each, Skipped)]
    wrong, failed = ("half", "wrong"), ("broken", "failed")
    absent = ("2 rows", "elsewhere", "absent")
    assert skipped == [("2 rows", *wrong), ("2 rows", *failed), absent, ("3 rows", *wrong), ("3 rows", *failed)]
    words = {each.provider: each.why for each in events if isinstance(each, Skipped)}
    assert words["half"] == "swiglu: tensor 0 is off in 3 of 3 rows"
    assert words["broken"] == "KeyError: 'no plan\\nand more'"
    order = [type(event).__name__ for event in events[1:5]]
    assert order == ["Doing", "Row", "Doing", "Skipped"]


@pytest.mark.usefixtures("quick")
def test_those_that_are_named_and_those_for_the_device() -> None:
    def who(providers: tuple[str, ...] | None) -> list[str]:
        events = measure([made(2)], "cpu", providers)
        return [event.provider for event in events if isinstance(event, Doing)]

    assert who(None) == ["ours", "eager"]
    assert who(("eager", "liger")) == ["eager", "liger"]
    assert who(("nobody",)) == []


@pytest.mark.usefixtures("quick")
def test_a_point_that_cannot_be_made_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(device: Any) -> Case:
        raise torch.OutOfMemoryError("Tried to allocate 99 GiB")

    large = Point("swiglu", "large", {}, torch.float32, make)
    events = list(measure([large, made(2)], "cpu", ("eager",)))
    (skipped,) = (event for event in events if isinstance(event, Skipped))
    assert (skipped.kind, skipped.why) == ("failed", "OutOfMemoryError: Tried to allocate 99 GiB")
    assert [event.case for event in events if isinstance(event, Row)] == ["2 rows"]


@pytest.mark.usefixtures("quick")
def test_inputs_are_the_same_each_time() -> None:
    """Whatever the process has drawn before; and what it draws later does not change."""
    seen: list[torch.Tensor] = []

    def bind(case: Case) -> Callable[[], Any]:
        seen.append(case.inputs[0])
        return case.call(case.reference)

    drawn = []
    for _ in range(2):
        torch.manual_seed(len(seen))
        assert any(isinstance(event, Row) for event in measure([made(2)], "cpu", (), [Provider("sees", bind)]))
        drawn.append(torch.rand(()))
    assert torch.equal(seen[0], seen[len(seen) // 2])
    assert not torch.equal(seen[0], seen[1])
    assert drawn[0] == torch.rand((), generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("quick")
def test_an_interrupt_is_not_a_failure() -> None:
    def stopped(case: Case) -> Callable[[], Any]:
        raise KeyboardInterrupt

    events = measure([made(2)], "cpu", (), [PROVIDERS[0], Provider("stopped", stopped)])
    kept = []
    with pytest.raises(KeyboardInterrupt):
        kept += events
    assert list(events) == []
    left = measure([made(2)], "cpu", (), PROVIDERS)
    assert isinstance(next(left), Begin)
    left.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nanoseconds that a test lets pass."""
    now = [0]
    monkeypatch.setattr(timing, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0] / 1e9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return now


@pytest.mark.parametrize(("ms", "runs"), [(3, 67), (15, 20), (150, 14), (900, 3), (9000, 3)], ids=str)
def test_a_cpu_is_timed_long_enough_and_not_too_long(ms: int, runs: int, clock: list[int]) -> None:
    ran: list[int] = []

    def call(index: int) -> Callable[[], None]:
        def run() -> None:
            ran.append(index)
            clock[0] += ms * 1_000_000

        return run

    took = timing.time_calls([call(0), call(1)], "cpu")
    assert took == Timing(1e3 * ms, 1e3 * ms, 1e3 * ms, runs, "wall")
    assert took.ms == ms
    warm = [0, 1] if ms < 200 else [0]
    assert ran[: len(warm) + 3] == [*warm, 0, 1, 0]
    assert len(ran) == len(warm) + runs


@pytest.mark.parametrize(
    ("two", "one", "timer", "us"),
    [
        ([2.0], 3.0, "wall", 2e3),
        ([20.0], 15.0, "wall", 20e3),
        ([20.0], 0.1, "waited", 20e3),
        ([0.9], 0.1, "wall", 900.0),
        ([20.0, 16.0, 0.1, 20.0], 30.0, "waited", 18e3),
        ([20.0, 16.0, 0.1, 20.0] * 5 + [0.1] * 200, 30.0, "wall", 100.0),
    ],
)
def test_a_time_that_is_the_schedulers_is_told(
    two: list[float], one: float, timer: str, us: float, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milliseconds of runs with two threads, again and again or once, and of all with one."""
    threads, steps = [2], iter([two[0], *two] if len(two) > 4 else itertools.cycle([two[0], *two][-len(two) :]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def call() -> None:
        clock[0] += int((one if threads[-1] == 1 else next(steps, 0.1)) * 1e6)

    took = timing.time_calls([call], "cpu")
    assert (took.timer, took.us) == (timer, pytest.approx(us))
    assert threads[-1] == 2


@pytest.mark.parametrize(("two", "one"), [(40, 60), (60, 40), (900, 800)])
def test_the_fastest_run_is_found(two: int, one: int, clock: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """With one thread, too, where several wait for each other; milliseconds of a run with two, and with one."""
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    delays = {2: [9, 0, 0, 3], 1: [7, 0, 0, 5]}

    def call() -> None:
        mine = delays[threads[-1]]
        clock[0] += ({2: two, 1: one}[threads[-1]] + (mine.pop() if mine else 8)) * 1_000_000

    assert timing.fastest(call, "cpu") == 1e3 * min(two, one)
    assert threads == [2, 2, 1, 2]
    runs = [1 + max(3, -(-250 // (ms + 8))) for ms in (two, one)]
    assert clock[0] <= sum(n * (ms + 9) for n, ms in zip(runs, (two, one), strict=True)) * 1_000_000


def row(tflops: float, bytes: int, **how: Any) -> Row:
    given = {
        "op": "linear",
        "case": "a case",
        "shape": {},
        "dtype": "fp32",
        "provider": "eager",
        "p20": 1.0,
        "p80": 1.0,
    }
    return Row(**{**given, "us": 1.0, "runs": 20, "flops": int(tflops * 1e6), "bytes": bytes, "timer": "wall", **how})


def test_ceilings_that_are_too_low_are_told() -> None:
    found = Ceilings(read_gbs=10.0, copy_gbs=10.0, matmul_tflops={"fp32": 0.2})
    assert limits.doubts(found, [row(0.2, 1000), row(0.001, 10_000), row(9.0, 1, dtype="bf16")]) == ()
    (low,) = limits.doubts(found, [row(0.3, 1000), row(0.6, 1000, provider="blas"), row(0.2, 1000)])
    words = "the ceiling of products in fp32, 0.2 TFLOP/s, is too low: blas gives 0.6 (linear, a case)"
    assert low.startswith(words)
    (waited,) = limits.doubts(found, [row(0.1, 1000, timer="waited"), row(0.1, 1000)])
    assert waited.startswith("1 of 2 rows waited for a core that others had")
    assert limits.doubts(found, [row(0.001, 30_000)]) == ("above 100% of memory: what is read fits in a cache",)


def test_medians_and_percentiles_are_of_the_runs() -> None:
    took = timing._timing([5, 1, 2, 3, 4, 6, 7, 8, 9, 100], "wall")
    assert took == Timing(5.5, 3, 8, 10, "wall")


@pytest.mark.parametrize(("size", "cases"), [(1, 8), (2**20, 8), (32 * 2**20, 5), (2**27, 2), (2**28, 1)])
def test_what_is_in_a_cpus_cache_is_not_read_again(size: int, cases: int) -> None:
    assert len(timing.rotated(lambda: Case("op", (), max, 1, size), "cpu")) == cases


def test_ceilings_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: list[int] = []

    def fastest(call: Callable[[], Any], device: Any) -> float:
        result = call()
        if result.dim() == 2:
            sides.append(len(result))
        return {2: 30_000.0 if result.dtype == torch.float16 else 100.0, 0: 200.0}.get(result.dim(), 100.0)

    monkeypatch.setattr(timing, "fastest", fastest)
    monkeypatch.setattr(limits, "WORDS", 3 * limits.WIDTH)
    monkeypatch.setattr(limits, "SIDES", {"cpu": (8, 16)})
    found = limits.ceilings("cpu", (torch.float32, torch.float16, torch.float32))
    assert found.read_gbs == pytest.approx(4 * 3 * limits.WIDTH / 100 / 1e3)
    assert found.copy_gbs == pytest.approx(4 * 3 * limits.WIDTH / 100 / 1e3)
    assert found.matmul_tflops == {
        "fp32": pytest.approx(2 * 16**3 / 100 / 1e6),
        "fp16": pytest.approx(2 * 8**3 / 3e4 / 1e6),
    }
    assert sides == [8, 16, 8]
    assert found.spec_gbs is found.spec_tflops is None


def test_ceilings_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SIDES", {"cuda": (8,)})
    monkeypatch.setattr(limits, "_product", lambda dtype, device: 700.0)
    monkeypatch.setattr(timing, "read_ceiling", lambda: 3000.0)
    monkeypatch.setattr(timing, "copy_ceiling", lambda: 2800.0)
    monkeypatch.setattr(limits.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = limits.ceilings("cuda", (torch.bfloat16,))
    assert (found.read_gbs, found.copy_gbs, found.matmul_tflops) == (3000.0, 2800.0, {"bf16": 700.0})
    assert (found.spec_gbs, found.spec_tflops) == (3350, 989)


def test_the_kernel_that_reads_reads_every_word(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    name = "mistral_nb_kernels.read_kernel"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))  # what is put in its place leaves with it
    del sys.modules[name]
    read = importlib.import_module(name).read
    x, out = torch.arange(4 * 256, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    read(x, out, 256)
    assert int(out) == 0
    x[3 * 256 + 17] = 123456789
    read(x, out, 256)
    assert int(out) == 123456789


def test_what_is_told_of_the_machine() -> None:
    found = machine("cpu")
    assert list(found) == [
        *("device", "kind", "driver", "capability", "torch", "triton", "cuda", "python", "cpu", "cores", "load"),
        *("threads", "memory"),
    ]
    assert found["kind"] == "cpu"
    assert found["device"] == found["cpu"] != ""
    assert found["driver"] is found["capability"] is None
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] >= 1
    assert found["memory"] is None or found["memory"] > 2**28


def test_a_busy_machine_is_told() -> None:
    found = {"kind": "cpu", "load": 1.1, "cores": 2}
    assert busy(found) == ("the machine was busy before: a load of 1.1 on 2 cores; times may be others'",)
    for quiet in ({"load": 1.0}, {"cores": 3}, {"load": None}, {"kind": "cuda"}):
        assert busy({**found, **quiet}) == ()


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("h100")
def test_sweeps_by_default() -> None:
    """On an H100 within eight minutes: about 55 shapes to compile at 2 to 3 seconds, and some 500 rows, each held
    against its reference and timed in about a third of a second, beside our kernels' own compilation.
    """
    sizes = {name: len(subject.points(Asked(), "cuda")) for name, subject in SUBJECTS.items()}
    assert sizes == {
        **{"attention": 12, "decode_attention": 16, "rope": 8, "linear": 39, "lora": 18, "norm": 3, "swiglu": 3},
        "sample": 12,
    }
    for name, subject in SUBJECTS.items():
        for device, dtype in (("cuda", torch.bfloat16), ("cpu", torch.float32)):
            points = subject.points(Asked(), device)
            assert {point.dtype for point in points} == {dtype}
            keys = {(point.op, point.case) for point in points}
            assert len(keys) == len(points)
            assert all(point.op in subject.ops for point in points), name
            assert all(set(map(type, point.shape.values())) <= {int, str} for point in points)
    assert sum(len(subject.points(Asked(), "cpu")) for subject in SUBJECTS.values()) <= 32


def test_an_old_gpu_is_measured_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert {point.dtype for point in SUBJECTS["norm"].points(Asked(), "cuda")} == {torch.float16}


def shapes(name: str, asked: Asked, device: str = "cpu") -> list[tuple[Any, ...]]:
    return [tuple(point.shape.values()) for point in SUBJECTS[name].points(asked, device)]


def test_what_is_asked_for_is_swept() -> None:
    assert shapes("attention", Asked(seq=(1, 33))) == [(1, 128), (33, 128)]
    assert shapes("decode_attention", Asked(seq=(5,), batch=(2, 3))) == [(2, 5, 128), (3, 5, 128)]
    assert shapes("norm", Asked(seq=(100, 3), batch=(3,))) == [(3,), (100,)]
    assert shapes("lora", Asked(batch=(3, 9))) == [("qkv", 3, 3), ("qkv", 9, 1)] * 2
    assert [row for *_, row in shapes("sample", Asked(seq=(9,), batch=(4,)))] == [4] * 4
    asked = Asked(ops=("decode_attention", "rms_norm"), batch=(1,))
    ops = [{point.op for point in SUBJECTS[name].points(asked, "cpu")} for name in ("decode_attention", "norm", "lora")]
    assert ops == [{"decode_attention"}, {"rms_norm"}, {"lora_shrink", "lora_expand"}]
    points = SUBJECTS["swiglu"].points(Asked(dtypes=(torch.float16, torch.float32), batch=(1,)), "cpu")
    assert [(point.case, point.dtype) for point in points] == [("1 row", torch.float16), ("1 row", torch.float32)]


@pytest.mark.usefixtures("h100")
def test_every_op_has_points_of_its_own_and_their_cases_are_its() -> None:
    for op in OPS:
        for device in ("cpu", "cuda"):
            points = op_points(op, Asked(seq=(2,), batch=(1,)), device)
            assert points
            assert {point.op for point in points} == {op}
            case = points[-1].make("cpu")
            assert case.op == op
            assert (case.flops > 0) == (op != "sample")
            assert case.bytes > 0
            assert case.wrong(case.reference) == ""


def test_nothing_needs_triton_before_it_runs() -> None:
    """As on Windows, or on a Mac."""
    names = sorted(
        ".".join(path.relative_to(ROOT / "kernels").with_suffix("").parts)
        for path in (ROOT / "kernels" / "mistral_nb_kernels" / "bench").rglob("*.py")
        if not path.stem.startswith("__")
    )
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'kernels')!r}); sys.modules['triton'] = None\n"
        f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n"
        "from mistral_nb_kernels.bench import TUNABLES\n"
        "from mistral_nb_kernels.bench.measure import Row, measure\n"
        "from mistral_nb_kernels.bench.registry import SUBJECTS, Asked\n"
        "points = SUBJECTS['norm'].points(Asked(batch=(1,)), 'cpu')\n"
        "assert any(isinstance(event, Row) for event in measure(points, 'cpu'))\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
