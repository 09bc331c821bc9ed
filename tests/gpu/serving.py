"""What `make gpu PART=serve` measures in one engine: many at once, each with its adapter; swaps and loadings of them.

All are asked in this process, and nothing but the engine's own thread is between its steps.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import torch

from mistral_nb.bench_report import Measurement
from mistral_nb.bench_turns import Report, texts
from mistral_nb.checkpoints import ModelArgs
from mistral_nb.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE, features
from mistral_nb.checkpoints.adapter_tensors import MODULES
from mistral_nb.checkpoints.memory import Precision
from mistral_nb.engine import AdapterSource, Engine, Sampling
from mistral_nb.engine.scheduler import Token
from mistral_nb.errors import EngineError

__all__ = ["COLUMNS", "Asked", "Row", "Serving", "Setup", "largest_gap", "same_so_far", "write_adapter"]

GREEDY = Sampling(temperature=0.0)
PATIENCE = 300.0
"""Seconds for one answer, in which a step may be compiled and captured."""
SHORT = 16
"""Tokens of prompts where the prompt is not what is measured."""
STREAMED = 10
"""Tokens of a stream before something happens beside it, and after."""
COLUMNS = "batch adapters  step, ms (p20..p80)       tokens/s  more  at most    goal  same"


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured, of the model in whose `folder` there is a config: answers of `tokens` tokens to prompts of
    `prompt` in `batches`, so often; `adapters` different ones of `rank`; so many swaps and loadings;
    prompts of `read_again` tokens, each asked twice.

    Up to `alone` at once have to write what each writes alone.
    """

    folder: Path
    device: str
    precision: Precision
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32)
    prompt: int = 128
    tokens: int = 64
    runs: int = 5
    adapters: int = 8
    rank: int = 16
    swaps: int = 30
    loads: int = 5
    alone: int = 8
    read_again: int = 1500
    context: int = 2048

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Batches, and how many adapters are among their rows: none, one each, and one for all."""
        found = [(batch, some) for batch in self.batches for some in (0, min(batch, self.adapters))]
        return [*found, (self.adapters, 1)] if self.adapters in self.batches[1:] else found


@dataclass(frozen=True, slots=True)
class Row:
    """One way to decode: `more` is what adapters add, as a share of the same step without, `most` and `goal` what they
    may; `same` how many of the tokens are as alone, of those whose text before is.
    """

    engine: str
    batch: int
    adapters: int
    step: Measurement
    more: float | None = None
    most: float | None = None
    goal: float | None = None
    same: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.step.median * 1e3

    def __str__(self) -> str:
        spread = f"({self.step.p20:.4g}..{self.step.p80:.4g})"
        shares = [f"{share:>8.1%}" if share is not None else " " * 8 for share in (self.most, self.goal)]
        more = f"{self.more:>+7.1%}" if self.more is not None else " " * 7
        same = f"{self.same:>6.0%}" if self.same is not None else ""
        timed = f"{self.step.median:>9.4g} {spread:<20}{self.tokens_per_second:>9.4g}"
        return f"{self.batch:>5}{self.adapters:>9}{timed}{more}{shares[0]}{shares[1]}{same}"


class Asked:
    """A request, whose tokens are kept with the seconds at which they came."""

    def __init__(self, engine: Engine, prompt: list[int], tokens: int, adapter: AdapterSource | None = None) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self._tokens = tokens
        self._error = ""
        self._over = False
        self._change = threading.Condition()
        self.began = time.perf_counter()
        self.generation = engine.submit(prompt, GREEDY, tokens, on_token=self._take, adapter=adapter)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.began

    def has(self, tokens: int) -> None:
        """Wait for so many. `EngineError` where it ends before."""
        with self._change:
            self._change.wait_for(lambda: self._over or len(self.ids) >= tokens, PATIENCE)
            if len(self.ids) < tokens:
                raise EngineError(f"{len(self.ids)} of {tokens} tokens were written ({self._error or 'no error'})")

    def finished(self) -> Asked:
        self.has(self._tokens)
        return self

    def _take(self, token: Token) -> None:
        with self._change:
            if token.id is not None:
                self.ids.append(token.id)
                self.times.append(time.perf_counter())
            self._over, self._error = token.finish_reason is not None, token.error
            self._change.notify_all()


class Serving:
    """An engine with random weights, and its adapters in `folder`, of which none is loaded yet."""

    def __init__(self, setup: Setup, folder: Path, report: Report) -> None:
        self._setup = setup
        self._report = report
        self._args = ModelArgs.from_folder(setup.folder)
        self.adapters = [folder / str(index) for index in range(setup.adapters)]
        for index, each in enumerate(self.adapters):
            write_adapter(each, self._args, setup.rank, index)
        self._alone: dict[tuple[int, int | None], list[int]] = {}
        self._new = count()
        self.engine = Engine.load(
            setup.folder,
            device=setup.device,  # type: ignore[arg-type]
            precision=setup.precision,
            context=setup.context,
            max_batch=max(setup.batches),
            random=True,
            lora_rank=setup.rank,
        )

    def close(self) -> None:
        self.engine.close()

    def prompt(self, row: int) -> list[int]:
        return texts(row, self._setup.prompt, self._args.vocab_size)

    def written(self, row: int, adapter: int | None) -> list[int]:
        """What the prompt of a row is answered alone."""
        if (row, adapter) not in self._alone:
            asked = Asked(self.engine, self.prompt(row), self._setup.tokens, self._source(adapter))
            self._alone[row, adapter] = asked.finished().ids
        return self._alone[row, adapter]

    def first_adapter(self) -> dict[str, float]:
        """What the first of all costs a stream, which has had a request of the base beside it before."""
        self._beside(None)
        found = self._beside(AdapterSource("first", self.adapters[0]))
        self._report(f"the first adapter: a gap of {found['gap_ms']:.1f} ms beside it")
        return found

    def loadings(self) -> dict[str, Any]:
        """Of adapters that are not in a slot: the largest gap in a stream beside each, the same beside as many requests
        of the base, and the milliseconds to the first token.
        """
        folders = [self.adapters[index % len(self.adapters)] for index in range(self._setup.loads + 1)]
        pairs = [(self._beside(None), self._beside(AdapterSource(f"new {next(self._new)}", one))) for one in folders]
        bare, found = ([pair[side] for pair in pairs[1:]] for side in (0, 1))
        gaps = [one["gap_ms"] for one in found]
        self._report(f"loading an adapter: gaps of {', '.join(f'{gap:.1f}' for gap in gaps)} ms beside it")
        seconds = [one["first_ms"] for one in found]
        return {
            "gaps_ms": gaps,
            "bare_gaps_ms": [one["gap_ms"] for one in bare],
            "first": asdict(Measurement.of("first token of an adapter that is loaded for it", "ms", seconds, "")),
        }

    def again(self) -> dict[str, Any]:
        """Prompts that nobody asked before, and the same once more: how many tokens of those are taken over, and the
        milliseconds to the first token.
        """
        fresh, again, reused = [], [], 0
        for turn in range(self._setup.runs + 1):
            prompt = texts(1000 + turn, self._setup.read_again, self._args.vocab_size)
            one, other = (Asked(self.engine, prompt, 2).finished() for _ in range(2))
            if one.ids != other.ids:
                raise EngineError("a prompt that is asked again is answered otherwise")
            reused = other.generation.reused
            if turn:
                fresh.append(one.first * 1e3)
                again.append(other.first * 1e3)
        return {
            "tokens": self._setup.read_again,
            "reused": reused,
            "fresh": asdict(Measurement.of("first token of a prompt", "ms", fresh, "")),
            "again": asdict(Measurement.of("first token of a prompt that was asked before", "ms", again, "")),
        }

    def swaps(self) -> tuple[Measurement, Measurement]:
        """Milliseconds to the first token of a short prompt: with the adapter of the request before, and with another
        one in a slot.
        """
        again, other = [], []
        prompt = texts(0, SHORT, self._args.vocab_size)
        for index in range(2 * self._setup.swaps + 2):
            asked = Asked(self.engine, prompt, 1, self._source(index // 2 % 2)).finished()
            if index > 1:
                (again if index % 2 else other).append(asked.first * 1e3)
        return (
            Measurement.of("first token, the same adapter", "ms", again, ""),
            Measurement.of("first token, another adapter", "ms", other, ""),
        )

    def rows(self, bars: dict[tuple[int, int], tuple[float, float]]) -> list[Row]:
        """Each of the cases in turn, round after round, of which the first does not count; `bars` by case."""
        found: dict[tuple[int, int], list[float]] = {case: [] for case in self._setup.cases}
        same: dict[tuple[int, int], list[float]] = {case: [] for case in self._setup.cases}
        for turn in range(self._setup.runs + 1):
            for case in self._setup.cases:
                seconds, agreed = self._step(*case)
                if turn:
                    found[case].append(seconds * 1e3)
                    same[case].append(agreed)
                    self._report(f"{case[0]} at once, {case[1]} adapters: {seconds * 1e3:.3f} ms a step")
        return list(self._compared(found, same, bars))

    def _compared(
        self,
        found: dict[tuple[int, int], list[float]],
        same: dict[tuple[int, int], list[float]],
        bars: dict[tuple[int, int], tuple[float, float]],
    ) -> Iterator[Row]:
        """Rounds are compared with themselves: `more` is the median of their shares."""
        for (batch, adapters), steps in found.items():
            pairs = zip(steps, found[batch, 0], strict=True)
            more = statistics.median(own / bare - 1 for own, bare in pairs) if adapters else None
            most, goal = bars.get((batch, adapters), (None, None))
            step = Measurement.of(f"a step of {batch} with {adapters} adapters", "ms", steps, "")
            yield Row("mistral-nb", batch, adapters, step, more, most, goal, min(same[batch, adapters]))

    def _step(self, batch: int, adapters: int) -> tuple[float, float]:
        """Seconds of one of the steps in which all decode, and how many of the tokens are as alone."""
        used = [row % adapters if adapters else None for row in range(batch)]
        alone = [self.written(row, adapter) for row, adapter in enumerate(used)]
        tokens = self._setup.tokens + batch
        asked = [
            Asked(self.engine, self.prompt(row), tokens, self._source(adapter)) for row, adapter in enumerate(used)
        ]
        for each in asked:
            each.finished()
        begin, end = max(each.times[0] for each in asked), min(each.times[-1] for each in asked)
        steps = [after - before for before, after in pairwise(asked[0].times) if begin <= before and after <= end]
        return statistics.median(steps), same_so_far([each.ids for each in asked], alone)

    def _source(self, adapter: int | None) -> AdapterSource | None:
        return None if adapter is None else AdapterSource(str(adapter), self.adapters[adapter])

    def _beside(self, adapter: AdapterSource | None) -> dict[str, float]:
        """A request beside a stream of the base: the largest gap in that, and the time to the first token, in ms."""
        stream = Asked(self.engine, self.prompt(0), self._setup.context - self._setup.prompt)
        stream.has(STREAMED)
        prompt = texts(1, SHORT, self._args.vocab_size)
        asked = Asked(self.engine, prompt, STREAMED, adapter).finished()
        stream.has(len(stream.ids) + 2)
        stream.generation.cancel()
        gap = largest_gap(stream.times, asked.began, asked.times[-1])
        return {"gap_ms": gap * 1e3, "first_ms": asked.first * 1e3}


def largest_gap(times: Sequence[float], begin: float, end: float) -> float:
    """Between two tokens, of the gaps that lie between `begin` and `end`, if only in part."""
    return max(after - before for before, after in pairwise(times) if after >= begin and before <= end)


def same_so_far(texts: Sequence[Sequence[int]], alone: Sequence[Sequence[int]]) -> float:
    """Of the tokens whose text before is the same as alone, the share that is: after the first that differs none is
    counted.
    """
    same = differ = 0
    for text, own in zip(texts, alone, strict=True):
        begun = next((at for at, (one, other) in enumerate(zip(text, own, strict=False)) if one != other), None)
        same += len(own) if begun is None else begun
        differ += begun is not None
    return same / (same + differ)


def write_adapter(folder: Path, args: ModelArgs, rank: int, seed: int) -> None:
    """An adapter of every projection in bf16, as PEFT lays it out; an update is about a tenth of the outputs."""
    folder.mkdir(parents=True)
    generator, sizes = torch.Generator().manual_seed(seed), features(args)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(args.n_layers):
        for module, (into, out) in MODULES.items():
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_"
            shapes |= {f"{name}A.weight": (rank, sizes[into]), f"{name}B.weight": (sizes[out], rank)}
    header: dict[str, Any] = {}
    at = 0
    for name, (rows, columns) in shapes.items():
        end = at + 2 * rows * columns
        header[name] = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [at, end]}
        at = end
    told = json.dumps(header).encode()
    with (folder / WEIGHTS_FILE).open("wb") as file:
        file.write(len(told).to_bytes(8, "little") + told)
        for name, shape in shapes.items():
            size = 0.1 if "lora_B" in name else 1.0
            values = torch.randn(shape, generator=generator) * (size * shape[1] ** -0.5)
            file.write(values.bfloat16().view(torch.uint8).numpy().tobytes())
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0}
    config |= {"target_modules": list(MODULES), "bias": "none", "inference_mode": True}
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": "random"}))
