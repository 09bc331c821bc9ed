"""The bench's command with a script in place of the measuring, for a process of its own.

`python scripted_bench.py PLAN ARGUMENTS`: rows that take as many microseconds as PLAN says, 100 as a rule; in the plan
"hang" the second case ends by an interrupt alone, in "deaf" the interrupt's exception is lost there, in "die" the case
ends the measuring by an error, "stuck" is a case that only a signal ends which nobody can catch, and "large" has an
event that is more than a pipe holds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from mistral_nb_kernels.bench import run
from mistral_nb_kernels.bench.__main__ import main
from mistral_nb_kernels.bench.measure import Begin, Doing, Event
from mistral_nb_kernels.bench.record import Ceilings, Row, Skipped

DEVICE = "A machine that plays a script"
CEILINGS = Ceilings(read_gbs=10.0, copy_gbs=8.0, matmul_tflops={"fp32": 0.1})


def row(tokens: int, provider: str, us: float) -> Row:
    shape = {"tokens": tokens, "dim": 64}
    name = {"op": "add_rms_norm", "case": f"{tokens} tokens", "shape": shape, "dtype": "fp32", "provider": provider}
    times = {"us": us * tokens, "p20": us * tokens * 0.99, "p80": us * tokens * 1.01, "runs": 50}
    return Row(**name, **times, flops=4000 * tokens, bytes=8000 * tokens, timer="wall")


def script(plan: str) -> Iterator[Event]:
    us = float(plan) if plan.isdigit() else 100.0
    print("a library prints")
    os.write(1, b"and writes\n")
    yield Begin(3)
    yield Doing(0, 3, "add_rms_norm", "1 tokens", "fp32", "ours")
    name = {"op": "add_rms_norm", "case": "1 tokens", "dtype": "fp32", "provider": "ours"}
    yield Skipped(**name, kind="absent", why="no NVIDIA GPU with Triton")
    yield Doing(1, 3, "add_rms_norm", "1 tokens", "fp32", "eager")
    yield row(1, "eager", us)
    yield Doing(2, 3, "add_rms_norm", "2 tokens", "fp32", "eager")
    if plan == "die":
        raise RuntimeError("the driver is gone")
    if plan == "stuck":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if plan == "large":
        yield Doing(2, 3, "add_rms_norm", "2" * 1_000_000, "fp32", "eager")
    if plan in ("hang", "deaf", "stuck"):
        try:
            print("nothing more comes", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            if plan == "hang":
                raise
    yield row(2, "eager", us)


def played(plan: str, arguments: list[str]) -> int:
    def measure(*_: Any) -> Iterator[Event]:
        return script(plan)

    run.measure = measure  # type: ignore[assignment]
    run.ceilings = lambda device, dtypes: CEILINGS
    run.machine = lambda device: {"device": DEVICE, "kind": "cpu", "cores": 2, "threads": 2, "torch": "2", "load": 0.0}
    return main(arguments)


if __name__ == "__main__":
    sys.exit(played(sys.argv[1], sys.argv[2:]))
