"""The compile report: what it reads from machine code, and that it finds what is wrong."""

from __future__ import annotations

import dataclasses
import re

import pytest

from mistral_nb_kernels.configs import Config, Row

compile_report = pytest.importorskip("mistral_nb_kernels.compile_report")


@pytest.mark.usefixtures("compiling")
def test_two_configs_compiled_and_read() -> None:
    """One that is as it must be, and one of a single warp: too few registers, and wgmma takes four."""
    good, bad = (Config(warps, stages=3, block_m=128, block_n=64) for warps in (8, 1))
    compiled = compile_report.report(tuple(Row("prefill_attention", 90, 64, 16, c) for c in (good, bad)), workers=2)
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


@pytest.mark.usefixtures("compiling")
def test_the_order_that_the_one_launch_of_decode_needs() -> None:
    """Neither the interpreter nor, but by chance, a result on a GPU shows that a barrier is missing."""
    config = Config(warps=4, stages=3, block_n=32, split=256)
    compiled = compile_report.report((Row("decode_attention", 90, 64, 16, config),), workers=1)
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
