"""What a load consists of: distributions of lengths, arrivals, shares of adapters, and prompts of so many tokens."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from random import Random

import pytest

from mistral_nb.bench_workload import WORDS, Lengths, Load, Words, Workload, shares

FIXED = Lengths.parse("64")


def tokens(text: str) -> int:
    """A tokenizer's count: two for the beginning of the text, one for each short word, two for each long one."""
    return 2 + sum(1 if len(word) < 6 else 2 for word in text.split()[1:])


@pytest.mark.parametrize(
    ("text", "mean", "least", "most"),
    [("128", 128, 128, 128), ("32..512", 272, 32, 512), ("200~50", 200, 1, 450), ("3~400", 162, 1, 2000)],
)
def test_lengths_follow_their_distribution(text: str, mean: float, least: int, most: int) -> None:
    lengths, random = Lengths.parse(text), Random(0)
    drawn = [lengths.draw(random) for _ in range(20_000)]
    assert min(drawn) >= least
    assert max(drawn) <= most
    assert statistics.fmean(drawn) == pytest.approx(mean, rel=0.03)
    assert str(lengths) == text
    if text == "200~50":
        assert statistics.stdev(drawn) == pytest.approx(50, rel=0.03)
    if text == "32..512":
        assert (min(drawn), max(drawn)) == (32, 512)


@pytest.mark.parametrize("text", ["", "0", "-3", "1.5", "512..32", "5..", "~5", "9999999", "a", "1..9999999", "10~5~1"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no "):
        Lengths.parse(text)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    """Gaps are exponential: their mean and their standard deviation are both 1 / rate."""
    ats = [ask.at for ask in Workload(FIXED, FIXED, requests=20_000).asks(Load(rate=4))]
    gaps = [after - before for before, after in zip([0.0, *ats], ats, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.03)


def test_a_load_ends_by_count_or_by_time() -> None:
    rate, together = Load(rate=50), Load(concurrency=3)
    assert len(list(Workload(FIXED, FIXED, requests=7).asks(together))) == 7
    timed = list(Workload(FIXED, FIXED, seconds=10).asks(rate))
    assert timed[-1].at < 10
    assert len(timed) == pytest.approx(500, rel=0.2)
    assert len(list(Workload(FIXED, FIXED, requests=20, seconds=10).asks(rate))) == 20


def test_a_seed_draws_the_same_and_each_thing_apart() -> None:
    def drawn(
        rate: float = 2, seed: int = 1, part: int = 0, prompts: str = "8..90", mix: Mapping[str, float] | None = None
    ) -> list[tuple[object, ...]]:
        workload = Workload(Lengths.parse(prompts), Lengths.parse("20~9"), mix or {}, requests=50, seed=seed)
        return [(ask.at, ask.prompt_tokens, ask.answer_tokens, ask.words) for ask in workload.asks(Load(rate), part)]

    assert drawn() == drawn()
    assert drawn() == drawn(mix={"tone": 0.5})
    assert [each[2] for each in drawn()] == [each[2] for each in drawn(prompts="7")]
    assert [each[1:] for each in drawn()] == [each[1:] for each in drawn(rate=9)]
    assert [each[1:3] for each in drawn()] != [each[1:3] for each in drawn(seed=2)]
    assert [each[:3] for each in drawn()] == [each[:3] for each in drawn(part=1)]
    assert not {each[3] for each in drawn()} & {each[3] for each in drawn(part=1)}


def test_adapters_get_their_shares() -> None:
    workload = Workload(FIXED, FIXED, shares(["a=0.5", "b=0.2"]), requests=20_000)
    asked = Counter(ask.adapter for ask in workload.asks(Load(concurrency=1)))
    assert {name: count / 20_000 for name, count in asked.items()} == {
        "a": pytest.approx(0.5, abs=0.02),
        "b": pytest.approx(0.2, abs=0.02),
        None: pytest.approx(0.3, abs=0.02),
    }


def test_what_shares_leave_goes_to_those_without_one() -> None:
    assert shares([]) == {}
    assert shares(["a"]) == {"a": 1}
    assert shares(["a=0.5", "/x=1/b=0.25", "c", "d"]) == {"a": 0.5, "/x=1/b": 0.25, "c": 0.125, "d": 0.125}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a=0"], "above 0"),
        (["a=1.5"], "at most 1"),
        (["a=x"], "above 0"),
        (["a=nan"], "above 0"),
        (["=0.5"], "no adapter"),
        (["a=0.5", "a"], "again"),
        (["a=0.7", "b=0.4"], "1.1 together"),
        (["a=1", "b"], "less where one has none"),
    ],
)
def test_wrong_shares_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shares(texts)


def test_prompts_have_their_tokens_and_no_beginning_in_common() -> None:
    words = Words.measured(tokens)
    assert words.first == 2
    assert {word: words.costs[word] for word in ("river", "window")} == {"river": 1, "window": 2}
    workload = Workload(Lengths.parse("30..90"), FIXED, requests=40)
    texts = {}
    for part in (0, 1):
        for ask in workload.asks(Load(concurrency=1), part):
            texts[ask.words] = words.text(ask, workload)
            assert tokens(texts[ask.words]) == ask.prompt_tokens
    assert len({" ".join(text.split()[:9]) for text in texts.values()}) == 80


def test_a_shared_prefix_is_in_every_prompt_and_within_its_length() -> None:
    words = Words.measured(tokens)
    workload = Workload(Lengths.parse("10..90"), FIXED, requests=40, shared_prefix=50)
    texts = [(ask.prompt_tokens, words.text(ask, workload)) for ask in workload.asks(Load(concurrency=1))]
    assert all(tokens(text) == length for length, text in texts)
    begun = {text[:150] for length, text in texts if length >= 50}
    assert len(begun) == 1
    assert len({text for _, text in texts}) > 30


def test_where_no_word_fits_a_prompt_is_a_little_shorter() -> None:
    words = Words(5, dict.fromkeys(WORDS, 4))
    [ask] = Workload(Lengths.parse("20"), FIXED, requests=1).asks(Load(concurrency=1))
    assert len(words.text(ask, Workload(FIXED, FIXED)).split()) == 1 + 3
    [short] = Workload(Lengths.parse("2"), FIXED, requests=1).asks(Load(concurrency=1))
    assert words.text(short, Workload(FIXED, FIXED)) == "Notes:"
