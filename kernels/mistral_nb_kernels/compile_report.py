"""Compiles every config of the table for its architecture, without a GPU, and reads what the machine code uses.

`python -m mistral_nb_kernels.compile_report` prints the table and ends with 1 where a kernel spills, takes more shared
memory than its architecture has, or lacks an instruction that it is there for. What is compiled is what is
launched: the wrappers themselves run up to the launch, on CPU tensors (`launches`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import gc
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from mistral_nb_kernels.configs import Config, Row, read
from mistral_nb_kernels.launches import FIXED, FORMS, HALF, MATRIX, ORDERS
from mistral_nb_kernels.machine_code import SHARED_MEMORY, Code, compiling, read_code

__all__ = ["Compiled", "markdown", "problems", "report", "with_table"]

START, END = "<!-- compiled -->", "<!-- /compiled -->"

ASYNCHRONOUS = ("LDGSTS", "UTMALDG", "UBLKCP")
"""Copies from global to shared memory that need no registers: cp.async, and the bulk ones."""
MEMORY = ("BAR", "MEMBAR", "LDG", "STG", "ATOMG", "RED", "CCTL", *ASYNCHRONOUS)
"""Barriers of a program's threads and of memory, and accesses of device memory."""
PLAIN = re.compile(r"^(BAR|LDG|LDGSTS|STG)\b.*")
"""Of these no more than the name."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel's machine code. `spills` are loads and stores of local memory; `stack` and `shared` in bytes."""

    kernel: str
    arch: int
    width: int
    bits: int
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
    memory: str
    """Barriers and accesses of device memory, one after another."""


def report(rows: tuple[Row, ...] | None = None, workers: int | None = None) -> list[Compiled]:
    """Every kernel of `rows` (the shipped table), compiled in processes of their own; 16 bits is bf16, fp16 on 7.5.

    fp16 too for the ops of `HALF`.
    """
    rows = read() if rows is None else rows
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count() or 1, context, _seldom_collect) as pool:
        built = [each for launched in pool.map(_compile_row, rows) for each in launched]
        places: dict[int, list[int]] = {}
        for place, each in enumerate(built):
            places.setdefault(each.row.arch, []).append(place)
        batches = [[built[place] for place in those] for those in places.values()]
        found = zip(places.values(), pool.map(_read, batches), strict=True)
        compiled = {place: x for those, read_ones in found for place, x in zip(those, read_ones, strict=True)}
    return [compiled[place] for place in range(len(built))]


def _seldom_collect() -> None:
    """Triton makes a kernel of many small objects: looking for garbage among them takes a tenth of compiling it."""
    gc.freeze()
    gc.set_threshold(500_000, 20, 100)


@dataclass(frozen=True, slots=True)
class _Built:
    """A form of a row, compiled."""

    row: Row
    dtype: str
    variant: str
    kernel: str
    warps: int
    shared: int
    cubin: bytes


def _compile_row(row: Row) -> list[_Built]:
    torch.set_num_threads(1)
    dtype = torch.float32 if row.bits == 32 else torch.float16 if row.arch < 80 else torch.bfloat16
    also = [torch.float16] if row.op in HALF and dtype == torch.bfloat16 else []
    forms = ((each, *form) for each in (dtype, *also) for form in FORMS[row.op](row, each))
    found = []
    for dtype, variant, launch in forms:
        with compiling(row.arch) as kernels:
            launch()
        name = str(dtype).removeprefix("torch.")
        for kernel in kernels:
            facts = (kernel.name, kernel.metadata.num_warps, kernel.metadata.shared, kernel.asm["cubin"])
            found.append(_Built(row, name, variant, *facts))
    return found


def _read(built: list[_Built]) -> list[Compiled]:
    """All of one architecture."""
    codes = read_code(built[0].row.arch, [each.cubin for each in built])
    return [_counted(each, code) for each, code in zip(built, codes, strict=True)]


def _counted(built: _Built, code: Code) -> Compiled:
    row = built.row
    return Compiled(
        kernel=built.kernel,
        arch=row.arch,
        width=row.width,
        bits=row.bits,
        dtype=built.dtype,
        variant=built.variant,
        config=row.config if built.kernel not in FIXED else Config(built.warps),
        measured=row.measured,
        registers=code.registers,
        stack=code.stack,
        spills=code.count("LDL", "STL"),
        shared=built.shared,
        matrix=code.count(MATRIX.get(built.kernel, {}).get(row.arch, "HMMA")),
        asynchronous=code.count(*ASYNCHRONOUS),
        wide_loads=code.count("LDG", "LDGSTS", wide=True) + code.count(*ASYNCHRONOUS[1:]),
        memory=" ".join(PLAIN.sub(r"\1", name) for name in code.operations if name.split(".")[0] in MEMORY),
    )


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
        multiplies = x.kernel in MATRIX and x.dtype != "float32" and x.arch >= 80
        if multiplies and not x.matrix:
            missing.append("has no matrix instruction")
        if multiplies and not x.asynchronous:
            missing.append("has no asynchronous copy")
        for order in ORDERS:
            if x.kernel == order.kernel and x.variant.startswith(order.form) and not re.search(order.pattern, x.memory):
                missing.append(f"has no {order.what}")
        name = f"{x.kernel} {x.variant} sm_{x.arch} {x.dtype} width {x.width} bits {x.bits} {x.config}"
        found += [f"{name} {what}" for what in missing]
    return found


def markdown(compiled: list[Compiled]) -> str:
    """The table: of a kernel's forms the most registers, spills and memory, and the fewest of the instructions."""
    lines = [
        "| kernel | sm | width | bits | dtype | warps x stages | tile | registers | spills | shared, KiB "
        "| matrix | async | 16 B loads | timed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    forms: dict[tuple[object, ...], list[Compiled]] = {}
    for x in compiled:
        forms.setdefault((x.kernel, x.arch, x.width, x.bits, x.dtype, x.config), []).append(x)
    for group in forms.values():
        x = group[0]
        tile = " x ".join(str(size) for size in (x.config.block_m, x.config.block_n) if size)
        registers, spills, shared = (max(getattr(y, n) for y in group) for n in ("registers", "spills", "shared"))
        matrix, copies, wide = (min(getattr(y, n) for y in group) for n in ("matrix", "asynchronous", "wide_loads"))
        lines.append(
            f"| {x.kernel.removesuffix('_kernel')} | {x.arch} | {x.width} | {x.bits} | {x.dtype} "
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
