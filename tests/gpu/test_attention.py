"""RoPE, prefill and decode attention on an NVIDIA GPU: exactness, one CUDA graph for every length, and speed.

The figures go to kernels/results/<device>/attention.json, with plots where matplotlib is, and are printed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("no NVIDIA GPU that torch sees", allow_module_level=True)

from torch.nn.attention import SDPBackend  # noqa: E402

import mistral_nb_kernels  # noqa: E402
from mistral_nb_kernels import Ops, PagedKV, Rows, configs, reference, tune  # noqa: E402
from mistral_nb_kernels.bench.attention_cases import (  # noqa: E402
    Case,
    decode_case,
    prefill_case,
    rope_case,
    sdpa_case,
)
from mistral_nb_kernels.bench.timing import (  # noqa: E402
    Timing,
    copy_ceiling,
    device_facts,
    read_ceiling,
    rotation,
    time_calls,
)
from mistral_nb_kernels.configs import Config  # noqa: E402

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.device("cuda")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LENGTHS = (1, 0, 63, 64, 65, 255, 256, 257, 900)
PAGE = 64


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def ops(head_dim: int, dtype: torch.dtype) -> Ops:
    return mistral_nb_kernels.choose(CUDA, head_dim, dtype)


def poisoned(lengths: tuple[int, ...], hkv: int, d: int, dtype: torch.dtype) -> PagedKV:
    """Shuffled pages; NaN wherever no sequence has a token, and unused entries of the table name such a page."""
    needed = [-(-length // PAGE) for length in lengths]
    pool = torch.full((2, sum(needed) + 1, hkv, PAGE, d), torch.nan, dtype=dtype)
    table = torch.zeros((len(lengths), max(needed) + 2), dtype=torch.int32)
    order = iter((torch.randperm(sum(needed)) + 1).tolist())
    for sequence, length in enumerate(lengths):
        for index in range(needed[sequence]):
            table[sequence, index] = next(order)
            used = min(PAGE, length - index * PAGE)
            pool[:, table[sequence, index], :, :used] = torch.randn(2, hkv, used, d).to(dtype)
    pool = pool.cuda()
    return PagedKV(pool[0], pool[1], table.cuda())


def double(kv: PagedKV) -> PagedKV:
    return PagedKV(kv.k.double(), kv.v.double(), kv.table)


def exact(got: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """The error against fp64 is at most twice that of torch in the same type, plus one unit in the last place."""
    assert got.dtype == plain.dtype
    allowed = 2 * (plain.double() - truth).abs().max() + torch.finfo(got.dtype).eps * truth.abs().max()
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"error {float(error):.3g}, allowed {float(allowed):.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hq", "hkv", "d"), [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("window", [None, 100])
def test_decode_is_exact_and_writes_the_newest_token(
    hq: int, hkv: int, d: int, window: int | None, dtype: torch.dtype
) -> None:
    kv = poisoned(LENGTHS, hkv, d, dtype)
    q, k, v = torch.randn(len(LENGTHS), hq + 2 * hkv, d).to(CUDA, dtype).split((hq, hkv, hkv), dim=1)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=CUDA)
    exact(
        ops(d, dtype).decode_attention(q, lengths, kv, window),
        reference.decode_attention(q, lengths, kv, window),
        reference.decode_attention(q.double(), lengths, double(kv), window),
    )
    cos, sin = reference.rope_table(1024, d, 1e6, CUDA)
    mine, truth = PagedKV(kv.k.clone(), kv.v.clone(), kv.table), double(kv)
    got = ops(d, dtype).rope_decode_attention(q, k, v, cos, sin, lengths, mine, window)
    plain = reference.rope_decode_attention(q, k, v, cos, sin, lengths, kv, window)
    doubles = (x.double() for x in (q, k, v, cos, sin))
    exact(got, plain, reference.rope_decode_attention(*doubles, lengths, truth, window))
    written = ~truth.k.isnan()
    assert torch.equal(~mine.k.isnan(), written)
    exact(mine.k[written], kv.k[written], truth.k[written])
    assert torch.equal(mine.v.nan_to_num(), kv.v.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hq", "hkv", "d"), [(9, 3, 64), (32, 8, 128)])
@pytest.mark.parametrize("window", [None, 100])
def test_prefill_is_exact_and_rope_before_it(hq: int, hkv: int, d: int, window: int | None, dtype: torch.dtype) -> None:
    counts, lengths = (1, 63, 64, 65, 0, 300, 129), (1, 63, 64, 200, 7, 300, 777)
    kv = poisoned(lengths, hkv, d, dtype)
    rows = Rows.of(counts, lengths, CUDA)
    q, k, v = torch.randn(sum(counts), hq + 2 * hkv, d).to(CUDA, dtype).split((hq, hkv, hkv), dim=1)
    cos, sin = reference.rope_table(1024, d, 1e6, CUDA)
    mine, truth = PagedKV(kv.k.clone(), kv.v.clone(), kv.table), double(kv)
    got = ops(d, dtype).rope_write(q, k, v, cos, sin, rows, mine)
    plain = reference.rope_write(q, k, v, cos, sin, rows, kv)
    doubles = [x.double() for x in (q, k, v, cos, sin)]
    exact(got, plain, reference.rope_write(*doubles, rows, truth))
    written = ~truth.k.isnan()
    assert torch.equal(~mine.k.isnan(), written)
    exact(mine.k[written], kv.k[written], truth.k[written])
    exact(
        ops(d, dtype).prefill_attention(plain, rows, kv, window),
        reference.prefill_attention(plain, rows, kv, window),
        reference.prefill_attention(plain.double(), rows, double(kv), window),
    )


@pytest.mark.parametrize("window", [None, 300])
def test_a_row_gets_the_same_bits_in_any_chunk_and_any_batch(window: int | None) -> None:
    t, d, dtype = 700, 128, torch.bfloat16
    kv = poisoned((t, 90), 8, d, dtype)
    alone = PagedKV(kv.k, kv.v, kv.table[:1])
    q = torch.randn(t, 32, d).to(CUDA, dtype)
    prefill, decode = ops(d, dtype).prefill_attention, ops(d, dtype).decode_attention
    whole = prefill(q, Rows.of((t,), (t,), CUDA), alone, window)
    for begin, end in ((0, 1), (1, 130), (130, 131), (131, 700)):
        chunk = prefill(q[begin:end], Rows.of((end - begin,), (end,), CUDA), alone, window)
        assert torch.equal(chunk, whole[begin:end]), (begin, end)
    lengths = torch.tensor((t, 90), dtype=torch.int32, device=CUDA)
    assert torch.equal(decode(q[:1], lengths[:1], alone, window)[0], decode(q[:2], lengths, kv, window)[0])


def test_one_graph_serves_every_length() -> None:
    d, dtype = 128, torch.bfloat16
    kv = poisoned((1000, 1000), 8, d, dtype)
    q, k, v = torch.randn(2, 48, d).to(CUDA, dtype).split((32, 8, 8), dim=1)
    cos, sin = reference.rope_table(1024, d, 1e6, CUDA)
    lengths = torch.tensor((5, 1), dtype=torch.int32, device=CUDA)
    decode = ops(d, dtype).rope_decode_attention
    decode(q, k, v, cos, sin, lengths, kv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(q, k, v, cos, sin, lengths, kv)
    for now in ((5, 1), (64, 0), (257, 65), (1000, 999)):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, decode(q, k, v, cos, sin, lengths, kv)), now


def test_the_tuner_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "configs.json"
    monkeypatch.setattr(tune, "candidates", lambda op: iter((Config(2), Config(8))))
    monkeypatch.setattr(sys, "argv", ["tune", "--op", "rope_write", "--head-dim", "64", "--out", str(out)])
    tune.main()
    (row,) = (row for row in configs.read(out) if row not in configs.read())
    assert (row.op, row.width, row.bits) == ("rope_write", 64, 16)
    assert row.config in (Config(2), Config(8))
    assert (row.measured or "").startswith(torch.cuda.get_device_name())


SANITIZED = """
import torch
from mistral_nb_kernels import choose
from mistral_nb_kernels.bench.attention_cases import decode_case, prefill_case, rope_case
ops = choose(torch.device("cuda"), 128, torch.bfloat16)
for case in (rope_case(65, 128, 64), prefill_case(130, 128, 64, 70), decode_case(2, 300, 128, 64)):
    getattr(ops, case.op)(*case.inputs)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer on the PATH")
def test_the_sanitizer_finds_nothing() -> None:
    """With torch's own cache of memory off, so that every tensor has bounds."""
    result = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SANITIZED],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.fixture(scope="module")
def results() -> Iterator[dict[str, Any]]:
    """What is measured, written at the end whatever failed."""
    found: dict[str, Any] = {
        **device_facts(),
        "command": "make gpu PART=attention",
        "read_gbs": round(read_ceiling()),
        "copy_gbs": round(copy_ceiling()),
        "runs": {d: str(ops(d, torch.bfloat16)) for d in (64, 128)},
        "rows": [],
    }
    yield found
    folder = ROOT / "kernels" / "results" / re.sub(r"\W+", "-", found["device"]).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "attention.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, folder)


def record(results: dict[str, Any], name: str, timing: Timing, case: Case | None, **shape: Any) -> dict[str, Any]:
    row = {"op": name, **shape, "us": round(timing.ms * 1e3, 2)}
    row |= {"p20": round(timing.p20 * 1e3, 2), "p80": round(timing.p80 * 1e3, 2)}
    if case is not None:
        row |= {"tflops": round(case.flops / timing.ms / 1e9, 1), "gbs": round(case.bytes / timing.ms / 1e6)}
    results["rows"].append(row)
    print(json.dumps(row), flush=True)
    return row


def timed(make: Callable[[], Case], head_dim: int) -> tuple[Timing, Case]:
    """Over as many sets of inputs as keep L2 out of it."""
    first = make()
    sets = [first, *(make() for _ in range(rotation(first.bytes) - 1))]
    function = getattr(ops(head_dim, torch.bfloat16), first.op)
    return time_calls([case.call(function) for case in sets]), first


@pytest.mark.parametrize("head_dim", [128, 64])
def test_prefill_speed(head_dim: int, results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Contiguous at least as fast as SDPA's flash kernel, paged within 10% of contiguous."""
    slow = []
    with capsys.disabled():
        for t in (2048, 4096, 8192, 16384):
            shape = {"t": t, "head_dim": head_dim}
            case = prefill_case(t, head_dim, PAGE)
            peers = {}
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                timing = time_calls([sdpa_case(t, head_dim, backend)])
                peers[name] = record(results, f"sdpa {name}", timing, case, **shape)["tflops"]
            mine = {}
            for name, page in (("contiguous", t), ("paged 64", 64), ("paged 128", 128)):
                timing, case = timed(lambda page=page, t=t: prefill_case(t, head_dim, page), head_dim)
                mine[name] = record(results, f"prefill {name}", timing, case, **shape)["tflops"]
            timing, case = timed(lambda t=t: prefill_case(t, head_dim, PAGE, 4096), head_dim)
            record(results, "prefill window 4096", timing, case, **shape)
            if mine["contiguous"] < peers["flash"]:
                slow.append(f"{shape}: contiguous {mine['contiguous']}, flash {peers['flash']} TFLOP/s")
            if mine["paged 64"] < 0.9 * mine["contiguous"]:
                slow.append(f"{shape}: paged {mine['paged 64']}, contiguous {mine['contiguous']} TFLOP/s")
    assert not slow


def test_decode_speed(results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Recorded against the measured read ceiling; the goal, 85% from 2k up, is read off the table."""
    with capsys.disabled():
        for head_dim in (128, 64):
            for batch in (1, 8):
                for t in (512, 2048, 8192, 32768):
                    timing, case = timed(lambda b=batch, t=t, d=head_dim: decode_case(b, t, d, PAGE), head_dim)
                    row = record(results, "decode", timing, case, t=t, batch=batch, head_dim=head_dim)
                    row["share_of_read"] = round(row["gbs"] / results["read_gbs"], 3)


def test_rope_speed(results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """At least 90% of the copy ceiling at 16k tokens."""
    with capsys.disabled():
        for t in (2048, 8192, 16384):
            timing, case = timed(lambda t=t: rope_case(t, 128, PAGE), 128)
            row = record(results, "rope_write", timing, case, t=t, head_dim=128)
            row["share_of_copy"] = round(row["gbs"] / results["copy_gbs"], 3)
    assert row["share_of_copy"] >= 0.9


def plot(found: dict[str, Any], folder: Path) -> None:
    """TFLOP/s of prefill and GB/s of decode by length."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib import pyplot

    for unit, part in (("tflops", ("prefill", "sdpa")), ("gbs", ("decode",))):
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
        for axis, head_dim in zip(axes, (128, 64), strict=True):
            lines: dict[str, list[tuple[int, float]]] = {}
            for row in found["rows"]:
                if row["op"].startswith(part) and row["head_dim"] == head_dim:
                    name = row["op"] + (f", batch {row['batch']}" if "batch" in row else "")
                    lines.setdefault(name, []).append((row["t"], row[unit]))
            for name, points in lines.items():
                axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.set(title=f"head_dim {head_dim}, bf16", xlabel="tokens", xscale="log")
            axis.legend(fontsize=7)
        axes[0].set_ylabel("TFLOP/s" if unit == "tflops" else "GB/s of KV")
        figure.suptitle(f"{found['device']}, torch {found['torch']}, triton {found['triton']}")
        figure.savefig(folder / f"attention-{part[0]}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
