"""What counts as growth of the process's memory, and what of a reserve is in it."""

from __future__ import annotations

import gc
import mmap
import re
import sys

import pytest
import torch

from mistral_nb.engine.arena import Reserve
from tests.engine.jobs import wait_until
from tests.soak import memory
from tests.soak.memory import GROWTH, Memory, growth, touched


def samples(after: list[float]) -> list[tuple[float, float]]:
    return [(float(second), value) for second, value in enumerate([90e6, 100e6, *after])]


@pytest.mark.parametrize(
    ("after", "grows"),
    [
        ([100e6] * 10, False),
        ([95e6, 105e6] * 5, False),
        ([100e6 + 1.5e6 * i for i in range(10)], False),
        ([100e6] * 9 + [101e6 + GROWTH], True),
        ([100e6 + 2.5e6 * i for i in range(10)], True),
        ([50e6 + 2.5e6 * i for i in range(10)], True),
    ],
)
def test_neither_the_most_nor_a_line_may_rise_too_far(after: list[float], grows: bool) -> None:
    found = growth(samples(after), 2)
    assert found is not None
    assert found.samples == 10
    if grows:
        with pytest.raises(AssertionError, match="memory grows"):
            found.check()
    else:
        found.check()


def test_the_time_to_warm_up_ends_when_everything_has_run_once() -> None:
    watch = Memory(lambda: [])
    watch.samples = [(float(second), 1e6 * min(second, 60)) for second in range(120)]
    assert watch.told() == "was watched for too short a time"
    watch._began -= 60
    watch.all_ran()
    watch._began -= 50
    watch.all_ran()
    assert re.match(r"after the first 6\d s: \+0\.0 MB at most", watch.told())
    watch._warm = 30.0
    with pytest.raises(AssertionError, match="memory grows"):
        watch.told()


def test_too_few_samples_tell_nothing() -> None:
    assert growth(samples([1e6] * 4), 2) is None
    assert growth(samples([1e6] * 9), 0.5) is None


@pytest.mark.skipif(sys.platform != "linux", reason="mincore as Linux has it")
def test_what_comes_and_goes_in_a_reserve_is_no_growth_and_all_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # what tests before this one left would go meanwhile
    reserve = Reserve((4, 2**22), torch.float32)
    assert touched(reserve.tensor) == 0
    monkeypatch.setattr(memory, "EVERY_S", 0.02)
    watch = Memory(lambda: [reserve.tensor])
    watch.start()
    before = newest(watch)
    reserve.tensor[1].fill_(1)
    assert touched(reserve.tensor) == 2**24
    assert abs(newest(watch) - before) < 6e6
    reserve.release(1)
    assert touched(reserve.tensor) == 0
    with mmap.mmap(-1, 2**24) as kept:
        kept.write(b"\1" * len(kept))
        assert abs(newest(watch) - before - len(kept)) < 6e6
    watch.stop()


def newest(watch: Memory) -> float:
    """A sample that was begun after this."""
    count = len(watch.samples)
    assert wait_until(lambda: len(watch.samples) >= count + 2)
    return watch.samples[-1][1]
