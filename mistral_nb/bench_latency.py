"""What the answers of a load come to: percentiles of its latencies, throughput, goodput, and what failed and how.

The terms are those of vLLM's and NVIDIA's benchmarks. TTFT: from a request's moment to its first text. ITL: between
one piece of text and the next, of all answers together. TPOT: the mean of that in one answer, by its count of tokens.
End to end: from a request's moment to the end of its answer. Goodput: answers a second that kept every limit asked for.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mistral_nb.bench_client import Outcome, Run

__all__ = ["PERCENTILES", "Latency", "Limits", "Summary", "percentile", "summarise"]

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Limits:
    """Service level objectives in milliseconds: the first text, and the mean time of a token after the first. None for
    no such limit.
    """

    ttft: float | None = None
    itl: float | None = None

    @property
    def any(self) -> bool:
        return self.ttft is not None or self.itl is not None

    def kept(self, outcome: Outcome) -> bool:
        """Whether a whole answer kept them. One without text has no first text to be late."""
        pairs = ((outcome.first, self.ttft), (outcome.per_token, self.itl))
        return all(took is None or limit is None or took * 1e3 <= limit for took, limit in pairs)

    def __str__(self) -> str:
        pairs = (("TTFT", self.ttft), ("mean ITL", self.itl))
        return ", ".join(f"{name} at most {limit:g} ms" for name, limit in pairs if limit is not None)


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds, of `count` values; None throughout where there are none."""

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    max: float | None

    @classmethod
    def of(cls, seconds: Iterable[float | None]) -> Latency:
        values = sorted(each * 1e3 for each in seconds if each is not None)
        if not values:
            return cls(0, None, None, None, None, None, None)
        p50, p90, p95, p99 = (percentile(values, percent) for percent in PERCENTILES)
        return cls(len(values), statistics.fmean(values), p50, p90, p95, p99, values[-1])


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, between the two that are nearest in rank, as `numpy.percentile` has it."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Summary:
    """One load. `seconds` reach from the beginning to the last answer; rates are per second of them. `errors` counts
    failures by kind, `messages` holds the first words of each. `reused_tokens` are those of the prompts that the engine
    had from before, None where it tells of none. `late` is how long after their moments requests were
    sent, `client` what the client took of one CPU, `peak` the most that were under way at once. `adapters` are the
    parts of each adapter, "" for the model alone, where more than one is asked.
    """

    load: str
    rate: float | None
    concurrency: int | None
    seconds: float
    requests: int
    answered: int
    errors: dict[str, int]
    messages: dict[str, str]
    prompt_tokens: int
    reused_tokens: int | None
    answer_tokens: int
    asked_tokens: int
    requests_per_s: float
    tokens_per_s: float
    all_tokens_per_s: float
    goodput: float | None
    good: float | None
    ttft: Latency
    itl: Latency
    tpot: Latency
    e2e: Latency
    late: Latency
    client: float
    peak: int
    adapters: dict[str, Part]


@dataclass(frozen=True, slots=True)
class Part:
    """The whole answers of one adapter."""

    answered: int
    ttft: Latency
    itl: Latency


def summarise(run: Run, limits: Limits) -> Summary:
    """Failed requests count in `requests` and `errors` alone; what they had got until then is not in the latencies."""
    whole = [outcome for outcome in run.outcomes if not outcome.error]
    failed = [outcome for outcome in run.outcomes if outcome.error]
    read = sum(outcome.usage.prompt_tokens for outcome in whole if outcome.usage)
    reused = [outcome.reused for outcome in whole if outcome.reused is not None]
    written = sum(outcome.tokens for outcome in whole)
    good = sum(map(limits.kept, whole)) if limits.any else None
    return Summary(
        load=str(run.load),
        rate=run.load.rate,
        concurrency=run.load.concurrency,
        seconds=run.seconds,
        requests=len(run.outcomes),
        answered=len(whole),
        errors=dict(Counter(outcome.error for outcome in failed)),
        messages={outcome.error: outcome.message for outcome in reversed(failed)},
        prompt_tokens=read,
        reused_tokens=sum(reused) if reused else None,
        answer_tokens=written,
        asked_tokens=sum(outcome.ask.answer_tokens for outcome in whole),
        requests_per_s=len(whole) / run.seconds,
        tokens_per_s=written / run.seconds,
        all_tokens_per_s=(read + written) / run.seconds,
        goodput=None if good is None else good / run.seconds,
        good=None if good is None else good / max(1, len(run.outcomes)),
        ttft=Latency.of(outcome.first for outcome in whole),
        itl=Latency.of(gap for outcome in whole for gap in outcome.gaps),
        tpot=Latency.of(outcome.per_token for outcome in whole),
        e2e=Latency.of(outcome.whole for outcome in whole),
        late=Latency.of(outcome.sent - outcome.due for outcome in run.outcomes),
        client=run.client_cpu / run.seconds,
        peak=most_at_once(run.outcomes),
        adapters=_parts(whole),
    )


def _parts(whole: Sequence[Outcome]) -> dict[str, Part]:
    names = sorted({outcome.ask.adapter or "" for outcome in whole})
    if len(names) < 2:
        return {}
    groups = {name: [one for one in whole if (one.ask.adapter or "") == name] for name in names}
    return {
        name: Part(
            len(group),
            Latency.of(one.first for one in group),
            Latency.of(gap for one in group for gap in one.gaps),
        )
        for name, group in groups.items()
    }


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were under way at any moment. One that ends as another is sent does not meet it."""
    changes = sorted(change for one in outcomes for change in ((one.sent, 1), (one.ended, -1)))
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most
