"""Kernels compiled for an architecture without a GPU, and what their machine code consists of.

A disassembler takes some tenths of a second to start and next to nothing for a kernel: it is started once for all
kernels of an architecture, on their code laid end to end.
"""

from __future__ import annotations

import contextlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

__all__ = ["INSTRUCTION", "SHARED_MEMORY", "Code", "compiling", "listing", "read_code"]

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB that a block may have, by compute capability (CUDA programming guide, compute capabilities)."""
INSTRUCTION = 16
"""Bytes of one, from compute capability 7.0 on."""
OPERATION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
"""A line of a listing: its address, perhaps a predicate, the operation with its modifiers."""
EXECUTABLE = 4
"""The flag of an ELF section that holds instructions."""


@dataclass(frozen=True, slots=True)
class Code:
    """A kernel's machine code: registers of a thread, bytes of its stack, operations with their modifiers in order."""

    registers: int
    stack: int
    operations: tuple[str, ...]

    def count(self, *names: str, wide: bool = False) -> int:
        """How many operations have one of these names; if `wide`, of those of 16 bytes."""
        return sum(each.split(".")[0] in names and (not wide or "128" in each) for each in self.operations)


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[Any]]:
    """Launches compile for `arch` and stop there; the list gets what was compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run, active = JITFunction.run, driver._active

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
        driver.set_active(active)


def read_code(arch: int, cubins: Sequence[bytes]) -> list[Code]:
    """Resources and operations of each of them, all for one architecture, by the tools that come with triton.

    Raises ValueError where the disassembler finds another number of instructions than there are.
    """
    from triton import knobs

    different = dict.fromkeys(cubins)
    sizes = [len(_instructions(cubin)) // INSTRUCTION for cubin in different]
    name = f"SM{arch}{'a' if arch >= 90 else ''}"
    said = _run(knobs.nvidia.nvdisasm.path, "-b", name, image=b"".join(map(_instructions, different)))
    operations = OPERATION.findall(said)
    if len(operations) != sum(sizes):
        raise ValueError(f"nvdisasm lists {len(operations)} instructions for {name} where there are {sum(sizes)}")
    codes, start = {}, 0
    for cubin, size in zip(different, sizes, strict=True):
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", image=cubin)
        numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
        codes[cubin] = Code(int(numbers["REG"]), int(numbers["STACK"]), tuple(operations[start : start + size]))
        start += size
    return [codes[cubin] for cubin in cubins]


def listing(cubin: bytes) -> str:
    """The machine code as text, with labels where branches lead."""
    from triton import knobs

    return _run(knobs.nvidia.nvdisasm.path, "--print-code", image=cubin)


def _run(*command: str, image: bytes) -> str:
    with tempfile.NamedTemporaryFile() as file:
        file.write(image)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def _instructions(cubin: bytes) -> bytes:
    """What its executable sections hold (ELF of 64 bits, whose table of sections is anywhere)."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    each, count = struct.unpack_from("<HH", cubin, 0x3A)
    headers = (struct.unpack_from("<IIQQQQ", cubin, table + each * index) for index in range(count))
    return b"".join(cubin[offset : offset + size] for _, _, flags, _, offset, size in headers if flags & EXECUTABLE)
