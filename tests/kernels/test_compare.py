"""Two results of the kernel bench: when a difference counts, and what cannot be compared."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mistral_nb_kernels.bench.compare import Comparison, compare
from mistral_nb_kernels.bench.record import Record, Skipped, read, write
from tests.kernels.bench_records import MACHINE, record, row, sweep


def times(rows: Record, factor: float, *providers: str) -> Record:
    """The same with the times of these providers (none: of all) multiplied."""
    changed = [
        replace(each, us=each.us * factor, p20=each.p20 * factor, p80=each.p80 * factor)
        if not providers or each.provider in providers
        else each
        for each in rows.rows
    ]
    return replace(rows, rows=tuple(changed))


def verdicts(found: Comparison) -> dict[str, str]:
    return {change.new.provider: change.verdict for change in found.rows}


def test_a_file_against_itself_shows_no_change(tmp_path: Path) -> None:
    write(record(sweep()), tmp_path / "bench.json")
    same = read(tmp_path / "bench.json")
    found = compare(same, same)
    assert not found.regressed
    assert {change.verdict for change in found.rows} == {"no change"}
    assert (found.overall.times, found.overall.verdict) == (1, "no change")
    count = len(same.rows)
    assert found.table() == (
        f"No regression. {count} rows: {count} no change; all of ours together took 1.000 x the time, "
        f"+- {found.overall.error:.3f}: no change (tolerance 3.0%, 4.1 standard errors)."
    )


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "slower"), (1 / 1.1, "faster"), (1.02, "no change")])
def test_a_file_of_other_speed(factor: float, verdict: str) -> None:
    found = compare(record(sweep()), times(record(sweep()), factor))
    assert found.regressed == (verdict == "slower")
    assert {change.verdict for change in found.rows} == {verdict}
    assert found.overall.verdict == verdict
    assert found.overall.times == pytest.approx(factor)


def test_one_slower_row_of_ours_is_a_regression() -> None:
    old = record([row(), row("eager"), row(op="swiglu"), row(op="norm")])
    new = replace(old, rows=(*times(record(old.rows[:1]), 1.1).rows, *old.rows[1:]))
    found = compare(old, new)
    assert found.regressed
    assert [change.verdict for change in found.rows] == ["slower", "no change", "no change", "no change"]
    assert found.overall.verdict != "slower"
    assert not compare(new, old).regressed


def test_a_slower_peer_is_none() -> None:
    old = record([row(), row("eager"), row(op="swiglu")])
    found = compare(old, times(old, 1.1, "eager"))
    assert [change.verdict for change in found.rows] == ["no change", "slower", "no change"]
    assert not found.regressed
    assert found.table().startswith("No regression. 3 rows: 1 slower, 2 no change; all of ours together took 1.000 x")
    assert "The other providers are slower, too (took 1.100 x the time)" in found.table()
    peers = record([row("eager"), row("compile")])
    assert compare(peers, times(peers, 1.1, "eager")).regressed


def drifted(seed: int, share: float, count: int = 111) -> tuple[Record, Record]:
    """Two measurements of the same, whose times differ by so much from one to the next."""
    generator = random.Random(seed)
    old = record([row(case=str(case), spread=0.004) for case in range(count)])
    new = [times(record([each]), math.exp(generator.gauss(0, share))).rows[0] for each in old.rows]
    return old, replace(old, rows=tuple(new))


@pytest.mark.parametrize("share", [0.005, 0.012, 0.03])
def test_the_drift_from_one_run_to_the_next_is_no_regression(share: float) -> None:
    assert sum(compare(*drifted(seed, share)).regressed for seed in range(20)) == 0


def test_a_slower_row_is_seen_in_the_drift() -> None:
    old, new = drifted(3, 0.012)
    slower = times(record(new.rows[7:8]), 1.1).rows[0]
    found = compare(old, replace(new, rows=(*new.rows[:7], slower, *new.rows[8:])))
    assert [change.old.case for change in found.rows if change.verdict == "slower"] == ["7"]
    assert found.regressed


def test_half_of_the_rows_slower_alike_are_no_drift() -> None:
    old, new = drifted(4, 0.002, 20)
    slower = times(record(new.rows[:10]), 1.1).rows
    found = compare(old, replace(new, rows=(*slower, *new.rows[10:])))
    assert [change.verdict for change in found.rows] == ["slower"] * 10 + ["no change"] * 10


def test_rows_that_waited_for_a_core_are_unclear() -> None:
    old = record([row("eager", timer="wall"), row("compile", timer="wall")])
    new = times(record([row("eager", timer="waited"), row("compile", timer="wall")]), 500, "eager")
    for found in compare(old, new), compare(new, old):
        assert verdicts(found) == {"eager": "unclear", "compile": "no change"}
        assert (found.overall.count, found.overall.times) == (1, 1)
        assert not found.regressed
    both = compare(record(old.rows[:1]), record(new.rows[:1]))
    assert (both.overall.verdict, both.regressed) == ("unclear", False)


@pytest.mark.parametrize(
    ("us", "spread", "verdict"),
    [
        # 1.2533 * 0.1 / 1.683 / sqrt(20) = 1.67% a median, 2.35% a difference, and three of them are 7.1%.
        (10.6, 0.1, "unclear"),
        (10.9, 0.1, "slower"),
        (9.5, 0.1, "unclear"),
        (9.0, 0.1, "faster"),
        (10.29, 0.001, "no change"),
        (10.302, 0.001, "slower"),
        (9.72, 0.001, "no change"),
        (9.69, 0.001, "faster"),
        (10.31, 0.0, "slower"),
    ],
)
def test_a_difference_counts_beyond_tolerance_and_noise(us: float, spread: float, verdict: str) -> None:
    found = compare(record([row(us=10.0, spread=spread)]), record([row(us=us, spread=spread)]))
    assert verdicts(found) == {"ours": verdict}
    assert found.regressed == (verdict == "slower")


def test_the_standard_error_is_that_of_two_medians() -> None:
    (change,) = compare(record([row(us=10, spread=0.04)]), record([row(us=20, spread=0.02, runs=9)])).rows
    errors = [1.2533 * spread / 1.683 / math.sqrt(runs) for spread, runs in ((0.04, 20), (0.02, 9))]
    assert change.error == pytest.approx(math.hypot(*errors))
    assert change.times == pytest.approx(2)


def test_runs_of_one_second_do_not_count_by_their_thousands() -> None:
    many, few = (record([row(spread=0.1, runs=runs)]) for runs in (100_000, 20))
    assert compare(many, many).rows[0].error == compare(few, few).rows[0].error


def test_noise_alone_is_seldom_taken_for_a_change() -> None:
    """Times of one normal distribution, of 10% deviation: by far fewer than one pair in 20 may differ."""
    generator = random.Random(7)

    def measured() -> Record:
        runs = sorted(generator.gauss(100, 10) for _ in range(20))
        return record([replace(row(), us=statistics.median(runs), p20=runs[4], p80=runs[-5])])

    found = [compare(measured(), measured()).rows[0].verdict for _ in range(1000)]
    assert sum(verdict in ("slower", "faster") for verdict in found) < 25
    assert found.count("unclear") > 200


def test_all_together_show_what_no_row_does() -> None:
    """Rows that are unclear each, by their number."""
    old = record([row(case=str(case), spread=0.2) for case in range(100)])
    found = compare(old, times(old, 1.06))
    assert {change.verdict for change in found.rows} == {"unclear"}
    assert found.overall.verdict == "slower"
    assert found.regressed
    assert "all of ours together took 1.060 x the time" in found.table()


def test_rows_that_disagree_make_all_together_unclear() -> None:
    old = record([row(case=str(case), spread=0.001) for case in range(6)])
    new = record([row(case=str(case), us=10 * factor, spread=0.001) for case, factor in enumerate((1.4, 0.9) * 3)])
    found = compare(old, new)
    assert found.overall.times == pytest.approx(math.sqrt(1.4 * 0.9))
    assert found.overall.error == pytest.approx(statistics.stdev([math.log(1.4), math.log(0.9)] * 3) / math.sqrt(6))
    assert found.overall.verdict == "unclear"


def test_all_together_are_ours_and_the_candidate() -> None:
    old = record([row(), row("candidate"), row("eager")])
    found = compare(old, times(times(old, 1.2, "ours", "candidate"), 3, "eager"))
    assert (found.overall.count, found.overall.whose) == (2, "ours and candidate")
    assert found.overall.times == pytest.approx(1.2)
    others = record([row("eager"), row("compile")])
    found = compare(others, times(others, 1.1, "eager"))
    assert (found.overall.count, found.overall.whose) == (2, "them")
    assert found.overall.times == pytest.approx(math.sqrt(1.1))


def test_another_machine_is_told_by_the_providers_that_nobody_changed() -> None:
    old = record([row(), row("eager"), row("cublas")])
    words = "The other providers are slower, too (took 1.200 x the time): the machine or its load is not what it was"
    assert words in compare(old, times(old, 1.2)).notes
    assert compare(old, times(old, 1.2, "ours")).notes == ()
    alone = record([row("eager")])
    assert compare(alone, times(alone, 1.2)).notes == ()


def test_the_table_has_what_changed_the_slowest_first() -> None:
    old = record([row("eager"), row(), row("cublas"), row("compile", spread=0.2)])
    new = times(times(times(old, 1.1, "eager"), 1.25, "ours"), 1.05, "compile")
    text, marked = (compare(old, new).table(markdown) for markdown in (False, True))
    verdict, rows = text.split("\n\n")
    assert verdict.startswith("Regression. 4 rows: 2 slower, 1 unclear, 1 no change; all of ours together took 1.250 x")
    assert rows.splitlines()[1:] == [
        "linear  qkv, 8 rows  bf16   ours        10.0    12.5  1.250  0.005  slower",
        "linear  qkv, 8 rows  bf16   eager       10.0    11.0  1.100  0.005  slower",
        "linear  qkv, 8 rows  bf16   compile     10.0    10.5  1.050  0.047  unclear",
    ]
    assert marked.startswith("**Regression. ")
    assert "| linear | qkv, 8 rows | bf16 | ours | 10.0 | 12.5 | 1.250 | 0.005 | slower |" in marked


def test_other_devices_are_refused_by_name() -> None:
    other = record(machine={**MACHINE, "device": "NVIDIA A100-SXM4-80GB"})
    words = "results are of NVIDIA H100 80GB HBM3, the new ones of NVIDIA A100-SXM4-80GB: measure both on one device"
    with pytest.raises(ValueError, match=words):
        compare(record(), other)


def test_results_without_a_common_row_are_refused() -> None:
    for other in (record(()), record([row("eager")]), record([row(dtype="fp32")])):
        with pytest.raises(ValueError, match="no row in common: measure the same"):
            compare(record(), other)


@pytest.mark.parametrize(
    "changed",
    [{"shape": {"layer": "o", "rows": 8}}, {"flops": 1}, {"bytes": 1}, {"timer": "events"}, {"partial": "no norm"}],
)
def test_rows_that_do_not_do_the_same_are_not_compared(changed: dict[str, Any]) -> None:
    old = record([row(), row("eager")])
    new = record([row(us=30.0, **changed), row("eager")])
    found = compare(old, new)
    assert verdicts(found) == {"eager": "no change"}
    assert found.notes == ("Of other sizes or timed otherwise, so not compared: linear, qkv, 8 rows, bf16, ours",)


def test_rows_of_one_file_are_told() -> None:
    old = record([row(case=str(case)) for case in range(9)])
    new = record([row(case=str(case)) for case in (0, 9)])
    found = compare(old, new)
    assert (len(found.only_old), found.only_new) == (8, (("linear", "9", "bf16", "ours"),))
    assert not found.regressed
    assert "Only in the old results: linear, 1, bf16, ours; linear, 2, bf16, ours" in found.table()
    assert "linear, 5, bf16, ours and 3 more" in found.table()
    assert "- Only in the new results: linear, 9, bf16, ours" in found.table(markdown=True)


@pytest.mark.parametrize(("kind", "regressed"), [("wrong", True), ("failed", True), ("absent", False)])
def test_what_was_timed_and_is_wrong_now_is_a_regression(kind: Any, regressed: bool) -> None:
    old = record([row(), row("eager")])
    gone = Skipped(op="linear", case="qkv, 8 rows", dtype="bf16", provider="ours", kind=kind, why="off")
    found = compare(old, record([row("eager")], skipped=(gone,)))
    assert found.regressed is regressed
    told = "linear, qkv, 8 rows, bf16, ours: was timed, and is wrong or fails now" in found.table()
    assert told is regressed
    assert len(found.only_old) == (not regressed)
    peer = record([row()], skipped=(replace(gone, provider="eager"),))
    assert not compare(old, peer).regressed


def test_versions_and_interrupts_are_told() -> None:
    new = record(machine={**MACHINE, "torch": "2.13.0", "driver": None}, revision="def5678", complete=False)
    assert compare(record(), new).notes == (
        "driver: 550.54 before, None now",
        "torch: 2.11.0 before, 2.13.0 now",
        "revision: abc1234 before, def5678 now",
        "The new results are of a run that was interrupted",
    )
    assert not compare(record(), new).regressed


def test_the_tolerance_is_asked_for() -> None:
    new = times(record(), 1.1)
    assert compare(record(), new, tolerance=0.12).regressed is False
    assert "tolerance 12.0%" in compare(record(), new, tolerance=0.12).table()
    assert compare(record(), times(record([row(spread=0.0)]), 1.001), tolerance=0.0).regressed is False
    assert compare(record([row(spread=0.0)]), times(record([row(spread=0.0)]), 1.001), tolerance=0.0).regressed
