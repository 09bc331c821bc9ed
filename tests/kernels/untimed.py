"""A machine that takes a millisecond for everything: what measures runs on it without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mistral_nb_kernels import tune
from mistral_nb_kernels.bench import timing
from mistral_nb_kernels.bench.timing import Timing

FACTS = {"device": "A card, 80GB", "capability": "7.5", "torch": "2", "triton": "3", "dtype": "float16"}
FACTS |= {"read_gbs": 100, "copy_gbs": 50, "spec_gbs": 200, "spec_tflops": 1}


def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run once each, two cases of a shape."""

    def time_calls(calls: list[Callable[[], Any]], device: Any = "cuda", repeats: int = 20) -> Timing:
        for call in calls:
            call()
        return Timing(1000.0, 900.0, 1100.0, repeats, "graph")

    for module in (timing, tune):
        monkeypatch.setattr(module, "time_calls", time_calls)
        monkeypatch.setattr(module, "rotated", lambda make: [make(), make()])
        monkeypatch.setattr(module, "device_facts", lambda: FACTS)
    monkeypatch.setattr(timing, "read_ceiling", lambda: 100.0)
    monkeypatch.setattr(timing, "copy_ceiling", lambda: 50.0)
