"""Latencies, throughput and goodput of answers whose moments are known."""

from __future__ import annotations

import numpy as np
import pytest

from mistral_nb.bench_client import Outcome, Run
from mistral_nb.bench_latency import Latency, Limits, most_at_once, percentile, summarise
from mistral_nb.bench_workload import Ask, Load
from mistral_nb.types import Usage


def outcome(
    due: float, texts: list[float], tokens: int | None = None, *, adapter: str | None = None, error: str = ""
) -> Outcome:
    """Sent 1 ms after it was due, over 2 ms after its last text, after a prompt of 10 tokens."""
    ended = (texts[-1] if texts else due + 1) + 0.002
    usage = None if error else Usage(10, len(texts) if tokens is None else tokens)
    ask = Ask(0, due, 10, 20, adapter, "")
    return Outcome(ask, due, due + 0.001, texts, ended, usage, error, f"words of {error}" if error else "")


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 50, 90, 95, 99, 100])
def test_percentiles_are_numpys(count: int, percent: float) -> None:
    values = sorted(float(value) for value in np.random.default_rng(count).exponential(size=count))
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_latency_of_nothing_has_no_numbers() -> None:
    assert Latency.of([]) == Latency.of([None]) == Latency(0, None, None, None, None, None, None)
    assert Latency.of([0.002, None, 0.001]).count == 2


def test_moments_of_an_answer() -> None:
    one = outcome(1.0, [1.5, 1.6, 1.8], tokens=5)
    assert one.first == pytest.approx(0.5)
    assert one.gaps == [pytest.approx(0.1), pytest.approx(0.2)]
    assert one.per_token == pytest.approx(0.3 / 4)
    assert one.whole == pytest.approx(0.802)
    silent = outcome(1.0, [], tokens=1)
    assert (silent.first, silent.gaps, silent.per_token) == (None, [], None)
    assert outcome(1.0, [1.5]).per_token is None


def test_a_load_is_summed_up() -> None:
    outcomes = [
        outcome(0.0, [0.1, 0.2, 0.3]),
        outcome(1.0, [1.3, 1.4], adapter="tone"),
        outcome(2.0, [2.5], error="HTTP 429, code 3040"),
        outcome(3.0, [], error="HTTP 429, code 3040"),
        outcome(3.0, [], error="cut short"),
    ]
    found = summarise(Run(Load(rate=2), outcomes, seconds=4.0, client_cpu=1.0), Limits())
    assert (found.load, found.rate, found.concurrency) == ("2/s", 2, None)
    assert (found.requests, found.answered) == (5, 2)
    assert found.errors == {"HTTP 429, code 3040": 2, "cut short": 1}
    assert found.messages["cut short"] == "words of cut short"
    assert (found.prompt_tokens, found.answer_tokens, found.asked_tokens) == (20, 5, 40)
    assert found.reused_tokens is None
    outcomes[0].reused, outcomes[2].reused = 4, 8
    assert summarise(Run(Load(rate=2), outcomes, seconds=4.0, client_cpu=1.0), Limits()).reused_tokens == 4
    assert (found.requests_per_s, found.tokens_per_s, found.all_tokens_per_s) == (0.5, 1.25, 6.25)
    assert (found.goodput, found.good, found.client) == (None, None, 0.25)
    assert found.ttft.count == 2
    assert found.ttft.mean == pytest.approx(200)
    assert found.itl.count == 3
    assert found.itl.p50 == pytest.approx(100)
    assert found.tpot.max == pytest.approx(100)
    assert found.e2e.max == pytest.approx(402)
    assert found.late.p99 == pytest.approx(1)
    assert {name: part.answered for name, part in found.adapters.items()} == {"": 1, "tone": 1}
    assert found.adapters["tone"].ttft.p50 == pytest.approx(300)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        (Limits(ttft=150), 1),
        (Limits(ttft=300.001), 2),
        (Limits(itl=150), 2),
        (Limits(itl=90), 1),
        (Limits(ttft=150, itl=150), 1),
        (Limits(ttft=150, itl=90), 0),
        (Limits(ttft=1, itl=1), 0),
    ],
)
def test_goodput_counts_the_answers_that_kept_every_limit(limits: Limits, good: int) -> None:
    """One came late and ran fast, the other the other way round; one failed, in time."""
    outcomes = [outcome(0.0, [0.1, 0.2, 0.3]), outcome(1.0, [1.3, 1.35]), outcome(2.0, [2.01], error="cut short")]
    found = summarise(Run(Load(concurrency=1), outcomes, seconds=2.0, client_cpu=0.0), limits)
    assert found.goodput == good / 2
    assert found.good == pytest.approx(good / 3)


def test_the_mean_of_an_answer_counts_for_its_limit() -> None:
    stalled = outcome(0.0, [0.1, 0.11, 0.12, 0.27])
    assert Limits(itl=60).kept(stalled)
    assert not Limits(itl=50).kept(stalled)


def test_most_at_once() -> None:
    assert most_at_once([]) == 0
    first, second, third = outcome(0.0, [1.0]), outcome(0.5, [2.0]), outcome(1.5, [1.9])
    assert most_at_once([first, second, third]) == 2
    third.sent = first.ended
    assert most_at_once([first, third]) == 1
