"""Records of the kernel bench as their tests need them: rows of round numbers, and a large sweep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from mistral_nb_kernels.bench.record import Ceilings, Record, Row, Skipped

CEILINGS = Ceilings(
    read_gbs=1000.0, copy_gbs=900.0, matmul_tflops={"bf16": 100.0, "fp32": 10.0}, spec_gbs=2000.0, spec_tflops=400.0
)
"""The ridge of bf16 is at 100 FLOPs a byte."""
MACHINE: dict[str, Any] = {
    **{"device": "NVIDIA H100 80GB HBM3", "kind": "cuda", "driver": "550.54", "capability": "9.0", "torch": "2.11.0"},
    **{"triton": "3.6.0", "cuda": "12.8", "python": "3.11.7", "cpu": "a CPU", "cores": 16, "threads": 16},
    "memory": 80 * 2**30,
}
ROW = Row(
    op="linear",
    case="qkv, 8 rows",
    shape={"layer": "qkv", "rows": 8},
    dtype="bf16",
    provider="ours",
    us=10.0,
    p20=9.9,
    p80=10.1,
    runs=20,
    flops=40_000_000,
    bytes=5_000_000,
    timer="graph",
)
"""8 FLOPs a byte, 4 TFLOP/s and 500 GB/s: half of the memory's speed."""
ABSENT = Skipped(op="linear", case="qkv, 8 rows", dtype="bf16", provider="liger", kind="absent", why="not installed")
PROVIDERS = ("ours", "eager", "compile", "sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa math", "flash-attn")


def record(rows: Iterable[Row] = (ROW,), **changed: Any) -> Record:
    whole = Record(
        command=("mistral-nb", "bench", "kernels", "linear"),
        revision="abc1234",
        when="2026-01-02T03:04:05Z",
        machine=MACHINE,
        ceilings=CEILINGS,
        rows=tuple(rows),
        skipped=(ABSENT,),
        notes=("an engine was answering",),
    )
    return replace(whole, **changed)


def row(provider: str = "ours", us: float = 10.0, spread: float = 0.02, **changed: Any) -> Row:
    """`spread`: between the 20th and the 80th percentile, as a share of the median."""
    return replace(ROW, provider=provider, us=us, p20=us * (1 - spread / 2), p80=us * (1 + spread / 2), **changed)


def sweep(providers: Iterable[str] = PROVIDERS, dtypes: Iterable[str] = ("bf16",)) -> Iterator[Row]:
    """Eight ops by many providers, as a whole run has them: by sequences and by tokens, several shapes of an op."""
    sizes: dict[str, list[tuple[dict[str, int | str], int, int]]] = {
        "prefill_attention": [({"tokens": t}, 8192 * t * t, 20480 * t) for t in (512, 2048, 8192, 16384)],
        "rope_decode_attention": [
            ({"batch": b, "tokens": t}, 16384 * b * t, 4096 * b * t) for b in (1, 8) for t in (512, 2048, 8192, 32768)
        ],
        "linear": [
            ({"layer": layer, "kind": kind, "rows": n}, 2 * n * wide, bits * wide // 8 + 9 * n)
            for layer, wide in (("qkv", 25_000_000), ("down", 58_000_000))
            for kind, bits in (("dense", 16), ("int4 g32", 5))
            for n in (1, 8, 2048)
        ],
        "add_rms_norm": [({"rows": n}, 20480 * n, 32768 * n) for n in (1, 8, 2048)],
        "swiglu": [({"rows": n}, 43008 * n, 86016 * n) for n in (1, 8, 2048)],
        "rope_write": [({"tokens": n}, 15360 * n, 20480 * n) for n in (64, 2048)],
        "lora_expand": [
            ({"layer": "qkv", "rows": n, "adapters": n}, 196_608 * n, 24_576 * n + 200_000) for n in (1, 8)
        ],
        "sample": [({"asked": asked, "rows": 8}, 10_240_000, 1_024_000) for asked in ("greedy", "top-k, top-p")],
    }
    for dtype in dtypes:
        for op, shapes in sizes.items():
            for shape, flops, bytes in shapes:
                least = max(flops / (CEILINGS.matmul_tflops[dtype] * 1e6), bytes / (CEILINGS.read_gbs * 1e3))
                for at, provider in enumerate(providers):
                    yield row(
                        provider,
                        us=least * (1.2 + 0.35 * at) + 2,
                        op=op,
                        case=", ".join(str(value) for value in shape.values()),
                        shape=shape,
                        dtype=dtype,
                        flops=flops,
                        bytes=bytes,
                        partial="no RoPE, no KV write" if provider.startswith("sdpa") and "rope" in op else "",
                    )
