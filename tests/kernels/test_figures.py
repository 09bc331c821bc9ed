"""The kernel bench's figures: what is drawn where, and that every word on them can be read."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mistral_nb_kernels.bench import figures as module
from mistral_nb_kernels.bench.figures import MissingPlots, figures
from mistral_nb_kernels.bench.marks import OURS, marks
from mistral_nb_kernels.bench.record import Record, Row
from mistral_nb_kernels.bench.registry import SUBJECTS
from mistral_nb_kernels.bench.roofline import _apart, roofline
from tests.kernels.bench_records import CEILINGS, MACHINE, record, row, sweep

matplotlib = pytest.importorskip("matplotlib")

CPU = replace(CEILINGS, matmul_tflops={"fp32": 0.14}, read_gbs=18.0, spec_gbs=None, spec_tflops=None)
EVERYTHING = ("ours", "candidate", "eager", "compile", "sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa math")
OTHERS = ("cublas", "blas", "torch", "torch int8", "torch int4", "liger", "flash-attn", "flashinfer")


def of(rows: Iterable[Row], *ops: str) -> list[Row]:
    return [each for each in rows if each.op in ops]


RECORDS = {
    "one row": record(),
    "one op": record(of(sweep(), "prefill_attention")),
    "one size": record(each for each in of(sweep(), "linear", "sample") if each.shape.get("rows") == 8),
    "eight ops, every provider": record(sweep((*EVERYTHING, *OTHERS))),
    "three types": record(of(sweep(("candidate", "ours", "eager"), ("bf16", "fp32")), "swiglu")),
    "a CPU": record(
        [row("eager", us=900.0, dtype="fp32"), row("compile", us=700.0, dtype="fp32")],
        ceilings=CPU,
        machine={**MACHINE, "device": "Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz, of a name that goes on " * 2},
    ),
    "ceilings of no product": record(
        of(sweep(("ours", "eager")), "linear", "rope_write"), ceilings=replace(CEILINGS, matmul_tflops={})
    ),
    "no FLOPs": record([row(flops=0), row("eager", flops=0)]),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """matplotlib's figures, in the order in which they were made."""
    kept: list[Any] = []
    png = module._png
    monkeypatch.setattr(module, "_png", lambda figure: kept.append(figure) or png(figure))
    return kept


@pytest.mark.parametrize("name", RECORDS)
def test_figures_of_records_of_every_size(name: str, drawn: list[Any]) -> None:
    whole = RECORDS[name]
    before = dict(matplotlib.rcParams)
    found = figures(whole)
    names = [each.name for each in found]
    assert len(set(names)) == len(names)
    assert ("roofline" in names) == (name != "no FLOPs")
    assert all(each.png.startswith(b"\x89PNG\r\n") and len(each.png) < 1_000_000 for each in found)
    assert all(whole.machine["device"].strip() in each.alt for each in found)
    assert dict(matplotlib.rcParams) == before
    for figure in drawn:
        assert overlapping(figure) == []


def overlapping(figure: Any) -> list[tuple[str, str]]:
    """Words that cover each other, but for the names at an angle and the numbers within marks."""
    figure.draw_without_rendering()
    texts = [*figure.texts]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())
            texts += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    assert len(boxes) > 6
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]


def test_a_large_record_has_a_figure_for_each_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_png", lambda figure: b"")
    small, large = (record(rows) for rows in (of(sweep(("ours",)), "linear"), sweep(("ours",))))
    assert [each.name for each in figures(small)] == ["speed", "roofline"]
    ops = list(dict.fromkeys(each.op for each in large.rows))
    assert [each.name for each in figures(large)] == [*(f"speed-{op}" for op in ops), "roofline"]


def test_a_record_without_rows_has_no_figures() -> None:
    assert figures(record(())) == []


def test_without_matplotlib_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPlots, match=r'figures need matplotlib: pip install "mistral-nb\[plots\]"'):
        figures(record())


def test_the_same_record_is_the_same_picture() -> None:
    assert figures(RECORDS["three types"]) == figures(RECORDS["three types"])


def lines_of(axis: Any) -> dict[str, Any]:
    """By colour and dashes, the places and the heights of what is drawn."""
    found = [line for line in axis.get_lines() if len(line.get_xdata())]
    return {f"{line.get_color()} {line.get_linestyle()}": np.array(line.get_data()) for line in found}


def approx(*points: tuple[float, float]) -> Any:
    return pytest.approx(np.array(points).T)


def test_speed_over_the_size(drawn: list[Any]) -> None:
    """Of a product of which memory limits the first size: both ceilings bend there."""
    sizes = {1: (2_000_000, 2_000_000), 8: (16_000_000, 2_000_000), 2048: (4_096_000_000, 2_000_000)}
    rows = [
        row(provider, us=us, case=str(n), shape={"rows": n}, flops=flops, bytes=bytes)
        for n, (flops, bytes) in sizes.items()
        for provider, us in (("ours", 50.0), ("eager", 100.0))
    ]
    speed = figures(record(reversed(rows)))[0]
    (axis,) = drawn[0].axes
    found = lines_of(axis)
    assert found[f"{marks(['ours'])['ours'].colour} -"] == approx((1, 0.04), (8, 0.32), (2048, 81.92))
    assert found[f"{marks(['eager'])['eager'].colour} -"] == approx((1, 0.02), (8, 0.16), (2048, 40.96))
    assert found["black --"] == approx((1, 1.0), (8, 8.0), (2048, 100.0))
    assert found["black :"] == approx((1, 2.0), (8, 16.0), (2048, 400.0))
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("rows", "TFLOP/s", "linear")
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "8", "2k"]
    assert "linear at 2048 rows: fastest ours 81.9 TFLOP/s" in speed.alt


def test_what_memory_limits_is_drawn_in_bytes(drawn: list[Any]) -> None:
    rows = [row(us=us, case=str(n), shape={"tokens": n}) for n, us in ((512, 10.0), (2048, 8.0))]
    figures(record(rows))
    (axis,) = drawn[0].axes
    found = lines_of(axis)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("tokens", "GB/s")
    assert found["black --"] == approx((512, 1000), (2048, 1000))
    assert found[f"{marks(['ours'])['ours'].colour} -"] == approx((512, 500), (2048, 625))


def test_the_size_is_what_varies(drawn: list[Any]) -> None:
    def axes(shapes: Iterable[tuple[int, int]]) -> list[tuple[str, str]]:
        drawn.clear()
        figures(record(row(case=f"{b} x {t}", shape={"batch": b, "tokens": t}) for b, t in shapes))
        return [(axis.get_title(), axis.get_xlabel()) for axis in drawn[0].axes]

    assert axes([(1, 512), (1, 2048), (8, 512), (8, 2048)]) == [
        ("linear: batch 1", "tokens"),
        ("linear: batch 8", "tokens"),
    ]
    assert axes([(1, 512), (8, 512)]) == [("linear: tokens 512", "batch")]
    assert axes([(1, 512), (8, 2048)]) == [("linear", "tokens")]
    assert axes([(8, 512)]) == [("linear: 8 x 512", "GB/s")]


def test_one_size_is_drawn_as_bars(drawn: list[Any]) -> None:
    whole = record([row("eager", us=20.0), row(us=10.0), row("cublas", us=8.0, partial="no norm")])
    assert "qkv, 8 rows: fastest ours 500 GB/s" in figures(whole)[0].alt
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["ours  500", "eager  250", "cublas  625"]
    assert [bar.get_width() for bar in axis.patches] == [500, 250, 625]
    assert [bar.get_facecolor()[:3] == (1, 1, 1) for bar in axis.patches] == [False, False, True]


def points(axis: Any) -> dict[tuple[float, float], Any]:
    return {(line.get_xdata()[0], line.get_ydata()[0]): line for line in axis.get_lines() if len(line.get_xdata()) == 1}


def rooflines(whole: Record) -> Any:
    found = roofline(whole)
    assert found is not None
    return found[0].axes[0]


def test_each_kernel_is_placed_on_the_roofline() -> None:
    whole = RECORDS["eight ops, every provider"]
    axis = rooflines(whole)
    placed = points(axis)
    assert set(placed) == {(each.intensity, each.tflops) for each in whole.rows}
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in placed)
    found = lines_of(axis)
    assert found["black -"] == approx((left, left), (100, 100), (right, 100))
    assert found["black :"] == approx((left, 2 * left), (200, 400), (right, 400))


@pytest.mark.parametrize("factor", [0.001, 3, 10, 1000])
def test_a_kernel_above_or_far_below_the_roof_is_within_the_axes(factor: float) -> None:
    """From a cache a kernel may read faster than the memory does."""
    axis = rooflines(record([row(us=5.0 / factor), row("eager", us=6.0 / factor)]))
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    assert all(left < x < right and bottom < y < top for x, y in points(axis))
    lines = [line.get_ydata() for line in axis.get_lines() if line.get_transform() == axis.transAxes]
    assert len(lines) == 1
    assert all(0 <= heights[0] < heights[1] == 1 < heights[2] for heights in lines)


def test_each_kernel_is_named_once_and_ours_stands_out() -> None:
    rows = [
        *(row(each, us=us) for each, us in (("compile", 5.0), ("ours", 10.0), ("eager", 20.0))),
        *(row(each, us=us, op="swiglu", case="8 rows") for each, us in (("compile", 30.0), ("eager", 40.0))),
    ]
    axis = rooflines(record(rows))
    assert [text.get_text() for text in axis.texts if text.get_rotation()] == [
        "1  linear: qkv, 8 rows",
        "2  swiglu: 8 rows",
    ]
    numbers = {text.get_position(): text.get_text() for text in axis.texts if not text.get_rotation()}
    assert numbers == {(8, rows[1].tflops): "1", (8, rows[3].tflops): "2"}
    sizes = {each.us: points(axis)[each.intensity, each.tflops].get_markersize() for each in rows}
    assert sizes[10.0] == sizes[30.0] > 2 * sizes[5.0] == 2 * sizes[20.0] == 2 * sizes[40.0]


def test_ops_without_flops_are_told_where_they_are_left_out() -> None:
    found = roofline(record([row(), row(op="sample", flops=0), row("eager", op="sample", flops=0)]))
    assert found is not None
    figure, words = found
    assert words.endswith("(without FLOPs, so not here: sample).")
    assert "(without FLOPs, so not here: sample)" in figure.texts[0].get_text().replace("\n", " ")
    assert len(points(figure.axes[0])) == 1


def test_cases_of_one_intensity_share_a_name() -> None:
    axis = rooflines(record(of(sweep(("ours",)), "linear")))
    words = [text.get_text() for text in axis.texts if text.get_rotation()]
    assert "1  linear: dense, 1, 2 cases" in words
    assert sum(int(word.rpartition(", ")[2].split()[0]) if "cases" in word else 1 for word in words) == 12


def test_many_names_are_kept_apart() -> None:
    rows = [row(case=str(n), op=f"op{n}", flops=40_000_000 + 10_000 * n) for n in range(52)]
    axis = rooflines(record(rows))
    places = [text.get_position()[0] for text in axis.texts if text.get_rotation()]
    assert len(places) == 52
    assert min(b - a for a, b in itertools.pairwise(places)) > 0.16 / 8.6
    assert max(places) <= 1
    with_more = rooflines(record(row(case=str(n), flops=1_000_000 + 400_000 * n) for n in range(300)))
    assert 10 < len([text for text in with_more.texts if text.get_rotation()]) <= 52


@pytest.mark.parametrize(
    ("places", "apart"),
    [
        ([0.5], [0.5]),
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.0, 1.0], [0.0, 0.1, 1.0]),
        ([0.9, 1.0, 1.0], [0.8, 0.9, 1.0]),
        ([0.3, 0.5, 0.5, 0.52], [0.3, 0.40666667, 0.50666667, 0.60666667]),
    ],
)
def test_names_stay_as_near_as_they_can(places: list[float], apart: list[float]) -> None:
    assert _apart(places, 0.1) == pytest.approx(apart)


def test_every_provider_looks_like_itself() -> None:
    """None has the mark and the colour of another, nor the colour of ours or of the candidate."""
    found = marks([*EVERYTHING, *OTHERS, "somebody", "somebody else"])
    assert list(found)[:2] == list(OURS)
    assert len({(mark.colour, mark.shape) for mark in found.values()}) == len(found)
    assert not {found[name].colour for name in OURS} & {mark.colour for name, mark in found.items() if name not in OURS}
    assert found["eager"] == marks(["eager"])["eager"]
    names = {provider.name for subject in SUBJECTS.values() for provider in subject.providers}
    assert names <= {*EVERYTHING, *OTHERS}
