"""What `mistral-nb bench serve` asks, and when: arrivals, lengths, adapters and prompts, all drawn from one seed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Literal

__all__ = ["Ask", "Lengths", "Load", "Mix", "Words", "Workload", "shares"]

# fmt: off
WORDS = (
    "river", "stone", "cloud", "paper", "garden", "window", "silver", "morning", "bridge", "forest", "candle",
    "winter", "music", "letter", "ocean", "mountain", "table", "flower", "market", "village", "summer", "yellow",
    "dragon", "engine", "castle", "island", "mirror", "pocket", "school", "thunder", "a", "of",
)
# fmt: on

_FIRST = "Notes:"
_LENGTHS = re.compile(r"([0-9]{1,7})(?:(\.\.|~)([0-9]{1,7}))?")
_MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of whole numbers from 1 on: always `low`, from `low` to `high` with equal chances (uniform), or
    normal around `low` with the standard deviation `high`.
    """

    kind: Literal["fixed", "uniform", "normal"]
    low: int
    high: int = 0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Of `128`, `32..512` or `200~50`. `ValueError` for anything else."""
        found = _LENGTHS.fullmatch(text)
        if found is None or not 1 <= int(found[1]) <= _MOST:
            raise ValueError(f"{text!r} is no length: tokens as 128, from 32..512, or around 200~50")
        low, high = int(found[1]), int(found[3] or 0)
        if found[2] == ".." and not low <= high <= _MOST:
            raise ValueError(f"{text!r} is no range: the second number is at least the first, at most {_MOST}")
        kinds: dict[str | None, Literal["fixed", "uniform", "normal"]] = {None: "fixed", "..": "uniform", "~": "normal"}
        return cls(kinds[found[2]], low, high)

    def draw(self, random: Random) -> int:
        if self.kind == "uniform":
            return random.randint(self.low, self.high)
        return max(1, round(random.gauss(self.low, self.high))) if self.kind == "normal" else self.low

    def __str__(self) -> str:
        sign = {"fixed": "", "uniform": f"..{self.high}", "normal": f"~{self.high}"}
        return f"{self.low}{sign[self.kind]}"


Mix = Mapping[str, float]
"""Adapters with their shares of the requests, 1 together at most; the rest asks the model alone."""


def shares(texts: list[str]) -> Mix:
    """Of `NAME=SHARE` and bare names, which divide what is left evenly. `ValueError` says what is wrong."""
    given: dict[str, float | None] = {}
    for text in texts:
        name, sign, share = text.rpartition("=")
        name = name if sign else text
        if not name or name in given:
            raise ValueError(f"{text!r} names {'an adapter again' if name else 'no adapter'}: give NAME or NAME=SHARE")
        given[name] = _share(text, share) if sign else None
    told = sum(share for share in given.values() if share)
    bare = [name for name, share in given.items() if share is None]
    if told > 1 + 1e-9 or (bare and told > 1 - 1e-9):
        raise ValueError(f"the adapters' shares are {told:g} together: 1 at most, and less where one has none")
    return {name: (1 - told) / len(bare) if share is None else share for name, share in given.items()}


def _share(text: str, share: str) -> float:
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"{text!r} has no share: a number above 0, at most 1")
    return value


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: `rate` a second, independent of the answers (Poisson), or so that `concurrency` of them are
    under way at any time. One of the two.
    """

    rate: float | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        assert (self.rate is None) != (self.concurrency is None)

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.rate is None else f"{self.rate:g}/s"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to make: `at` is in seconds after the beginning, 0 where it waits for another's end; `words` seeds
    its prompt. Lengths are in tokens.
    """

    number: int
    at: float
    prompt_tokens: int
    answer_tokens: int
    adapter: str | None
    words: str


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of each load: `requests` of them, or as many as begin within `seconds`, or whichever ends first.

    Moments, lengths and adapters are drawn apart, so that another rate or mix leaves the other two as they were. Every
    load asks prompts of its own, of which no earlier one has left keys and values, but for the first `shared_prefix`
    tokens, which begin them all.
    """

    prompts: Lengths
    answers: Lengths
    mix: Mix = field(default_factory=dict)
    shared_prefix: int = 0
    seed: int = 0
    requests: int | None = None
    seconds: float | None = None

    def asks(self, load: Load, part: int = 0) -> Iterator[Ask]:
        """The requests in their order, those of `load` as the `part`-th one of a run."""
        drawn = {name: Random(f"{self.seed} {name}") for name in ("arrivals", "prompts", "answers", "adapters")}
        at = 0.0
        for number in itertools.count() if self.requests is None else range(self.requests):
            if load.rate is not None:
                at += drawn["arrivals"].expovariate(load.rate)
            if self.seconds is not None and at >= self.seconds:
                return
            yield Ask(
                number,
                at,
                self.prompts.draw(drawn["prompts"]),
                self.answers.draw(drawn["answers"]),
                self._adapter(drawn["adapters"].random()),
                f"{self.seed} {part} {number}",
            )

    def _adapter(self, place: float) -> str | None:
        for name, share in self.mix.items():
            place -= share
            if place < 0:
                return name
        return None


@dataclass(frozen=True, slots=True)
class Words:
    """What prompts are made of: the tokens that every one begins with (`first`), and those that each word adds."""

    first: int
    costs: Mapping[str, int]

    @classmethod
    def measured(cls, count: Callable[[str], int]) -> Words:
        """By `count`, which is how many tokens a raw prompt has."""
        first = count(_FIRST)
        return cls(first, {word: max(1, count(f"{_FIRST} {word}") - first) for word in WORDS})

    def text(self, ask: Ask, workload: Workload) -> str:
        """A raw prompt of as many tokens as are asked for, or a few less where no word fits."""
        left = ask.prompt_tokens - self.first
        shared, used = self._fill(Random(f"{workload.seed} shared"), min(left, workload.shared_prefix - self.first))
        own, _ = self._fill(Random(ask.words), left - used)
        return " ".join([_FIRST, *shared, *own])

    def _fill(self, random: Random, tokens: int) -> tuple[list[str], int]:
        """Words, and how many tokens they are: `tokens` at most."""
        chosen, left = [], tokens
        while fitting := [word for word, cost in self.costs.items() if cost <= left]:
            chosen.append(random.choice(fitting))
            left -= self.costs[chosen[-1]]
        return chosen, tokens - left
