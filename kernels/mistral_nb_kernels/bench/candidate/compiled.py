"""What a candidate's kernels become on an architecture, without a GPU: registers, spills, shared memory, instructions.

The candidate's wrapper is called on CPU tensors of the op's engine layout, and its launches compile and stop there:
nothing is written, so that what the wrapper computes from a kernel's result is not to be trusted.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mistral_nb_kernels.bench.candidate.source import Candidate, CandidateError, own_lines, said
from mistral_nb_kernels.bench.candidate.tuned import every_config
from mistral_nb_kernels.bench.record import dtype_name
from mistral_nb_kernels.bench.subject import Asked
from mistral_nb_kernels.machine_code import SHARED_MEMORY, Code, compiling, listing, read_code

__all__ = ["CLASSES", "CompiledKernel", "compiled", "report"]

CLASSES: dict[str, str] = {
    "matrix": r"([HIDBQO]|HG|IG|QG|BG|TC\w)MMA|TC\w*MMA",
    "async copies": "LDGSTS|TMALDG|TMASTG|TMAREDG|BLKCP|BLKRED|TCCP",
    "global loads": "LDG?",
    "global stores": "STG?",
    "atomics": "ATOM[GS]?|REDG?",
    "shared memory": "LDS|LDSM|STS|STSM|LDTM|STTM",
    "spills": "LDL|STL",
    "special functions": "MUFU",
    "conversions": r"(F2FP?|F2IP?|I2FP?|I2IP?|FRND)|HADD2\.F32.*",
    "fp32": r"F(ADD|FMA|MUL|MNMX|SEL|SET|SETP|SWZADD|CHK)[23]?(32I)?",
    "fp16": r"H(ADD|FMA|MUL|MNMX|SET|SETP)2(_32I)?(_MMA)?|FH(ADD|FMA)|VHMNMX",
    "fp64": "D(ADD|FMA|MUL|MNMX|SETP)",
    "warp": "SHFL|C?REDUX|VOTEU?|MATCH",
    "moves": r"MOV|SEL|PRMT|MOVM|P2R|R2P|R2UR|P2UR|S2R|S2UR|CS2R|LDC|LDCU|IMAD\.MOV.*",
    "integer": r"V?I(ADD|ABS|DP|MAD|MUL|MNMX|SETP|SCADD|ADDMNMX)3?(32I)?|LEA|LOP3?(32I)?|P(LOP3|SETP)|SH[FLR]|SGXT"
    "|BMSK|BREV|FLO|POPC|VABSDIFF4?",
    "barriers": "BAR|MEMBAR|(LDG)?DEPBAR|(CGA)?ERRBAR|SYNCS|FENCE|CCTL|TCBAR|TMACCTL|TMACMDFLUSH|CGABAR_.*"
    "|WARP(SYNC|GROUP)|ARRIVES",
    "control": "BRA|BRX|BRXU|BSSY|BSYNC|BREAK|BMOV|BPT|CALL|EXIT|JMP|JMX|RET|YIELD|NANOSLEEP|KILL|ELECT|ACQBULK",
}
"""Classes of instructions, by expressions for their whole names (NVIDIA's binary utilities list them), without the U of
those that all threads of a warp share. The first that fits counts, with the modifiers or without."""
_CLASS = {name: re.compile(f"U?({expression})") for name, expression in CLASSES.items()}
_OTHER = "other"


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """A kernel's machine code for compute capability `arch`; stack and shared memory in bytes.

    spills: loads and stores of local memory; mix: its instructions by class, as they stand in the code, not as often
    as they run. kernel: the function's name, numbered where it is compiled in several forms.
    """

    kernel: str
    arch: int
    warps: int
    registers: int
    stack: int
    spills: int
    shared: int
    mix: Mapping[str, int]
    ptx: str
    sass: str

    @property
    def name(self) -> str:
        """The architecture as it was asked for."""
        return f"sm_{self.arch}"


def compiled(candidate: Candidate, op: str, archs: Sequence[int], asked: Asked | None = None) -> list[CompiledKernel]:
    """What the candidate launches for `op` at the bench's shapes on a CPU, in each architecture's turn.

    asked: types and shapes; by default bf16, and fp16 on 7.5. Of several types a kernel's name says which it is of.
    An autotuned kernel is compiled in each of its configs. `CandidateError` where it launches nothing, does not take
    the tensors, or does not compile.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, and Triton compiles nothing then: unset it")
    asked = asked or Asked()
    found: list[CompiledKernel] = []
    for arch in archs:
        dtypes = asked.dtypes or (torch.bfloat16 if arch >= 80 else torch.float16,)
        for dtype in dtypes:
            how = Asked(ops=(op,), dtypes=(dtype,), seq=asked.seq, batch=asked.batch)
            found += _compiled_for(arch, candidate, op, how, f" {dtype_name(dtype)}" if len(dtypes) > 1 else "")
    return found


def _compiled_for(arch: int, candidate: Candidate, op: str, asked: Asked, of: str) -> Iterator[CompiledKernel]:
    from mistral_nb_kernels.bench.registry import op_points

    with compiling(arch) as launched, every_config(), _in_words(candidate, arch):
        for point in op_points(op, asked, "cpu"):
            point.make("cpu").call(candidate.function)()
    different = list({id(kernel): kernel for kernel in launched}.values())
    if not different:
        raise CandidateError(f"{candidate.name} launches no Triton kernel: there is nothing to compile for sm_{arch}")
    codes = read_code(arch, [kernel.asm["cubin"] for kernel in different])
    seen: Counter[str] = Counter()
    for kernel, code in zip(different, codes, strict=True):
        seen[kernel.name] += 1
        name = kernel.name + of + (f" [{seen[kernel.name]}]" if seen[kernel.name] > 1 else "")
        yield _described(name, arch, kernel, code)


def _described(name: str, arch: int, kernel: Any, code: Code) -> CompiledKernel:
    return CompiledKernel(
        kernel=name,
        arch=arch,
        warps=kernel.metadata.num_warps,
        registers=code.registers,
        stack=code.stack,
        spills=code.count("LDL", "STL"),
        shared=kernel.metadata.shared,
        mix=_mix(code),
        ptx=kernel.asm["ptx"],
        sass=listing(kernel.asm["cubin"]),
    )


def _mix(code: Code) -> dict[str, int]:
    """Instructions by class, in the order of `CLASSES`; those that only fill up the end are left out."""
    counts = Counter(map(_class, code.operations))
    return {name: counts[name] for name in (*CLASSES, _OTHER) if counts[name]}


@functools.cache
def _class(operation: str) -> str:
    plain = operation.split(".")[0]
    if plain == "NOP":
        return ""
    whole = (name for name, names in _CLASS.items() if names.fullmatch(operation) or names.fullmatch(plain))
    return next(whole, _OTHER)


@contextlib.contextmanager
def _in_words(candidate: Candidate, arch: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # somebody else's code, and a compiler's
        where = f"for sm_{arch}, where its arguments are CPU tensors"
        lines = f"{candidate.name} could not be compiled {where}: {said(error)}\n{own_lines(error)}"
        raise CandidateError(lines.rstrip()) from error


def report(kernels: Sequence[CompiledKernel], markdown: bool) -> str:
    """Two tables: what each kernel takes, and its instructions; below, what cannot be launched."""
    takes = [["kernel", "arch", "warps", "registers", "stack, B", "spills", "shared, KiB"]]
    for kernel in kernels:
        numbers = (kernel.warps, kernel.registers, kernel.stack, kernel.spills)
        takes.append([kernel.kernel, kernel.name, *map(str, numbers), f"{kernel.shared / 1024:.1f}"])
    mixes = [["instructions", *(f"{kernel.kernel} {kernel.name}" for kernel in kernels)]]
    for name in (*CLASSES, _OTHER):
        counts = [kernel.mix.get(name, 0) for kernel in kernels]
        if any(counts):
            mixes.append([name, *map(str, counts)])
    refused = [
        f"{kernel.kernel} takes {kernel.shared / 1024:.1f} KiB of shared memory and cannot be launched on "
        f"{kernel.name}, where a block has {SHARED_MEMORY[kernel.arch]} KiB."
        for kernel in kernels
        if kernel.shared > SHARED_MEMORY[kernel.arch] * 1024
    ]
    return "\n\n".join([_lines(takes, markdown), _lines(mixes, markdown), *refused])


def _lines(rows: list[list[str]], markdown: bool) -> str:
    """The first row is the head; but for the first column all is flush right."""
    if markdown:
        marks = ["---", *["---:"] * (len(rows[0]) - 1)]
        cells = [[cell.replace("_", r"\_").replace("|", r"\|") for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in (cells[0], marks, *cells[1:]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )
