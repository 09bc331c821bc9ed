"""Kernels measured in a real JupyterLab: a bar, a table that fills, pictures, and machine code one click away."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from playwright.sync_api import expect

from tests.browser.test_cell import execute, output, wait_done

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from tests.browser.conftest import Lab

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here"),
]

TRITON = """
import triton
import triton.language as tl

@triton.jit
def _swiglu(gate_up, y, hidden, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < hidden
    gate = tl.load(gate_up + row * stride + at, mask=mask).to(tl.float32)
    up = tl.load(gate_up + row * stride + hidden + at, mask=mask).to(tl.float32)
    tl.store(y + row * hidden + at, gate / (1 + tl.exp(-gate)) * up, mask=mask)

def swiglu(gate_up):
    rows, width = gate_up.shape
    y = gate_up.new_empty(rows, width // 2)
    if rows:
        _swiglu[(rows, triton.cdiv(width // 2, 64))](gate_up, y, width // 2, gate_up.stride(0), BLOCK=64)
    return y
"""
WATCH = """cell => {
    window.rows = [];
    window.bars = 0;
    new MutationObserver(() => {
        const count = cell.querySelectorAll('.jp-OutputArea table tr').length;
        if (count !== window.rows.at(-1)) window.rows.push(count);
        for (const bar of cell.querySelectorAll('.jp-OutputArea-output pre'))
            if (/[█░]{20}/.test(bar.textContent) && /mono/i.test(getComputedStyle(bar).fontFamily)) window.bars += 1;
    }).observe(cell, {subtree: true, childList: true, characterData: true});
}"""


def test_it_fills_and_its_code_opens_by_a_click(
    lab: Lab, page: Page, shoot: Callable[[Page | Locator, str], Path]
) -> None:
    cells = [
        "%load_ext mistral_nb",
        "%mistral_bench norm swiglu --device cpu --dtype fp32 --seq 64 512 --batch 1",
        f"%%mistral_kernel swiglu --compile sm_90 --check-only --dtype fp16\n{TRITON.strip()}",
    ]
    page.set_default_timeout(180_000)
    load, measure, compiled = lab.open(page, "bench.ipynb", cells)
    execute(page, load)
    wait_done(load, 1)
    measure.evaluate(WATCH)
    execute(page, measure)
    wait_done(measure, 2)
    grown = page.evaluate("window.rows")
    assert len([count for count in grown if count]) >= 2, grown
    assert grown == sorted(grown)
    assert page.evaluate("window.bars") > 0
    assert "█" not in " ".join(output(measure).all_inner_texts())
    pictures = output(measure).locator("img")
    expect(pictures).to_have_count(2)
    assert all(picture.evaluate("image => image.naturalWidth > 300") for picture in pictures.all())
    shoot(measure, "bench")
    execute(page, compiled)
    wait_done(compiled, 3)
    listing = output(compiled).locator("details", has_text="PTX")
    expect(listing.locator("pre")).to_be_hidden()
    listing.locator("summary").click()
    expect(listing.locator("pre")).to_contain_text(".visible .entry _swiglu")
    shoot(compiled, "compiled")
