"""The engine's promises: the same text alone and together, limits, cancellation, and an end to everything."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from mistral_nb.engine import Engine, Generation, Sampling, Token
from mistral_nb.errors import ConfigurationError, ContextOverflow, EngineError, InvalidRequest
from mistral_nb.types import GenerationRequest
from tests.engine.jobs import TIMEOUT, ids, wait_until

GREEDY = Sampling(temperature=0)
TEXTS = (
    "Explain what a list comprehension is in Python, with an example.",
    "Write a short poem about the sea.",
    "Why is the sky blue?",
    "Translate to French: I would like a coffee, please. Then explain each word of the translation.",
    "def fibonacci(n):",
)
TEXT_IDS = [5345, 314, 260, 6376]


@pytest.fixture(scope="module")
def engine(embedded: Path) -> Iterator[Engine]:
    engine = Engine.load(embedded, precision="int4")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prompts(embedded: Path) -> list[list[int]]:
    """Token ids of TEXTS as user turns."""
    tokenizer = Tokenizer.from_file(str(embedded / "tokenizer.json"))
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer.encode(turn.format(text)).ids for text in TEXTS]


def last(generation: Generation) -> Token:
    return list(generation)[-1]


def test_greedy_text_equals_transformers(embedded: Path, prompts: list[list[int]]) -> None:
    """fp32, five prompts, 200 tokens each, decoded together.

    Every token is the likeliest one by transformers after the same text before it, which makes the whole its greedy
    text; the first's beginning is compared with what its `generate` writes as well.
    """
    engine = Engine.load(embedded, precision="fp32")
    generations = [engine.submit(prompt, GREEDY, 200) for prompt in prompts]
    ours = [ids(generation) for generation in generations]
    engine.close()
    oracle = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32).eval()
    for prompt, text in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + text])).logits[0]
        assert text == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    prompt = torch.tensor(prompts[:1])
    written = oracle.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=30,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert ours[0][:30] == written[0, prompt.shape[1] :].tolist()


def test_together_equals_alone(engine: Engine, prompts: list[list[int]]) -> None:
    """Token by token, greedy and drawn, with penalties, at different lengths, joined and left at different times."""
    jobs = [
        (prompt, Sampling(temperature=temperature, seed=7 + i, top_p=0.9, repetition_penalty=1.1), 24 + 9 * i)
        for i, prompt in enumerate(prompts)
        for temperature in (0.0, 0.9)
    ]
    alone = [ids(engine.submit(*job)) for job in jobs]
    together = [engine.submit(*job) for job in jobs]
    assert [ids(generation) for generation in together] == alone


def test_a_seed_repeats_and_another_differs(engine: Engine, prompts: list[list[int]]) -> None:
    texts = [ids(engine.submit(prompts[0], Sampling(temperature=1.0, seed=seed), 20)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = {tuple(ids(engine.submit(prompts[0], Sampling(temperature=1.0), 20))) for _ in range(4)}
    assert len(unseeded) > 1


def test_max_tokens_and_stop_ids(engine: Engine, prompts: list[list[int]]) -> None:
    generation = engine.submit(prompts[0], GREEDY, 5)
    tokens = list(generation)
    assert [token.finish_reason for token in tokens] == [None] * 4 + ["length"]
    assert generation.completion_tokens == 5
    stop = tokens[2].id
    assert stop is not None
    expected = [t.id for t in tokens[: [t.id for t in tokens].index(stop)]]
    stopped = list(engine.submit(prompts[0], GREEDY, 5, frozenset([stop])))
    assert [token.id for token in stopped] == [*expected, None]
    assert stopped[-1].finish_reason == "stop"


def test_the_context_is_a_limit(engine: Engine) -> None:
    context = engine.info.context
    with pytest.raises(ContextOverflow, match=f"{context} tokens"):
        engine.submit([5] * context, GREEDY, 1)
    generation = engine.submit([5] * (context - 1), GREEDY, 100)
    assert generation.max_tokens == 1
    generation.cancel()
    assert last(generation).finish_reason == "cancelled"


def test_bad_prompts_are_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequest, match="at least one token"):
        engine.submit([], GREEDY, 1)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        engine.submit(TEXT_IDS, GREEDY, 0)
    with pytest.raises(InvalidRequest, match="temperature"):
        Sampling(temperature=-1)
    for bad in (-1, engine.info.vocab_size):
        with pytest.raises(InvalidRequest, match="token ids go from 0"):
            engine.submit([1, bad], GREEDY, 1)


def test_cancel_between_two_tokens(engine: Engine, prompts: list[list[int]]) -> None:
    """From the engine's own thread and from another; what waits behind is served."""
    seen: list[Token] = []
    submitted, done = threading.Event(), threading.Event()

    def on_token(token: Token) -> None:
        seen.append(token)
        assert submitted.wait(TIMEOUT)
        if len(seen) == 3:
            generation.cancel()
        if token.finish_reason:
            done.set()

    generation = engine.submit(prompts[0], GREEDY, 4000, on_token=on_token)
    submitted.set()
    assert done.wait(TIMEOUT)
    assert [token.finish_reason for token in seen] == [None, None, None, "cancelled"]
    assert engine.active == 0

    running = [engine.submit(prompts[1], GREEDY, 1000) for _ in range(9)]
    next(iter(running[0]))
    for generation in running:
        generation.cancel()
        generation.cancel()
    assert {last(generation).finish_reason for generation in running} == {"cancelled"}
    assert len(ids(engine.submit(prompts[0], GREEDY, 3))) == 3


def test_cancel_in_the_middle_of_a_long_prompt(engine: Engine) -> None:
    """The prompt goes no further than the layer it is at; what comes next is served."""
    generation = engine.submit([5] * 8000, GREEDY, 10)
    assert wait_until(lambda: generation.cached > 128)
    generation.cancel()
    assert last(generation).finish_reason == "cancelled"
    assert len(ids(engine.submit(TEXT_IDS, GREEDY, 3))) == 3
    assert engine.active == 0


def test_a_failing_listener_ends_its_own_generation_only(engine: Engine) -> None:
    def fail(token: Token) -> None:
        raise RuntimeError("the listener's own trouble")

    other = engine.submit(TEXT_IDS, GREEDY, 40)
    failing = engine.submit(TEXT_IDS, GREEDY, 40, on_token=fail)
    assert len(ids(other)) == 40
    assert failing.finish_reason == "error"
    with pytest.raises(RuntimeError, match="without it to iterate"):
        next(iter(failing))
    assert list(other) == []


def test_close_ends_what_runs(embedded: Path, prompts: list[list[int]]) -> None:
    engine = Engine.load(embedded)
    generation = engine.submit(prompts[0], GREEDY, 4000)
    next(iter(generation))
    pool = weakref.ref(engine._runner.pool)
    engine.close()
    engine.close()
    gc.collect()
    assert pool() is None
    assert last(generation).finish_reason == "cancelled"
    with pytest.raises(EngineError, match="start it again"):
        engine.submit(prompts[0], GREEDY, 1)


def test_a_failing_step_ends_its_generations_and_no_others(engine: Engine, prompts: list[list[int]]) -> None:
    """What is no token id makes torch raise, as running out of memory does: here in the middle of a prompt."""
    other = engine.submit(prompts[0], GREEDY, 200)
    next(iter(other))
    broken = engine.submit([5] * 4000, GREEDY, 10)
    broken.prompt_ids[3000] = 0.5  # type: ignore[call-overload]
    end = last(broken)
    assert end.finish_reason == "error"
    assert "the model failed" in end.error
    assert "see the engine's log" in end.error
    assert len(ids(other)) == 199


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_the_loop_ends_everything_with_an_error(embedded: Path, prompts: list[list[int]]) -> None:
    engine = Engine.load(embedded)
    broken, other = (engine.submit(prompts[i], GREEDY, 4000) for i in (0, 1))
    next(iter(broken))
    broken.place = None
    ends = [last(broken), last(other)]
    assert [end.finish_reason for end in ends] == ["error", "error"]
    for end in ends:
        assert end.error == (
            "the engine has ended (its loop ended on an error of its own (AssertionError)); start it again"
        )
    assert engine.failure == "its loop ended on an error of its own (AssertionError)"
    with pytest.raises(EngineError, match="start it again"):
        engine.submit(prompts[0], GREEDY, 1)
    engine.close()


def test_info_and_devices(engine: Engine, embedded: Path) -> None:
    assert engine.info.precision == "int4"
    assert engine.info.context == 8192
    assert engine.info.kernels == "torch (no NVIDIA GPU with Triton): all ops"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="no NVIDIA GPU"):
            Engine.load(embedded, device="cuda")


def test_sampling_from_a_request() -> None:
    request = GenerationRequest(prompt="x", top_p=1.7, repetition_penalty=0)
    assert Sampling.from_request(request) == Sampling(temperature=0.6)
    request = GenerationRequest(prompt="x", temperature=0, top_p=0, top_k=4, seed=9, presence_penalty=1)
    assert Sampling.from_request(request) == Sampling(0.0, 0.0, 4, 9, 1.0, 0.0, 1.0)
