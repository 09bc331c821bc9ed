"""A candidate compiled ahead of time: what is read from its machine code, of which launches, and what is refused."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from mistral_nb_kernels.bench.candidate import compiled as ahead
from mistral_nb_kernels.bench.candidate.compiled import CompiledKernel
from mistral_nb_kernels.bench.candidate.source import CandidateError, load
from mistral_nb_kernels.bench.subject import Asked
from mistral_nb_kernels.machine_code import Code
from tests.kernels.candidates import AUTOTUNED, TRITON

SWIGLU = TRITON["swiglu"]
PLAIN = "def swiglu(gate_up):\n    gate, up = gate_up.chunk(2, -1)\n    return gate * gate.sigmoid() * up\n"
UNCOMPILABLE = SWIGLU.replace("tl.sigmoid(gate)", "tl.sigmoit(gate)")
GPU_ONLY = SWIGLU.replace("_swiglu[", "assert gate_up.is_cuda, 'on a GPU only'\n    _swiglu[")


def compile_text(text: str, *archs: int, asked: Asked | None = None) -> list[CompiledKernel]:
    return ahead.compiled(load(text, "swiglu"), "swiglu", archs, asked)


def refused(text: str) -> str:
    with pytest.raises(CandidateError) as error:
        compile_text(text, 90)
    return str(error.value)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Any]:
    """A process that compiles: this one interprets."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *given, **how: pool.submit(function, *given, **how).result()


@pytest.mark.usefixtures("compiling")
def test_what_it_takes_and_its_instructions(elsewhere: Any) -> None:
    turing, hopper = elsewhere(compile_text, SWIGLU, 75, 90)
    for kernel, name in ((turing, "sm_75"), (hopper, "sm_90")):
        assert (kernel.kernel, kernel.name, kernel.warps) == ("_swiglu", name, 4)
        assert 16 <= kernel.registers <= 64
        assert (kernel.stack, kernel.spills, kernel.shared) == (0, 0, 0)
        assert kernel.mix["global loads"] >= 2
        assert kernel.mix["global stores"] >= 1
        assert kernel.mix["special functions"] >= 8
        assert {"fp32", "integer", "control", "moves"} <= set(kernel.mix)
        assert "spills" not in kernel.mix
        assert f".target {name}" in kernel.ptx
        assert kernel.sass.count("STG") == kernel.mix["global stores"]
        assert "EXIT" in kernel.sass


@pytest.mark.usefixtures("compiling")
def test_every_config_of_an_autotuned_kernel(elsewhere: Any) -> None:
    found = elsewhere(compile_text, AUTOTUNED, 90)
    assert [(kernel.kernel, kernel.warps) for kernel in found] == [("_swiglu", 4), ("_swiglu [2]", 8)]


@pytest.mark.usefixtures("compiling")
def test_every_type_that_is_asked_for(elsewhere: Any) -> None:
    found = elsewhere(compile_text, SWIGLU, 90, asked=Asked(dtypes=(torch.float16, torch.float32), batch=(2,)))
    assert [kernel.kernel for kernel in found] == ["_swiglu fp16", "_swiglu fp32"]
    assert ["ld.global.v4" in kernel.ptx for kernel in found] == [True, True]
    assert found[0].mix.get("conversions", 0) > found[1].mix.get("conversions", 0) == 0


@pytest.mark.usefixtures("compiling")
def test_what_cannot_be_compiled_says_why(elsewhere: Any) -> None:
    assert elsewhere(refused, PLAIN) == "swiglu launches no Triton kernel: there is nothing to compile for sm_90"
    start = "swiglu could not be compiled for sm_90, where its arguments are CPU tensors: "
    wrong = elsewhere(refused, UNCOMPILABLE)
    assert wrong.startswith(start + "CompilationError")
    assert "has no attribute 'sigmoit'" in wrong
    assert "tl.sigmoit(gate)" in wrong
    only = elsewhere(refused, GPU_ONLY)
    assert only.startswith(start + "AssertionError: on a GPU only\n")
    assert "in swiglu\n    assert gate_up.is_cuda" in only


def test_nothing_is_compiled_where_everything_is_interpreted() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        compile_text(SWIGLU, 90)


def test_instructions_by_class() -> None:
    named = {
        "matrix": "HMMA.16816.F32.BF16 HGMMA.64x64x16.F32 UTCHMMA IMMA.16816.S8.S8 QMMA.16832.F32",
        "async copies": "LDGSTS.E.BYPASS.128 UTMALDG.2D",
        "global loads": "LDG.E.128 LD.E",
        "global stores": "STG.E",
        "atomics": "ATOMG.E.ADD.STRONG.GPU RED.E.ADD",
        "shared memory": "LDS.128 LDSM.16.M88.4 STS STTM.x32",
        "spills": "LDL.64 STL",
        "special functions": "MUFU.EX2",
        "conversions": "F2FP.BF16.PACK_AB I2F.S8 HADD2.F32 F2I.FTZ.U32.TRUNC.NTZ UI2F",
        "fp32": "FFMA.FTZ FADD FMNMX3 FFMA2 UFSETP.GT.AND",
        "fp16": "HADD2 HFMA2.BF16_V2 HFMA2_MMA",
        "fp64": "DMUL",
        "warp": "SHFL.BFLY REDUX.SUM VOTEU.ANY",
        "moves": "IMAD.MOV.U32 MOV ULDC.64 S2R CS2R.32 PRMT",
        "integer": "IMAD.WIDE.U32 IADD3 UIADD3 LOP3.LUT ISETP.GE.AND ULEA SHF.R.U32.HI VIADDMNMX",
        "barriers": "BAR.SYNC.DEFER_BLOCKING DEPBAR.LE LDGDEPBAR SYNCS.PHASECHK WARPSYNC.ALL MEMBAR.SC.GPU",
        "control": "BRA.U EXIT BSSY",
        "other": "FROBNICATE.X",
    }
    assert list(named) == [*ahead.CLASSES, "other"]
    operations = " ".join(named.values()) + " NOP NOP"
    mix = ahead._mix(Code(1, 0, tuple(operations.split())))
    assert mix == {name: len(each.split()) for name, each in named.items()}


def test_the_report_is_a_table_of_resources_and_one_of_instructions() -> None:
    small = CompiledKernel("_a", 90, 4, 32, 0, 0, 1024, {"fp32": 8, "control": 2}, "", "")
    large = CompiledKernel("b", 86, 8, 255, 16, 12, 100 * 1024, {"matrix": 64, "spills": 12}, "", "")
    assert ahead.report([small, large], markdown=False).splitlines() == [
        "kernel   arch  warps  registers  stack, B  spills  shared, KiB",
        "_a      sm_90      4         32         0       0          1.0",
        "b       sm_86      8        255        16      12        100.0",
        "",
        "instructions  _a sm_90  b sm_86",
        "matrix               0       64",
        "spills               0       12",
        "fp32                 8        0",
        "control              2        0",
        "",
        "b takes 100.0 KiB of shared memory and cannot be launched on sm_86, where a block has 99 KiB.",
    ]
    assert ahead.report([small], markdown=True).splitlines() == [
        "| kernel | arch | warps | registers | stack, B | spills | shared, KiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        r"| \_a | sm\_90 | 4 | 32 | 0 | 0 | 1.0 |",
        "",
        r"| instructions | \_a sm\_90 |",
        "| --- | ---: |",
        "| fp32 | 8 |",
        "| control | 2 |",
    ]
