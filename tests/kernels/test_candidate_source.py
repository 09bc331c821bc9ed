"""Loading a candidate: what is found in its source, and what is said of a source that cannot be one."""

from __future__ import annotations

import inspect
import os
import time

import pytest
import torch

from mistral_nb_kernels import Ops
from mistral_nb_kernels.bench.candidate import OPS, CandidateError, load, named
from mistral_nb_kernels.bench.candidate.source import own_lines, said
from tests.kernels.candidates import TORCH, TRITON

NORM = "def {}(x, weight, eps):\n    return x\n"


def test_every_op_may_have_one() -> None:
    assert set(OPS) == set(Ops.__dataclass_fields__) - {"choices"} == set(TORCH)


def test_words_for_an_op() -> None:
    assert [named(op) for op in ("attention", "rope", "norm", "sample")] == [
        *("prefill_attention", "rope_write", "add_rms_norm", "sample")
    ]
    with pytest.raises(CandidateError, match="lora_shrink and lora_expand"):
        named("lora")
    with pytest.raises(CandidateError, match=r"swiglo is no op: did you mean swiglu\? The ops are rope_write, "):
        named("swiglo")
    with pytest.raises(CandidateError, match="zzz is no op: The ops are"):
        named("zzz")


@pytest.mark.parametrize(
    "text",
    [
        NORM.format("rms_norm") + NORM.format("other"),
        NORM.format("other"),
        NORM.format("_helper") + NORM.format("other"),
        "import functools\n" + NORM.format("_own") + "rms_norm = functools.partial(_own)",
        "from mistral_nb_kernels.reference import rms_norm",
        "from math import *\n" + NORM.format("other"),
        "def rms_norm(*given, **how):\n    return given[0]",
        "def rms_norm(a, b, c, fast=True):\n    return a",
    ],
)
def test_the_function_of_its_name_else_the_only_one(text: str) -> None:
    x = torch.ones(1, 1)
    candidate = load(text, "rms_norm")
    assert torch.allclose(candidate.function(x, x[0], 1e-12), x)
    assert not candidate.triton


def test_a_function_may_have_the_word_s_name() -> None:
    text = "def norm(x, residual, weight, eps):\n    return x, x\n" + NORM.format("first")
    assert load(text, "norm").name == "norm"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", r"defines no function: define rms_norm\(x, weight, eps\)"),
        (NORM.format("one") + NORM.format("two"), "defines one, two: name the one to measure rms_norm"),
        ("def rms_norm(x, weight):\n    return x", r"rms_norm\(x, weight\) does not take .*too many positional"),
        ("def rms_norm(x, weight, eps, block):\n    return x", "does not take .*missing a required argument: 'block'"),
        ("\nimport torch\n1 / 0", "as it is defined: ZeroDivisionError: division by zero\n  line 3, "),
        ("def f(x):\n    return y\nf(1)", "(?s)name 'y' is not defined; a candidate runs in a process.*line 2, in f"),
        ("raise SystemExit(3)", "as it is defined: SystemExit: 3"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("def f(:\n    pass", r"no Python: line 1: invalid syntax\n    def f\(:\n          \^"),
        ("\n%timeit f()", "line 2: (?s:.*)no magics"),
        ("!pip install x", "no magics and no shell commands"),
        ("x = '\0'", "no Python: "),
    ],
)
def test_what_is_no_candidate_is_told(text: str, words: str) -> None:
    with pytest.raises(CandidateError, match=words):
        load(text, "rms_norm")


def test_keywords_have_their_names() -> None:
    with pytest.raises(CandidateError, match=r"lora_shrink\(x, lora, slots, scale, \*, norm=None\)"):
        load("def lora_shrink(x, lora, slots, scale):\n    return x", "lora_shrink")


def test_its_source_and_its_lines_are_found() -> None:
    candidates = [load(f"\n\ndef rms_norm(x, weight, eps):\n    return x.foo{n}()\n", "rms_norm") for n in range(2)]
    for n, candidate in enumerate(candidates):
        assert inspect.getsource(candidate.function).endswith(f"foo{n}()\n")
        with pytest.raises(AttributeError) as error:
            candidate.function(1, 2, 3)
        assert own_lines(error.value) == f"  line 4, in rms_norm\n    return x.foo{n}()"
        assert said(error.value) == f"AttributeError: 'int' object has no attribute 'foo{n}'"


def test_a_dataclass_in_it_works() -> None:
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
    )
    assert load(text + NORM.format("rms_norm"), "rms_norm").name == "rms_norm"


def test_what_launches_kernels_is_known() -> None:
    pytest.importorskip("triton")
    assert load(TRITON["swiglu"], "swiglu").triton
    for text in (
        "from mistral_nb_kernels.swiglu import swiglu as ours\ndef swiglu(x):\n    return ours(x)",
        "import mistral_nb_kernels.swiglu as ours\ndef swiglu(x):\n    return ours.swiglu(x)",
        "import functools\nfrom mistral_nb_kernels.swiglu import swiglu\nswiglu = functools.partial(swiglu, config=1)",
        "def swiglu(x):\n    import triton\n    return x",
    ):
        assert load(text, "swiglu").triton, text
    for op, text in TORCH.items():
        assert not load(text, op).triton, op


def test_a_kernel_is_not_what_launches_it() -> None:
    pytest.importorskip("triton")
    text = "import triton\n@triton.jit\ndef swiglu(x, out):\n    pass"
    with pytest.raises(CandidateError, match="swiglu is a kernel: define a function of that name"):
        load(text, "swiglu")


def test_it_is_interpreted_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    load(NORM.format("f"), "rms_norm")
    assert "TRITON_INTERPRET" not in os.environ
    load("import os\nassert os.environ['TRITON_INTERPRET'] == '1'\n" + NORM.format("f"), "rms_norm", interpret=True)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("torch.nn.functional.silu = lambda x: x", "torch.nn.functional.silu"),
        ("import time; time.perf_counter_ns = lambda: 0", "time.perf_counter_ns"),
        ("torch.Tensor.float = lambda x: x", "torch.Tensor.float"),
        ("import mistral_nb_kernels.reference as r; r.swiglu = lambda x: x", "mistral_nb_kernels.reference.swiglu"),
    ],
)
def test_what_it_is_judged_by_stays(line: str, name: str) -> None:
    before = torch.nn.functional.silu, torch.Tensor.float, time.perf_counter_ns
    with pytest.raises(CandidateError, match=f"replaces {name}, which it is judged by"):
        load(f"import torch\n{line}\n" + NORM.format("f"), "rms_norm")
    assert before == (torch.nn.functional.silu, torch.Tensor.float, time.perf_counter_ns)


def test_settings_of_torch_are_put_back() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    text = f"import torch\ntorch.set_num_threads({before[0] + 1})\ntorch.set_float32_matmul_precision('medium')\n"
    candidate = load(text + NORM.format("f"), "rms_norm")
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    assert candidate.notes == (
        "The candidate calls torch.set_num_threads, for everybody: that was put back.",
        "The candidate calls torch.set_float32_matmul_precision, for everybody: that was put back.",
    )
