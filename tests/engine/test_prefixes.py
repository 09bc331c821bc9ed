"""How prompts are cut, and what of one another can begin with."""

from __future__ import annotations

import itertools
import random

import pytest

from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.prefixes import Cut, Prefix, Prompt
from mistral_nb.engine.runner import DirectRunner

CUTS = [Cut(512, 128), Cut(8, 2), Cut(6, 4), Cut(16, 16), Cut(16, 128)]


def pieces(cut: Cut, length: int) -> list[int]:
    ends = [0]
    while ends[-1] < length:
        ends.append(cut.end(ends[-1], length))
    return [end - begin for begin, end in itertools.pairwise(ends)]


def test_long_pieces_then_short_ones() -> None:
    assert pieces(Cut(512, 128), 1500) == [512, 512, 128, 128, 128, 92]
    assert pieces(Cut(512, 128), 512) == [128] * 4
    assert pieces(Cut(512, 128), 513) == [512, 1]
    assert pieces(Cut(512, 128), 1) == [1]
    assert pieces(Cut(128, 128), 1024) == [128] * 8


@pytest.mark.parametrize("cut", CUTS)
def test_what_two_prompts_share_is_cut_alike_in_both(cut: Cut) -> None:
    """All that is told to be common, and no less: the longest run of equal whole pieces."""
    chance = random.Random(0)
    for _ in range(300):
        lengths = [chance.randint(1, 4 * max(cut.long, cut.short)) for _ in range(2)]
        written, asked = (pieces(cut, length) for length in lengths)
        cached = chance.choice(list(itertools.accumulate(written)))
        prefix = Prefix(Prompt(None, [5] * lengths[0], cut), cut.whole(cached, lengths[0]))
        expected = begun = 0
        for mine, theirs in zip(written, asked, strict=False):
            begun += mine
            if mine != theirs or begun > prefix.count or begun == lengths[1]:
                break
            expected = begun
        other = Prompt(None, [5] * lengths[1], cut)
        assert prefix.common(other) == expected
        assert prefix.common(Prompt("adapter", other.ids, cut)) == 0


def test_a_prompt_again_reads_less_than_a_seventh_of_it() -> None:
    """Of 1,500 tokens, cut as on the CPU and as on a GPU."""
    for cut in (Cut(runner.chunk, runner.rest) for runner in (DirectRunner, GraphRunner)):
        prompt = Prompt(None, list(range(1500)), cut)
        read = 1500 - Prefix(prompt, cut.whole(1500, 1500)).common(prompt)
        assert read < 0.15 * 1500


def test_what_is_cut_otherwise_is_kept_beside() -> None:
    """A short prompt begins with nothing of a long one's first piece, so it is not part of it."""
    cut, ids = Cut(8, 2), list(range(30))
    short, long, longer = (Prompt(None, ids[:length], cut) for length in (8, 20, 29))
    assert not Prefix(short, 6).within(Prefix(long, 18))
    assert Prefix(long, 16).within(Prefix(longer, 24))
    assert not Prefix(long, 18).within(Prefix(longer, 24))
    assert Prefix(long, 18).common(longer) == 16
