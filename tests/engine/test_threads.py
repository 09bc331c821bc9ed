"""How many threads decode: the quicker number is found, kept, and left again when others want the cores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from mistral_nb.checkpoints.memory import Precision
from mistral_nb.engine import Engine, Sampling
from mistral_nb.engine.threads import LATEST, SOONEST, WINDOW, DecodeThreads, PromptThreads
from mistral_nb_kernels import reference
from tests.engine.sequences import Running
from tests.engine.test_model import transformer

FREE = {1: 0.009, 2: 0.007}
BUSY = {1: 0.014, 2: 0.048}


def run(threads: DecodeThreads, steps: int, seconds: Callable[[int], float]) -> list[int]:
    """The number of threads that each step took."""
    counts = []
    for _ in range(steps):
        counts.append(threads.count)
        threads.took(seconds(threads.count))
    return counts


def test_few_are_taken_first_and_many_where_they_are_quicker() -> None:
    counts = run(DecodeThreads(1, 2), 400, FREE.__getitem__)
    assert counts[:WINDOW] == [1] * WINDOW
    assert counts.count(2) >= 370


def test_of_a_busy_machine_many_take_ever_fewer_steps() -> None:
    threads = DecodeThreads(1, 2)
    counts = run(threads, 4 * WINDOW * SOONEST, BUSY.__getitem__)
    assert counts[: WINDOW + 2] == [1] * WINDOW + [2, 1]
    assert counts.count(2) <= 3
    later = run(threads, 8 * WINDOW * LATEST, BUSY.__getitem__)
    assert 0 < later.count(2) <= 14


def test_a_trial_that_is_lost_is_short() -> None:
    threads, seconds = DecodeThreads(1, 2), {1: 0.045, 2: 0.028}
    run(threads, 3 * WINDOW, seconds.__getitem__)
    assert threads.count == 2
    counts = run(threads, 4 * WINDOW * SOONEST, seconds.__getitem__)
    assert 0 < counts.count(1) <= 2 * 2


def test_a_machine_that_becomes_busy_is_seen_within_two_steps_and_so_is_its_end() -> None:
    threads = DecodeThreads(1, 2)
    run(threads, 8 * WINDOW * SOONEST + 3, FREE.__getitem__)
    assert threads.count == 2
    assert run(threads, 40, BUSY.__getitem__).count(2) <= 3
    assert run(threads, WINDOW * LATEST, FREE.__getitem__).count(2) > WINDOW * LATEST * 0.8


def test_a_machine_that_is_a_little_busy_is_seen_too() -> None:
    threads, slower = DecodeThreads(1, 2), {1: 0.010, 2: 0.013}
    run(threads, 100, FREE.__getitem__)
    assert run(threads, 100, slower.__getitem__).count(2) <= 5 * WINDOW


def test_a_step_that_is_held_up_now_and_then_changes_nothing() -> None:
    times = itertools.cycle([0.08] + [FREE[2]] * 19)
    counts = run(DecodeThreads(1, 2), 1000, lambda count: next(times) if count == 2 else FREE[1])
    assert counts.count(2) >= 850


def test_a_longer_context_slows_both_and_changes_nothing_for_long() -> None:
    threads = DecodeThreads(1, 2)
    run(threads, 100, FREE.__getitem__)
    counts = run(threads, 1000, lambda count: 2 * FREE[count])
    assert counts.count(2) >= 850


def test_one_number_is_always_that_number() -> None:
    assert set(run(DecodeThreads(3, 3), 100, lambda count: 0.01)) == {3}


def test_a_prompts_layers_take_many_threads_until_one_is_slower_than_with_few() -> None:
    for times, decided in (((0, 1, 3, 4, 5), [4, 4, 4]), ((0, 1, 2, 3, 4), [4, 4, 4]), ((0, 5, 6, 7, 8), [2, 2, 2])):
        chosen = PromptThreads(2, 4)
        assert [chosen.before_layer(float(now)) for now in times] == [4, 2, *decided]
    held_up = PromptThreads(2, 4)
    assert [held_up.before_layer(float(now)) for now in (0, 1, 3, 4, 9, 11, 12)] == [4, 2, 4, 4, 2, 2, 2]


def test_what_is_left_of_a_step_that_is_held_up_takes_few() -> None:
    threads = DecodeThreads(1, 2)
    assert threads.limit == math.inf
    run(threads, 100, FREE.__getitem__)
    assert threads.count == 2
    assert FREE[1] < threads.limit < BUSY[2]


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    usual = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(usual)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("hkv", [1, 3, 8])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
def test_attention_does_not_depend_on_the_threads(
    d: int, hkv: int, group: int, with_threads: Callable[[int], None]
) -> None:
    torch.manual_seed(group)
    k, v = torch.randn(hkv, 700, d), torch.randn(hkv, 700, d)
    shapes = [(1, 1), (1, 60), (1, 513), (1, 700), (3, 3), (3, 131), (5, 5), (7, 7), (37, 37), (128, 256), (77, 589)]
    queries = [torch.randn(n, hkv * group, d) for n, _ in shapes]
    outs = []
    for threads in (1, 2, 3):
        with_threads(threads)
        outs.append([reference.attention(q, k[:, :t], v[:, :t]) for q, (_, t) in zip(queries, shapes, strict=True)])
    for other in outs[1:]:
        for one, two in zip(outs[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_logits_do_not_depend_on_the_threads(
    embedded: Path, precision: Precision, with_threads: Callable[[int], None]
) -> None:
    """Of every row of a prompt in chunks, and of single tokens after it."""
    model, found = transformer(embedded, precision), []
    tokens = torch.randint(100, 40_000, (109,), generator=torch.Generator().manual_seed(1)).tolist()
    for threads in (1, 2):
        with_threads(threads)
        sequence = Running(model, len(tokens))
        fed = [sequence.feed(tokens[begin:end]) for begin, end in ((0, 64), (64, 101), (101, 104), (104, 105))]
        found.append(torch.cat([*fed, *(sequence.decode(token) for token in tokens[105:])]))
    assert torch.equal(*found)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_text_does_not_depend_on_the_threads_that_it_is_written_with(embedded: Path, precision: Precision) -> None:
    texts = []
    for threads in (1, 3):
        with closing(Engine.load(embedded, device="cpu", precision=precision, context=512, threads=threads)) as engine:
            written = engine.submit(range(100, 150), Sampling(temperature=1.0, seed=5), 60)
            texts.append([token.id for token in written])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 60
