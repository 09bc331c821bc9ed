"""Compiles every config of the table for its architecture, without a GPU, and reads what the machine code uses.

`python -m mistral_nb_kernels.compile_report` prints the table and ends with 1 where a kernel spills, takes more shared
memory than its architecture has, or lacks an instruction that it is there for. What is compiled is what is
launched: the wrappers themselves run up to the launch, on CPU tensors in Mistral-7B's layout, SmolLM2's at head_dim 64.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mistral_nb_kernels import reference
from mistral_nb_kernels.configs import Config, Row, read
from mistral_nb_kernels.paged import PagedKV, Rows

__all__ = ["SHARED_MEMORY", "Compiled", "markdown", "problems", "report", "with_table"]

START, END = "<!-- compiled -->", "<!-- /compiled -->"

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a block may have, by compute capability (CUDA programming guide, compute capabilities)."""
HEADS = {64: (9, 3), 128: (32, 8)}
"""Query and KV heads by head dimension: SmolLM2-135M's and Mistral-7B's."""
PAGE, TOKENS = 64, 256
MATRIX = {90: "HGMMA", 100: "UTCHMMA"}
"""Prefill's matrix instruction in 16 bits: wgmma on 9.0, tcgen05 on 10.0; elsewhere, and in decode, mma (HMMA)."""
ASYNCHRONOUS = ("LDGSTS", "UTMALDG", "UBLKCP")
"""Copies from global to shared memory that need no registers: cp.async, and the bulk ones."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel's machine code. `spills` are loads and stores of local memory; `stack` and `shared` in bytes."""

    kernel: str
    arch: int
    head_dim: int
    dtype: str
    variant: str
    config: Config
    measured: str | None
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    asynchronous: int
    wide_loads: int
    """Instructions of that kind: matrix products, asynchronous copies, loads of 16 bytes (asynchronous ones too)."""


def report(rows: tuple[Row, ...] | None = None, workers: int | None = None) -> list[Compiled]:
    """Every kernel of `rows` (the shipped table), compiled in processes of their own; 16 bits is bf16, fp16 on 7.5."""
    rows = read() if rows is None else rows
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=context) as pool:
        return [compiled for found in pool.map(_compile_row, rows) for compiled in found]


def _compile_row(row: Row) -> list[Compiled]:
    torch.set_num_threads(1)
    dtype = torch.float32 if row.bits == 32 else torch.float16 if row.arch < 80 else torch.bfloat16
    found = []
    for variant, launch in _launches(row, dtype):
        with _compiling(row.arch) as kernels:
            launch()
        for kernel in kernels:
            prefills = kernel.name == "prefill_kernel"
            usage = _read_cubin(kernel.asm["cubin"], MATRIX.get(row.arch, "HMMA") if prefills else "HMMA")
            config = row.config if kernel.name != "combine_kernel" else Config(kernel.metadata.num_warps)
            facts = (kernel.name, row.arch, row.head_dim, str(dtype).removeprefix("torch."), variant)
            found.append(
                Compiled(*facts, config, row.measured, shared=kernel.metadata.shared, **usage)  # type: ignore[arg-type]
            )
    return found


def _launches(row: Row, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each form of an op by name."""
    hq, hkv = HEADS[row.head_dim]
    packed = torch.zeros(2, hq + 2 * hkv, row.head_dim, dtype=dtype)
    q, k, v = packed[:, :hq], packed[:, hq : hq + hkv], packed[:, hq + hkv :]
    pool = torch.zeros(2, 2, hkv, PAGE, row.head_dim, dtype=dtype)
    kv = PagedKV(pool[0], pool[1], torch.zeros(2, TOKENS // PAGE, dtype=torch.int32))
    cos, sin = reference.rope_table(TOKENS, row.head_dim, 1e6)
    if row.op == "rope_write":
        from mistral_nb_kernels.rope import rope_write

        yield "", lambda: rope_write(q, k, v, cos, sin, Rows.of((1, 1), (1, 1)), kv, config=row.config)
    elif row.op == "prefill_attention":
        from mistral_nb_kernels.attention import prefill_attention

        rows = Rows.of((1, 1), (1, 1))
        yield "", lambda: prefill_attention(q, rows, kv, config=row.config)
        yield "window", lambda: prefill_attention(q, rows, kv, 64, config=row.config)
    else:
        yield from _decodes(q, k, v, cos, sin, kv, row)


def _decodes(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: PagedKV, row: Row
) -> Iterator[tuple[str, Callable[[], object]]]:
    from mistral_nb_kernels.decode_attention import decode_attention, rope_decode_attention

    lengths, how = torch.ones(2, dtype=torch.int32), {"config": row.config, "dot": row.arch >= 80}
    yield "", lambda: decode_attention(q, lengths, kv, **how)  # type: ignore[arg-type]
    yield "window", lambda: decode_attention(q, lengths, kv, 64, **how)  # type: ignore[arg-type]
    yield "RoPE", lambda: rope_decode_attention(q, k, v, cos, sin, lengths, kv, **how)  # type: ignore[arg-type]


@contextlib.contextmanager
def _compiling(arch: int) -> Iterator[list[Any]]:
    """Launches compile for `arch` and stop there; the list gets what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    target = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    driver.set_active(target)
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def _read_cubin(cubin: bytes, matrix: str) -> dict[str, int]:
    """Resources and counts of instructions, by the disassembler that comes with triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([knobs.nvidia.cuobjdump.path, option, file.name], capture_output=True, text=True, check=True)
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout))
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", code.stdout, re.MULTILINE)

    def count(*names: str, wide: bool = False) -> int:
        return sum(name.split(".")[0] in names and (not wide or "128" in name) for name in operations)

    return {
        "registers": int(numbers["REG"]),
        "stack": int(numbers["STACK"]),
        "spills": count("LDL", "STL"),
        "matrix": count(matrix),
        "asynchronous": count(*ASYNCHRONOUS),
        "wide_loads": count("LDG", "LDGSTS", wide=True) + count(*ASYNCHRONOUS[1:]),
    }


def problems(compiled: list[Compiled]) -> list[str]:
    """What must not be in the machine code, and what must be and is not, in words."""
    found = []
    for x in compiled:
        missing = []
        if x.stack or x.spills:
            missing.append(f"spills ({x.stack} bytes of stack, {x.spills} loads and stores)")
        if x.shared > SHARED_MEMORY[x.arch] * 1024:
            missing.append(f"takes {x.shared} bytes of shared memory, more than {SHARED_MEMORY[x.arch]} KiB")
        if not x.wide_loads:
            missing.append("has no 16-byte load")
        attends = x.kernel in ("prefill_kernel", "split_kernel") and x.dtype != "float32" and x.arch >= 80
        if attends and not x.matrix:
            missing.append("has no matrix instruction")
        if attends and not x.asynchronous:
            missing.append("has no asynchronous copy")
        name = f"{x.kernel} {x.variant} sm_{x.arch} {x.dtype} head_dim {x.head_dim} {x.config}"
        found += [f"{name} {what}" for what in missing]
    return found


def markdown(compiled: list[Compiled]) -> str:
    """The table: of a kernel's forms the most registers, spills and memory, and the fewest of the instructions."""
    lines = [
        "| kernel | sm | head_dim | dtype | warps x stages | tile | registers | spills | shared, KiB "
        "| matrix | async | 16 B loads | timed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    forms: dict[tuple[object, ...], list[Compiled]] = {}
    for x in compiled:
        forms.setdefault((x.kernel, x.arch, x.head_dim, x.dtype, x.config), []).append(x)
    for group in forms.values():
        x = group[0]
        tile = " x ".join(str(size) for size in (x.config.block_m, x.config.block_n) if size)
        registers, spills, shared = (max(getattr(y, n) for y in group) for n in ("registers", "spills", "shared"))
        matrix, copies, wide = (min(getattr(y, n) for y in group) for n in ("matrix", "asynchronous", "wide_loads"))
        lines.append(
            f"| {x.kernel.removesuffix('_kernel')} | {x.arch} | {x.head_dim} | {x.dtype} "
            f"| {x.config.warps} x {x.config.stages} | {tile} | {registers} | {spills} | {shared / 1024:.1f} "
            f"| {matrix} | {copies} | {wide} | {x.measured or 'no'} |"
        )
    return "\n".join(lines)


def with_table(readme: str, compiled: list[Compiled]) -> str:
    """`readme` with the table between its marks made anew."""
    import triton

    head, _, rest = readme.partition(START)
    return f"{head}{START}\nBy triton {triton.__version__}.\n\n{markdown(compiled)}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, help="end with 1 where the code is wrong or this README is out of date")
    parser.add_argument("--write", type=Path, help="rewrite this README's table")
    args = parser.parse_args()
    compiled = report()
    wrong = problems(compiled)
    if args.write:
        args.write.write_text(with_table(args.write.read_text(), compiled))
    elif args.check and args.check.read_text() != with_table(args.check.read_text(), compiled):
        wrong.append(f"{args.check} is out of date: run `make kernels-readme`")
    else:
        print(markdown(compiled))
    print(*wrong, sep="\n", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
