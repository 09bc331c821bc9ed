"""The compile report: what it reads from machine code, and that it finds what is wrong."""

from __future__ import annotations

import dataclasses
import multiprocessing
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from types import ModuleType
from typing import Any

import pytest

from mistral_nb_kernels import machine_code
from mistral_nb_kernels.configs import Config, Row
from mistral_nb_kernels.machine_code import Code, read_code

compile_report = pytest.importorskip("mistral_nb_kernels.compile_report")


@pytest.fixture(scope="module")
def reported() -> list[Any]:
    """Compiled in processes that are started once: prefill as it must be and of a single warp, and decode."""
    good, bad = Config(8, stages=3, block_m=128, block_n=64), Config(1, stages=3, block_m=64, block_n=64)
    rows = [Row("prefill_attention", 90, 64, 16, config) for config in (good, bad)]
    rows.append(Row("decode_attention", 90, 64, 16, Config(warps=4, stages=3, block_n=32, split=256)))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setitem(sys.modules, "__main__", ModuleType("__main__"))
        return list(compile_report.report(tuple(rows), workers=2))


def test_two_configs_compiled_and_read(reported: list[Any]) -> None:
    """One that is as it must be, and one of a single warp: too few registers, and wgmma takes four."""
    compiled = [x for x in reported if x.kernel == "prefill_kernel"]
    assert [x.variant for x in compiled] == ["", "window"] * 2
    assert compile_report.problems(compiled[:2]) == []
    for x in compiled[:2]:
        assert x.matrix >= 4
        assert x.asynchronous >= 4
        assert 0 < x.registers <= 255
        assert 32 * 1024 <= x.shared <= 227 * 1024
    found = compile_report.problems(compiled[2:])
    assert [sum(word in problem for problem in found) for word in ("spills", "no matrix")] == [2, 2]
    assert "| prefill | 90 | 64 | 16 | bfloat16 | 8 x 3 | 128 x 64 |" in compile_report.markdown(compiled)
    nothing = dataclasses.replace(compiled[0], matrix=0, asynchronous=0, wide_loads=0, shared=228 * 1024)
    assert [problem.split(")", 1)[1].split()[1:3] for problem in compile_report.problems([nothing])] == [
        ["233472", "bytes"],
        ["no", "16-byte"],
        ["no", "matrix"],
        ["no", "asynchronous"],
    ]


def test_the_order_that_the_one_launch_of_decode_needs(reported: list[Any]) -> None:
    """Neither the interpreter nor, but by chance, a result on a GPU shows that a barrier is missing."""
    compiled = [x for x in reported if x.kernel != "prefill_kernel"]
    assert [(x.variant, x.dtype) for x in compiled] == [
        *((variant, "bfloat16") for variant in ("", "RoPE", "RoPE, window")),
        ("RoPE, window", "float16"),
    ]
    assert compile_report.problems(compiled) == []
    without = [dataclasses.replace(x, memory=re.sub("(BAR )+MEMBAR", "MEMBAR", x.memory)) for x in compiled]
    assert [" ".join(problem.split(") ")[1].split()[:3]) for problem in compile_report.problems(without)] == [
        "has no barrier"
    ] * 4
    late = dataclasses.replace(compiled[1], memory=compiled[1].memory.replace("STG BAR", "STG LDG BAR", 1))
    (problem,) = compile_report.problems([late])
    assert problem.endswith("has no barrier between the newest token's stores and the loads")


def read_in_two_ways() -> tuple[list[Code], list[Code], list[str], str]:
    """All of an architecture at once, and each alone; listings; what a disassembler that leaves lines out ends with."""
    cubins = []
    for op, config in (("swiglu", Config(4, block_n=1024)), ("rms_norm", Config(32))):
        cubins += [each.cubin for each in compile_report._compile_row(Row(op, 90, 0, 16, config))]
    together = read_code(90, [*cubins, cubins[0]])
    alone = [code for cubin in (*cubins, cubins[0]) for code in read_code(90, [cubin])]
    listings = [machine_code.listing(cubin) for cubin in (*cubins, cubins[0])]
    run = machine_code._run
    machine_code._run = lambda *command, image: run(*command, image=image).replace("EXIT", "")
    try:
        read_code(90, cubins)
    except ValueError as error:
        return together, alone, listings, str(error)
    return together, alone, listings, ""


@pytest.mark.usefixtures("compiling")
def test_kernels_are_read_together_as_they_are_alone() -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        together, alone, listings, refusal = pool.submit(read_in_two_ways).result()
    assert together == alone
    assert len({len(code.operations) for code in together}) == len(together) - 1 == 3
    for code, text in zip(together, listings, strict=True):
        assert code.count("EXIT") == len(re.findall(r"\bEXIT\b", text)) >= 1
        assert code.count("LDG", "LDGSTS", wide=True) == len(re.findall(r"\bLDG(?:STS)?\.[\w.]*128", text)) >= 1
        assert code.registers > 15
    assert re.fullmatch(r"nvdisasm lists \d+ instructions for SM90a where there are \d+", refusal)


def test_afterwards_the_driver_is_the_one_of_before() -> None:
    """A process that compiled can launch."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    active, run = driver._active, JITFunction.run
    with machine_code.compiling(90):
        assert driver.active.get_current_target().arch == 90
        assert JITFunction.run is not run
    assert driver._active is active
    assert JITFunction.run is run
