"""The kernel bench's record: its file, what is worked out from it, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_nb_kernels.bench.record import Skipped, dtype_name, read, write
from mistral_nb_kernels.bench.table import digits, plain, table
from tests.kernels.bench_records import ABSENT, CEILINGS, MACHINE, ROW, record, row, sweep


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    whole = record([row(us=1 / 3, partial="no norm"), row("eager", shape={"tokens": 3})], complete=False)
    whole = replace(whole, machine={**MACHINE, "driver": None}, ceilings=replace(CEILINGS, spec_gbs=None))
    path = tmp_path / "not" / "there" / "bench.json"
    write(whole, path)
    assert read(path) == whole
    assert [each.name for each in path.parent.iterdir()] == ["bench.json"]
    empty = record((), skipped=(), notes=())
    write(empty, path)
    assert read(path) == empty


def test_a_file_has_a_line_for_each_row(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write(record([row(), row("eager")]), path)
    lines = path.read_text().splitlines()
    assert [json.loads(line.rstrip(","))["provider"] for line in lines if line.startswith("  {")] == [
        "ours",
        "eager",
        "liger",
    ]
    assert json.loads(path.read_text())["schema"] == 1


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    write(record(), path)
    before = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(
            ValueError, match=r"bench\.json cannot be written \(No space left on device\); save .* else"
        ):
            write(record([row(us=3.0)]), path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write(record([row(us=float("nan"))]), path)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["bench.json"]


def test_a_file_is_put_nowhere_but_in_place_of_a_file(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match="is not a file; save the results under another name"):
            write(record(), path)
    (tmp_path / "real.json").touch()
    (tmp_path / "link.json").symlink_to("real.json")
    write(record(), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert read(tmp_path / "real.json") == record()


def without(name: str) -> Callable[[Any], Any]:
    return lambda found: {key: value for key, value in found.items() if key != name}


def with_row(**changed: Any) -> Callable[[Any], Any]:
    return lambda found: {**found, "rows": [found["rows"][0], {**found["rows"][0], "provider": "eager", **changed}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: [], "no result of the kernel bench"),
        (without("schema"), "says no schema; give a file that --save wrote"),
        (lambda found: {**found, "schema": 2}, "schema 2, and this version reads 1; measure again"),
        (without("ceilings"), "ceilings is not there; the file was cut or changed: measure again"),
        (lambda found: {**found, "rows": {}}, "rows is '{}', not a list; measure again"),
        (lambda found: {**found, "rows": [3]}, r"rows\[0\]\.op is not there"),
        (lambda found: {**found, "machine": {}}, "machine is '{}', not a table with a device"),
        (lambda found: {**found, "command": [1]}, "not a list of texts"),
        (lambda found: {**found, "complete": 1}, "complete is '1', not true or false"),
        (lambda found: {**found, "ceilings": {**found["ceilings"], "read_gbs": 0}}, r"ceilings\.read_gbs is '0'"),
        (lambda found: {**found, "ceilings": {**found["ceilings"], "spec_gbs": "x"}}, "a number or null"),
        (lambda found: {**found, "ceilings": {**found["ceilings"], "matmul_tflops": {"bf16": -1}}}, "table of numbers"),
        (lambda found: {**found, "skipped": [{**found["skipped"][0], "kind": "lost"}]}, "one of absent, wrong, failed"),
        (lambda found: {**found, "skipped": [{**found["skipped"][0], "kind": []}]}, "one of absent, wrong, failed"),
        (with_row(us=None), r"rows\[1\]\.us is 'None', not a number above 0"),
        (with_row(us=float("inf")), r"rows\[1\]\.us is 'inf'"),
        (with_row(p80=True), r"rows\[1\]\.p80 is 'True'"),
        (with_row(runs=0), r"rows\[1\]\.runs"),
        (with_row(bytes=0), r"rows\[1\]\.bytes"),
        (with_row(flops=-1), r"rows\[1\]\.flops"),
        (with_row(flops=1.5), r"rows\[1\]\.flops"),
        (with_row(case=None), r"rows\[1\]\.case is 'None', not a text"),
        (with_row(shape={"tokens": [1]}), r"rows\[1\]\.shape"),
        (with_row(provider="ours"), "two rows are linear, qkv, 8 rows, bf16, ours; measure again"),
    ],
)
def test_another_file_is_refused_by_its_name(change: Callable[[Any], Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write(record(), path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1', "\xff", "[" * 100_000])
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bench\.json is no JSON .*; give a file that --save wrote"):
        read(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read \(No such file or directory\); give a file"):
        read(tmp_path / "none.json")


def test_fields_of_a_later_version_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write(record(), path)
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "colour": "red", "rows": [{**found["rows"][0], "watts": 400}]}))
    assert read(path) == record()


def test_types_have_short_names() -> None:
    names = [dtype_name(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8, "bf16")]
    assert names == ["bf16", "fp16", "fp32", "int8", "bf16"]


def test_a_row_is_held_against_the_roof_at_its_intensity() -> None:
    assert (ROW.intensity, ROW.tflops, ROW.gbs) == (8, 4, 500)
    found = [CEILINGS.bound(ROW), CEILINGS.share(ROW), CEILINGS.share_of_spec(ROW)]
    assert found == ["memory", 0.5, 0.25]
    many = replace(ROW, flops=1_000_000_000, us=20.0)
    assert (many.intensity, many.tflops) == (200, 50)
    assert [CEILINGS.bound(many), CEILINGS.share(many), CEILINGS.share_of_spec(many)] == ["compute", 0.5, 0.125]
    wide = replace(many, dtype="fp32")
    assert [CEILINGS.bound(wide), CEILINGS.share(wide), CEILINGS.share_of_spec(wide)] == ["compute", 5, None]
    unknown = replace(many, dtype="fp16")
    assert [CEILINGS.bound(unknown), CEILINGS.share(unknown), CEILINGS.share_of_spec(unknown)] == [None, None, None]
    assert CEILINGS.bound(replace(ROW, flops=0)) == "memory"


def test_tidy_rows_have_the_same_columns() -> None:
    rows = [row(), row("eager", us=25.0), row("eager", us=5.0, op="swiglu", shape={"tokens": 64})]
    ours, eager, other = record(rows).tidy()
    columns = ["op", "case", "layer", "rows", "tokens", "dtype", "provider", "us", "p20", "p80", "tflops", "gbs"]
    assert list(ours) == [*columns, "bound", "share", "share_of_spec", "times_ours", "partial", "timer"]
    assert list(eager) == list(other) == list(ours)
    assert [each["times_ours"] for each in (ours, eager, other)] == [1.0, 2.5, None]
    assert [each["tokens"] for each in (ours, eager, other)] == [None, None, 64]
    assert [each["layer"] for each in (ours, eager, other)] == ["qkv", "qkv", None]
    assert ours["share"] == 0.5
    json.dumps([ours, eager, other], allow_nan=False)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (0.0123456, "0.0123"),
        (1.0, "1.00"),
        (9.876, "9.88"),
        (12.34, "12.3"),
        (123.4, "123"),
        (98765.4, "98765"),
        (0, "0"),
    ],
)
def test_three_digits_count(x: float, words: str) -> None:
    assert digits(x) == words


def test_a_table_in_text() -> None:
    rows = [row(), row("eager", us=25.0), row("cublas", us=8.0, partial="no norm"), row(op="swiglu", us=2.0)]
    lines = table(record(rows)).splitlines()
    assert lines[:6] == [
        "case         provider    us   p20   p80  TFLOP/s  GB/s  of the roof  of the spec  x ours  less work",
        "linear",
        "qkv, 8 rows  ours *    10.0  9.90  10.1     4.00   500   50% memory          25%    1.00",
        "             eager     25.0  24.8  25.2     1.60   200   20% memory          10%    2.50",
        "             cublas    8.00  7.92  8.08     5.00   625   62% memory          31%    0.80  no norm",
        "swiglu",
    ]
    assert lines[6].split()[3:5] == ["ours", "2.00"]
    assert lines[8:10] == ["*: the fastest of those that do the whole op", "liger: not here: not installed"]
    assert lines[11] == (
        "NVIDIA H100 80GB HBM3, driver 550.54, torch 2.11.0, triton 3.6.0, cuda 12.8. Measured ceilings: "
        "reads 1000 GB/s, copies 900 GB/s, multiplies bf16 100, fp32 10.0 TFLOP/s "
        "(data sheet: 2000 GB/s, 400 TFLOP/s). "
        "2026-01-02T03:04:05Z, revision abc1234, mistral-nb bench kernels linear"
    )


def test_columns_that_nobody_fills_are_left_out() -> None:
    cpu = replace(CEILINGS, matmul_tflops={}, spec_gbs=None, spec_tflops=None)
    assert table(record([row("eager")], ceilings=cpu)).splitlines()[0].split() == [
        *("case", "provider", "us", "p20", "p80", "TFLOP/s", "GB/s")
    ]
    assert "dtype" in table(record([row(), row(dtype="fp32")])).splitlines()[0]


def test_the_same_table_in_markdown() -> None:
    rows = list(sweep(dtypes=("bf16", "fp32")))
    text, marked = (table(record(rows), markdown=markdown).splitlines() for markdown in (False, True))
    cells = [[cell.strip().strip("*").replace("\\", "") for cell in line.strip("|").split(" | ")] for line in marked]
    assert marked[1] == "| :--- | :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | :--- |"
    count = len(rows) + 8 + 1
    assert len({line.count("|") for line in marked[: count + 1]}) == 1
    for line, said in zip([text[0], *text[1:count]], [cells[0], *cells[2 : count + 1]], strict=True):
        assert line.replace(" *", "").split() == " ".join(said).replace(" *", "").split()


def test_reasons_are_told_once() -> None:
    skipped = [
        *(replace(ABSENT, op=op, case=str(case)) for op in ("norm", "swiglu") for case in range(9)),
        replace(ABSENT, provider="eager", op="norm", why="no window"),
        *(
            Skipped(op="linear", case=f"{n}", dtype="bf16", provider="int4", kind="failed", why="boom")
            for n in range(3)
        ),
        Skipped(op="linear", case="8", dtype="bf16", provider="compile", kind="wrong", why="off in 3 of 8 rows"),
    ]
    words = table(record([row("eager")], skipped=tuple(skipped)))
    assert words.split("\n\n")[1].splitlines() == [
        "liger: not here: not installed",
        "eager of norm: not here: no window",
        "int4 of linear, 0, bf16 and 2 more: failed: boom",
        "compile of linear, 8, bf16: WRONG, so not timed: off in 3 of 8 rows",
    ]


def test_other_timers_and_an_interrupt_are_told() -> None:
    words = table(record([row(), row("eager"), row("compile", timer="events")], complete=False))
    assert "Timed by events, not graph: compile of linear" in words
    assert "Interrupted: this is what was measured until then." in words
    waited = table(record([row("eager", timer="waited"), row("compile", us=99.0, timer="wall")]))
    assert "Waited for a core that others had: eager of linear" in waited
    assert "Timed by" not in waited
    assert " *" not in waited
    assert "Waited for a core that others had: ours of linear" in table(record([row(timer="waited")]))
    assert table(record((), skipped=())).startswith("Nothing was timed.\n\nNVIDIA")


def test_words_of_others_are_harmless() -> None:
    nasty = "x|y\n\n# <img src=x> `a` *b* \x1b[31m\u202e$c$ [d](e)" + "z" * 1000
    whole = record([row(case=nasty)], skipped=(replace(ABSENT, why=nasty, provider="no\nbody"),))
    text, marked = table(whole), table(whole, markdown=True)
    assert "\x1b" not in text + marked
    assert "\u202e" not in text + marked
    assert max(map(len, text.split("\n\n")[1].splitlines())) < 400
    assert marked.splitlines()[3].startswith(r"| x\|y \# \<img src=x\> \`a\` \*b\* \[31m\$c\$ \[d\](e)zzz")
    assert len(marked.split("\n\n")) == 3
    assert plain("a\tb \n c") == "a b c"
