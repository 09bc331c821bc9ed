"""transformers and peft beside the engine, on the same random weights and the same adapters, in the same run."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mistral_nb.bench_peers import PEERS, two_calls
from mistral_nb.bench_report import Measurement
from mistral_nb.bench_turns import Report
from tests.gpu.serving import Row, Setup

__all__ = ["PeftPeer", "lacking"]

THREADS = 8
COMPILED = "compiled"


def lacking() -> str:
    """Why there is no such peer here; empty where there is."""
    missing = [name for name in ("transformers", "peft") if importlib.util.find_spec(name) is None]
    return f"not measured beside: no {' and no '.join(missing)} here" if missing else ""


class PeftPeer:
    """A model of transformers that `wrap` gives adapters.

    Steps are eager, whatever the batch; on a GPU those of one sequence compiled with a static cache too.
    """

    def __init__(self, setup: Setup, adapters: Sequence[Path], report: Report) -> None:
        options = {"folder": setup.folder, "device": setup.device, "precision": setup.precision, "threads": THREADS}
        self._plain = PEERS["transformers"].runs(argparse.Namespace(**options, random=True))
        self._torch: Any = importlib.import_module("torch")
        self._setup = setup
        self._adapters = [str(index) for index in range(len(adapters))]
        self._folders = adapters
        self._report = report
        self._wrapped: Any = None

    def wrap(self) -> None:
        """From here on the model is peft's, with the first adapter for all unless it is told, in the model's type.

        With the next length of a cache everything is compiled anew, and there is none of length 0.
        """
        peft: Any = importlib.import_module("peft")
        for name, folder in zip(self._adapters, self._folders, strict=True):
            how = {"adapter_name": name, "autocast_adapter_dtype": False}
            if self._wrapped is None:
                self._wrapped = peft.PeftModel.from_pretrained(self._plain._model, folder, **how)
            else:
                self._wrapped.load_adapter(folder, **how)
        self._wrapped.eval()
        self._plain._length = 0

    def rows(self, prompts: Sequence[list[int]]) -> list[Row]:
        """Without adapters, and wrapped with one and with one for each of a batch; what does not run is told."""
        most = len(self._adapters)
        bare = list(self._measured("transformers", [(1, 0), (most, 0)], prompts))
        self.wrap()
        return [*bare, *self._measured("peft", [(1, 1), (most, 1), (most, most)], prompts)]

    def score(self, adapter: int, prompt: list[int], ids: list[int]) -> dict[str, float]:
        """What peft thinks of a greedy text with an adapter: see `bench_peers.Transformers.score`."""
        self._wrapped.set_adapter(self._adapters[adapter])
        found: dict[str, float] = self._plain.score(prompt, ids)
        self._wrapped.set_adapter(self._adapters[0])
        return found

    def _measured(self, name: str, cases: Sequence[tuple[int, int]], prompts: Sequence[list[int]]) -> Iterator[Row]:
        ways = ["eager", COMPILED] if self._setup.device == "cuda" else ["eager"]
        for batch, adapters in cases:
            for way in ways if batch == 1 else ways[:1]:
                engine = f"{name}, {way}"
                try:
                    steps = [self._step(prompts[:batch], adapters, way) * 1e3 for _ in range(self._setup.runs + 1)]
                except RuntimeError as error:
                    self._report(f"{engine}, {batch} at once: does not run ({str(error)[:200]})")
                    continue
                self._report(f"{engine}, {batch} at once, {adapters} adapters: {min(steps[1:]):.3f} ms a step")
                step = Measurement.of(f"a step of {batch} with {adapters} adapters", "ms", steps[1:], "")
                yield Row(engine, batch, adapters, step)

    def _step(self, prompts: Sequence[list[int]], adapters: int, way: str) -> float:
        """Seconds of one."""
        tokens = self._setup.tokens
        if way == COMPILED:
            found = self._plain.answer(prompts[0], tokens)
        else:
            found = two_calls(lambda count: self._generate(prompts, adapters, count), tokens)
        return float(found["last"] - found["first"]) / (tokens - 1)

    def _generate(self, prompts: Sequence[list[int]], adapters: int, tokens: int) -> list[int]:
        ids = self._torch.tensor(prompts, device=self._setup.device)
        how: dict[str, Any] = {"attention_mask": self._torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        how |= {"max_new_tokens": tokens, "eos_token_id": None}
        if adapters > 1:
            how["adapter_names"] = [self._adapters[row % adapters] for row in range(len(prompts))]
        model = self._wrapped if adapters else self._plain._model
        with self._torch.inference_mode():
            written = model.generate(input_ids=ids, **how)
        return list(written[0, ids.shape[1] :].tolist())

    def close(self) -> None:
        self._wrapped = self._plain = None
        with suppress(RuntimeError):
            self._torch.cuda.empty_cache()
