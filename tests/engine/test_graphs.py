"""Steps that run ahead of their reader, on the CPU: the same tokens as from steps that are over when they return."""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_nb.checkpoints import ModelArgs, estimate
from mistral_nb.checkpoints.memory import select
from mistral_nb.engine import Engine, Generation, Sampling, Token
from mistral_nb.engine import engine as engine_module
from mistral_nb.engine.engine import EngineInfo
from mistral_nb.engine.graphs import GraphRunner
from mistral_nb.engine.kv_pool import kv_tokens
from mistral_nb.engine.model import Transformer
from mistral_nb.engine.runner import DirectRunner, Drawn
from tests.engine.jobs import TIMEOUT, Thirds, check_stop_and_cancel, held, ids, jobs
from tests.engine.small_model import CONTEXT, PLACES, VOCAB, pool_of, small_transformer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    return small_transformer(tmp_path_factory.mktemp("tiny"), window=30)


@pytest.fixture
def engines(model: Transformer) -> Iterator[Callable[[bool], Engine]]:
    made: list[Engine] = []
    info = EngineInfo("tiny", "CPU", "fp32", CONTEXT, VOCAB, 1, str(model.ops))

    def make(ahead: bool) -> Engine:
        made.append(
            Engine(GraphRunner(model, pool_of(model)) if ahead else DirectRunner(model, pool_of(model, None), 1), info)
        )
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def submitted(engine: Engine, asked: list[tuple[Any, ...]]) -> list[Generation]:
    return [engine.submit(*job) for job in asked]


def test_the_same_tokens_ahead_or_not(engines: Callable[[bool], Engine]) -> None:
    """More generations than places, of many lengths, greedy and drawn, with penalties, filters and constraints."""
    engine = engines(False)
    alone = [ids(engine.submit(*job)) for job in jobs(VOCAB)]
    assert [ids(generation) for generation in submitted(engines(True), jobs(VOCAB))] == alone
    assert [len(text) for text in alone] == [job[2] for job in jobs(VOCAB)]


def test_a_stop_and_a_cancel_drop_what_was_drawn_ahead(engines: Callable[[bool], Engine]) -> None:
    check_stop_and_cancel(engines(True))


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("fails_after", [0, 3])
def test_a_constraint_that_cannot_be_followed_ends_its_own_answer(
    engines: Callable[[bool], Engine], ahead: bool, fails_after: int
) -> None:
    engine = engines(ahead)
    other = engine.submit([5, 6], Sampling(temperature=0), 60)
    next(iter(other))
    bad = list(engine.submit([1, 2], Sampling(temperature=0), 50, constraint=Thirds(VOCAB, fails_after)))  # type: ignore[arg-type]
    assert [token.finish_reason for token in bad] == [None] * fails_after + ["error"]
    assert "simpler schemas" in bad[-1].error
    assert len(ids(other)) == 59
    assert engine.failure == ""


def test_the_first_token_does_not_wait_for_a_step_to_be_captured(engines: Callable[[bool], Engine]) -> None:
    """Neither of the first answer nor of one that comes to others."""
    engine = engines(True)
    runner = engine._runner
    assert isinstance(runner, GraphRunner)
    captured, go, sizes = runner._captured, threading.Semaphore(0), []

    def later(kind: Any) -> Callable[[], Tensor]:
        sizes.append(kind.size)
        assert go.acquire(timeout=TIMEOUT)
        return captured(kind)

    runner._captured = later  # type: ignore[method-assign]
    one, other = (engine.submit([1, 2, place], Sampling(temperature=0), 100) for place in range(2))
    for generation in (one, other):
        assert next(iter(generation)).id is not None
        go.release()
    assert [len(ids(generation)) for generation in (one, other)] == [99, 99]
    assert sizes == [1, 2]


FAULTS = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nMore"), "--context.*--precision"),
    (RuntimeError("CUDA error: an illegal memory access was encountered\nMore"), "encountered.*see the engine's log"),
    (subprocess.CalledProcessError(1, ["gcc"]), r"exit status 1.*install gcc and Python's headers \(python3-dev\)"),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("op", ["sample", "prefill_attention"])
def test_a_step_that_fails_says_what_to_do_and_ends_no_other(
    model: Transformer, engines: Callable[[bool], Engine], op: str, fault: Exception, told: str
) -> None:
    """Where a prompt is read, and where a token is drawn; also while a kernel is compiled, at its first launch."""
    faults: list[Exception] = []

    def failing(*arguments: Any) -> Tensor:
        if faults:
            raise faults.pop()
        result: Tensor = getattr(model.ops, op)(*arguments)
        return result

    engine = engines(True)
    runner = engine._runner
    assert isinstance(runner, GraphRunner)
    runner._model = Transformer(model.args, model.weights, replace(model.ops, **{op: failing}))
    assert len(ids(engine.submit([1, 2], Sampling(temperature=0), 5))) == 5
    faults.append(fault)
    end = list(engine.submit([1, 2], Sampling(temperature=0), 5))[-1]
    assert end.finish_reason == "error"
    assert re.search(told, end.error)
    assert "More" not in end.error
    assert len(ids(engine.submit([1, 2], Sampling(temperature=0), 5))) == 5
    assert engine.failure == ""


def test_tritons_own_errors_are_told_as_a_failing_steps(model: Transformer, engines: Callable[[bool], Engine]) -> None:
    errors = pytest.importorskip("triton.runtime.errors")
    fault = errors.OutOfResources(300_000, 232_448, "shared memory")
    test_a_step_that_fails_says_what_to_do_and_ends_no_other(
        model, engines, "sample", fault, "shared memory.*see the engine's log"
    )


def test_numbers_that_break_down_end_one_generation(engines: Callable[[bool], Engine], model: Transformer) -> None:
    engine = engines(True)
    good = engine.submit([1, 2, 3], Sampling(temperature=0), 50)
    embeddings = model.weights.tok_embeddings
    kept = embeddings[7].clone()
    embeddings[7] = torch.nan
    try:
        broken = list(engine.submit([4, 7], Sampling(temperature=0), 50))
        text = ids(good)
    finally:
        embeddings[7] = kept
    assert broken[-1].finish_reason == "error"
    assert "broke down" in broken[-1].error
    assert "try another precision" in broken[-1].error
    assert 7 in text or len(text) == 50


@pytest.mark.parametrize("free", [5.2e9, 5.6e9, 6e9, 7.4e9, 11e9, 15.6e9, 24e9])
def test_pages_leave_what_a_prompts_computation_takes(free: float) -> None:
    """On a GPU, with what `auto` takes there for Mistral-7B."""
    args = ModelArgs(4096, 32, 32, 8, 128, 14336, 32768, 1e-5, 1e6, 32768)
    chosen = select(args, ("bf16", "int8", "int4"), "cuda", int(free))
    args = replace(args, context=chosen.context)
    need = estimate(args, chosen.precision, chosen.context, "cuda")
    left = int(free) - need.weights
    tokens = kv_tokens(args, chosen.precision, "cuda", 8, left)
    assert left - tokens * 131072 >= need.workspace
    assert chosen.context <= tokens <= 8 * chosen.context
    assert tokens * 131072 <= max(left / 2, need.kv)
    assert kv_tokens(args, chosen.precision, "cuda", 8, None) == chosen.context


def test_an_engine_tells_what_it_takes(engines: Callable[[bool], Engine]) -> None:
    engine = engines(True)
    assert engine.use is not None
    assert engine.use.tokens_per_second is None
    begun, looked, over = threading.Event(), threading.Event(), threading.Event()
    tokens: list[Token] = []

    def take(token: Token) -> None:
        tokens.append(token)
        begun.set()
        assert looked.wait(TIMEOUT)
        if token.finish_reason:
            over.set()

    engine.submit([1, 2, 3], Sampling(temperature=0), 60, on_token=take)
    assert begun.wait(TIMEOUT)
    use = engine.use
    looked.set()
    assert use is not None
    assert 16 <= use.kv_used <= 64
    assert use.kv_tokens == PLACES * CONTEXT
    assert use.memory is None or use.memory > 1e8
    assert over.wait(TIMEOUT)
    assert len(tokens) == 60
    assert (engine.use.tokens_per_second or 0) > 0
    engine.close()
    assert engine.use is None


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("constrained", [False, True])
def test_the_speed_is_that_of_decoding(
    engines: Callable[[bool], Engine], monkeypatch: pytest.MonkeyPatch, ahead: bool, constrained: bool
) -> None:
    """By a clock on which a decoding step takes half a second and a prompt 100, one after another, as on a device; of
    two answers, one after the other and side by side.
    """
    engine = engines(ahead)
    runner, now, busy = engine._runner, 0.0, 0.0
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: now)

    def timed(part: Callable[[Any], Drawn | None], seconds: float) -> Callable[[Any], Drawn | None]:
        def run(what: Any) -> Drawn | None:
            nonlocal now, busy
            over = busy = max(now, busy) + seconds
            now = now if ahead else over
            drawn = part(what)

            def wait() -> list[Any]:
                nonlocal now
                now = max(now, over)
                return drawn()

            return drawn and wait

        return run

    monkeypatch.setattr(runner, "prefill", timed(runner.prefill, 100.0))
    monkeypatch.setattr(runner, "decode", timed(runner.decode, 0.5))
    constraint: Any = Thirds(VOCAB) if constrained else None
    assert len(ids(engine.submit([1, 2], Sampling(temperature=0), 20, constraint=constraint))) == 20
    assert engine.use is not None
    assert engine.use.tokens_per_second == 2.0
    with held(engine):
        together = [engine.submit([1, 2], Sampling(temperature=0), 20) for _ in range(2)]
    assert [len(ids(generation)) for generation in together] == [20, 20]
    assert 2.0 < (engine.use.tokens_per_second or 0) < 4.0
