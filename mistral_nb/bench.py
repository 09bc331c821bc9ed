"""`mistral-nb bench`: how fast the local engine answers on this machine, through the path that a cell takes.

Measured are the cold start (engine process, model and first token), the first token of a 40-token prompt, and decoding.
The engine is one of its own, in a runtime folder that ends with the benchmark.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from mistral_nb.answer import Answer, Result
from mistral_nb.backends.local import Local
from mistral_nb.bench_report import Measurement, check_writable, machine, print_table, write_report
from mistral_nb.config import Settings, load_settings
from mistral_nb.engine_control import stop
from mistral_nb.errors import MistralError, ModelError
from mistral_nb.models import canonical, locate, pull
from mistral_nb.types import GenerationRequest

__all__ = ["fetch", "run"]

PROMPT_TOKENS = 40
DECODE_TOKENS = 200
WORDS = ("river", "stone", "cloud", "paper", "garden", "window", "silver", "morning", "bridge", "forest", "candle")


class Bench:
    """Asks one model on its own engine; `report` gets a line for each answer."""

    def __init__(self, settings: Settings, model: str, report: Callable[[str], None]) -> None:
        self.settings = settings
        self.model = model
        self.report = report
        self.served: Result | None = None

    def answer(self, request: GenerationRequest) -> Result:
        """The whole answer, read as a cell reads it."""
        answer = Answer(Local(self.settings, self.model), request)
        for _ in answer:
            pass
        result = answer.result
        if not result.text or result.usage is None or result.timings.ttft is None:
            raise MistralError(f"the engine answered nothing (finish reason {result.finish_reason}); see its log")
        self.served = result
        return result

    def prompt(self, seed: int) -> str:
        """A text of exactly `PROMPT_TOKENS` tokens in raw mode that shares no beginning with another seed's."""
        backend = Local(self.settings, self.model)
        words = [WORDS[(seed * 5 + i * (seed % 3 + 1)) % len(WORDS)] for i in range(2 * PROMPT_TOKENS)]
        text = f"{words[0]} {seed}"
        for word in words[1:]:
            tokens = backend.tokenize(GenerationRequest(prompt=text, raw=True)).tokens
            if len(tokens) >= PROMPT_TOKENS:
                break
            text += f" {word}"
        return text

    def cold_start(self, runs: int) -> Measurement:
        """Seconds from asking, with no engine process there, to the first text."""
        values = []
        for _ in range(runs):
            stop(self.settings, self.model, force=True)
            values.append(first_token(self.answer(GenerationRequest(prompt="Say hello.", max_tokens=8, temperature=0))))
            self.report(f"cold start: {values[-1]:.2f} s")
        return Measurement.of("cold engine start to first token", "s", values, "at most 15 s")

    def time_to_first_token(self, runs: int) -> Measurement:
        values = []
        for seed in range(runs + 1):
            request = GenerationRequest(prompt=self.prompt(seed), raw=True, max_tokens=8, temperature=0)
            result = self.answer(request)
            assert result.usage
            assert result.usage.prompt_tokens == PROMPT_TOKENS, result.usage
            values.append(first_token(result) * 1e3)
            self.report(f"first token: {values[-1]:.0f} ms")
        return Measurement.of(f"first token of a {PROMPT_TOKENS}-token prompt", "ms", values[1:], "at most 300 ms")

    def decode(self, runs: int) -> Measurement:
        """Tokens a second after the first; every run must write the same text."""
        request = GenerationRequest(
            prompt="Write a long story about a lighthouse keeper.", max_tokens=DECODE_TOKENS, temperature=0
        )
        values, texts = [], set()
        for _ in range(runs + 1):
            result = self.answer(request)
            if result.timings.tokens_per_second is None:
                raise MistralError("the answer was too short to time; see the engine's log")
            texts.add(result.text)
            values.append(result.timings.tokens_per_second)
            self.report(f"decode: {values[-1]:.1f} tokens/s")
        if len(texts) != 1:
            raise MistralError("greedy answers to one prompt differ: the engine is not correct, its speed is no result")
        return Measurement.of("decode, batch 1, greedy", "tokens/s", values[1:], "at least 60 tokens/s")


def first_token(result: Result) -> float:
    assert result.timings.ttft is not None
    return result.timings.ttft


def run(model: str = "embedded", runs: int = 5, path: Path | None = None) -> int:
    """Print the measurements, and the same as JSON; `path` takes the JSON instead. Returns the exit status.

    Raises `ConfigurationError` before it measures when `path` cannot be written.
    """
    if path is not None:
        check_writable(path)
    with tempfile.TemporaryDirectory(prefix="mistral-nb-bench-") as folder:
        os.environ |= {"MISTRAL_NB_RUNTIME_DIR": folder, "MISTRAL_NB_LOG_DIR": folder}
        settings = load_settings()
        bench = Bench(settings, model, lambda line: print(line, file=sys.stderr, flush=True))
        fetch(model)
        try:
            measurements = [bench.cold_start(max(1, runs // 2)), bench.time_to_first_token(runs), bench.decode(runs)]
        finally:
            stop(settings, model, force=True)
    assert bench.served is not None
    report = {**machine(), "model": bench.served.model, "device": bench.served.device}
    print(f"{report['model']} on {report['device']} ({report['cpu']}, {report['cores']} cores)")
    print_table(measurements)
    write_report(report, measurements, path)
    return 0


def fetch(model: str) -> None:
    """Pull a model that is known but not here, so that no measurement holds the pull."""
    try:
        locate(canonical(model))
    except ModelError:
        pull(model)
