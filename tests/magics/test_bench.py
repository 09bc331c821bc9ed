"""%mistral_bench in a real kernel, with the real child on the CPU: it fills, stops, compares and fails as it should."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from tests.magics.kernels import Kernel, Output, Run

BAR = re.compile(r"Kernels  +(?P<percent>\d+)%  (?P<bar>[█░]{20})  (?P<done>\d+) of (?P<total>\d+)")
SMALL = "--device cpu --dtype fp32 --providers eager"
WITHOUT_PANDAS = "import sys; sys.modules['pandas'] = None"


@pytest.fixture(scope="module")
def kernel(own_settings: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One for all tests of the module, in a folder of its own and without pandas."""
    with closing(Kernel()) as kernel:
        folder = tmp_path_factory.mktemp("bench")
        prepared = kernel.run(f"import os; os.chdir({str(folder)!r}); {WITHOUT_PANDAS}\n%load_ext mistral_nb")
        assert prepared.status == "ok"
        yield kernel


@pytest.fixture(scope="module")
def measured(kernel: Kernel) -> Run:
    return kernel.run(f"%mistral_bench norm swiglu {SMALL} --seq 16 64 --batch 1 --save here.json -o rows")


def has(output: Output, kind: str) -> bool:
    return kind in output.content.get("data", {})


def error_of(run: Run) -> str:
    return f"{run.reply['ename']}: {run.reply['evalue']}"


def test_the_bar_counts_and_the_table_fills(measured: Run) -> None:
    assert measured.status == "ok"
    found = [match for match in (BAR.match(each.plain) for each in measured.displays) if match]
    done = [int(each["done"]) for each in found]
    assert len(set(done)) >= 3
    assert done == sorted(done)
    assert all(each["bar"].count("█") == 20 * int(each["done"]) // int(each["total"]) for each in found)
    tables = [each for each in measured.displays if "|---" in each.markdown.replace(" ", "").replace(":", "")]
    assert len({each.content["transient"]["display_id"] for each in tables}) == 1
    lengths = [len(each.plain.splitlines()) for each in tables]
    assert lengths[0] < lengths[-1]
    for one in (found, tables):
        assert len(one) < 4 + 5 * (measured.displays[-1].sent - measured.displays[0].sent)


def test_what_is_saved_is_a_line_the_table_and_two_pictures(measured: Run) -> None:
    line, table, *figures = measured.saved
    assert re.fullmatch(r"Kernels: done in \d+ s; saved in here\.json", line.plain)
    for told in ("rms_norm", "swiglu", "eager", "fp32"):
        assert told in table.markdown.replace("\\", "")
        assert told in table.plain
    pictures = [each.content for each in figures if has(each, "image/png")]
    assert len(pictures) == 2
    for content in pictures:
        assert base64.b64decode(content["data"]["image/png"]).startswith(b"\x89PNG")
        assert len(content["data"]["text/plain"]) > 20
        assert content["metadata"]["image/png"]["alt"] == content["data"]["text/plain"]
    assert not [each for each in measured.outputs if each.kind == "execute_result"]


def test_the_value_is_tidy_rows(kernel: Kernel, measured: Run) -> None:
    asked = "import json; print(json.dumps([type(rows).__name__, rows, rows.code, _ is rows]))"
    kind, rows, code, last = json.loads(kernel.run(asked).printed)
    assert (kind, code, last) == ("Rows", {}, True)
    assert {"op", "case", "dtype", "provider", "us", "p20", "p80", "gbs", "tflops", "share", "times_ours"} <= set(
        rows[0]
    )
    assert {row["op"] for row in rows} == {"add_rms_norm", "swiglu"}
    shown = kernel.run("rows[:1]").outputs
    assert [each.kind for each in shown] == ["execute_result"]


def test_saved_results_show_the_same_again_and_are_a_frame_where_pandas_is(kernel: Kernel, measured: Run) -> None:
    pytest.importorskip("pandas")
    try:
        kernel.run("del sys.modules['pandas']")
        opened = kernel.run("%mistral_bench --open here.json --compare here.json -o frame")
        assert opened.status == "ok", error_of(opened)
        assert not [each for each in opened.outputs if each.kind == "execute_result"]
        pictures = [[each.plain for each in run.saved if has(each, "image/png")] for run in (measured, opened)]
        assert pictures[0] == pictures[1]
        assert measured.saved[1].plain in [each.plain for each in opened.saved]
        assert opened.saved[-1].plain.startswith("No regression.")
        asked = "print(type(frame).__name__, len(frame) == len(rows), frame.code, _ is frame)"
        assert kernel.run(asked).printed == "DataFrame True {} True\n"
        (shown,) = kernel.run("frame.head(1)").outputs
        assert has(shown, "text/html")
    finally:
        kernel.run(WITHOUT_PANDAS)


def test_capture_keeps_a_table_and_the_pictures(kernel: Kernel, measured: Run) -> None:
    result = kernel.run("%%capture caught\n%mistral_bench --open here.json --plot pictures")
    assert result.status == "ok", error_of(result)
    kept = kernel.run("print([sorted(each.data) for each in caught.outputs if each.data])").printed.strip()
    files = kernel.run("print(sorted(os.listdir('pictures')))").printed.strip()
    text, picture = ["text/markdown", "text/plain"], ["image/png", "text/plain"]
    assert kept == str([text, picture, picture, text])
    assert files == "['roofline.png', 'speed.png']"


def test_an_interrupt_keeps_what_was_measured(kernel: Kernel) -> None:
    sent: list[Any] = []

    def watch(output: Output) -> None:
        found = BAR.match(output.plain)
        if found and int(found["done"]) >= 2 and not sent:
            sent.append(kernel.interrupt())

    result = kernel.run(f"%mistral_bench norm linear {SMALL} --save half.json -o half", watch)
    assert sent
    assert error_of(result) == "KeyboardInterrupt: stopped"
    assert len(result.reply["traceback"]) == 1
    line, table, *rest = result.saved
    assert re.fullmatch(r"■ stopped here: \d+ of \d+ steps in \d+ s; saved in half\.json", line.plain)
    assert any(has(each, "image/png") for each in rest)
    asked = "import json, pathlib; file = json.loads(pathlib.Path('half.json').read_text())"
    half, complete = json.loads(kernel.run(f"{asked}\nprint(json.dumps([half, file['complete']]))").printed)
    assert half
    assert complete is False
    assert all(row["op"] in table.plain for row in half)
    assert kernel.run("1 + 1").status == "ok"


def test_what_the_child_refuses_is_a_usage_error(kernel: Kernel) -> None:
    result = kernel.run("%mistral_bench nrom")
    assert error_of(result).startswith("UsageError: ")
    assert "did you mean norm?" in result.reply["evalue"]
    assert "usage:" not in result.reply["evalue"]
    assert "".join(each.plain for each in result.saved).strip() == ""
