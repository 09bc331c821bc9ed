"""%%mistral_kernel in a real kernel, with the real child on the CPU: wrong, broken, stopped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from mistral_nb_magics.bench.surface import LISTINGS, listings
from tests.magics.kernels import Kernel, Output
from tests.magics.test_bench import WITHOUT_PANDAS, error_of, has

TORCH = """
import torch.nn.functional as F

def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
"""
SMALL = "--seq 16 --batch 1 --dtype fp32"


@pytest.fixture(scope="module")
def kernel(own_settings: None) -> Iterator[Kernel]:
    with closing(Kernel()) as kernel:
        assert kernel.run(f"{WITHOUT_PANDAS}\n%load_ext mistral_nb\nhere = 'in the notebook'").status == "ok"
        yield kernel
        assert kernel.run("print(here)").printed == "in the notebook\n", "it is the same kernel as before"


def test_a_wrong_one_fails_the_cell_at_its_first_wrong_element(kernel: Kernel) -> None:
    wrong = TORCH.replace("gate, up =", "print('here', gate_up.shape[0])\n    gate, up =").replace(
        "return F.silu(gate) * up", "y = F.silu(gate) * up\n    y[:, -1] = 0\n    return y"
    )
    result = kernel.run(f"%%mistral_kernel swiglu {SMALL} -o none\n{wrong}")
    assert error_of(result).startswith("MistralError: the candidate is wrong: ")
    assert len(result.reply["traceback"]) == 1
    (shown,) = [each for each in result.saved if "expected" in each.markdown]
    assert re.search(r"> *\[\d+, \d+\] +-?[\d.e-]+ +-?0", shown.plain)
    assert not any(has(each, "image/png") for each in result.outputs)
    assert re.fullmatch(r"(here \d+\n)+", result.printed), "what it prints is shown"
    assert kernel.run("print(none)").printed == "[]\n"


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("def swiglu(gate_up):\n    return here", r"'here' is not defined.*variables are not visible"),
        ("import os, signal\ndef swiglu(gate_up):\n    os.kill(os.getpid(), signal.SIGSEGV)", r"SIGSEGV"),
    ],
)
def test_what_cannot_run_is_an_error_in_words(kernel: Kernel, cell: str, told: str) -> None:
    result = kernel.run(f"%%mistral_kernel swiglu {SMALL}\n{cell}")
    assert result.reply["ename"] == "MistralError", result.outputs
    assert len(result.reply["traceback"]) == 1
    shown = result.reply["evalue"] + "".join(each.plain for each in result.saved)
    assert re.search(told, shown, re.DOTALL), shown


def test_an_interrupt_ends_it(kernel: Kernel) -> None:
    sent: list[Any] = []

    def watch(output: Output) -> None:
        if "% " in output.plain and not sent:
            sent.append(kernel.interrupt())

    result = kernel.run(
        f"%%mistral_kernel swiglu {SMALL}\nimport time\ndef swiglu(gate_up):\n    time.sleep(60)", watch
    )
    assert sent
    assert error_of(result) == "KeyboardInterrupt: stopped"
    assert "■ stopped here" in result.saved[0].plain


def test_text_of_a_candidate_is_not_markup(kernel: Kernel) -> None:
    cell = "def swiglu(gate_up):\n    raise ValueError('<script>alert(1)</script> ![x](http://x.invalid/x.png)')"
    result = kernel.run(f"%%mistral_kernel swiglu {SMALL}\n{cell}")
    assert result.reply["ename"] == "MistralError"
    outside = "".join(re.sub(r"```.*?```", "", each.markdown, flags=re.DOTALL) for each in result.outputs)
    assert "alert" in outside
    assert "<script" not in outside
    assert "![x]" not in outside


def test_listings_are_text_and_a_notebook_keeps_so_much_of_them() -> None:
    code = {(f"_{name}", "sm_90", "ptx"): name * LISTINGS for name in "ab"} | {("<b>", "sm_90", "sass"): "<script>&"}
    bundle = listings(code)
    page = bundle["text/html"]
    assert LISTINGS / 2 < len(page) < LISTINGS + 2000
    assert page.count("... the whole is .code[") == 2
    assert "<b>" not in page
    assert "&lt;script&gt;&amp;" in page
    assert bundle["text/plain"].splitlines()[2] == "<b>, sm_90: SASS, 1 lines: .code['<b>', 'sm_90', 'sass']"
