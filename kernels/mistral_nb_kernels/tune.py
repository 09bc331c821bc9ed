"""Measures configs on this machine's GPU and writes the best into the table that is shipped.

`python -m mistral_nb_kernels.tune` times, for every op that the table has for this architecture, its candidates
(`bench`) in 16 bits as the engine runs them, and for weights of fewer, refuses those whose result is wrong at any
shape, and rewrites this architecture's rows of `configs.json`, with the device and the version of Triton as what they
were measured on. First all of them at one shape, then variants of the best at every shape, of which the least geometric
mean of times wins. The best so far is in the table at every moment.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from mistral_nb_kernels import configs
from mistral_nb_kernels.bench import TUNABLES
from mistral_nb_kernels.bench.case import Case, Tunable
from mistral_nb_kernels.bench.timing import device_facts, rotated, time_calls
from mistral_nb_kernels.configs import Config, Row

__all__ = ["main", "tune"]

KEPT = 4
"""Candidates of the first pass that go on to the second."""


def tune(
    tunable: Tunable, width: int, arch: int, device: torch.device | str = "cuda"
) -> Iterator[tuple[Config, float]]:
    """Better and better configs with the geometric mean of their milliseconds; prints every candidate's times."""
    dtype = torch.bfloat16 if arch >= 80 else torch.float16
    shapes = [rotated(functools.partial(make, width, dtype, device)) for make in tunable.shapes]
    first = {config: _mean(tunable, width, arch, config, shapes[:1]) for config in tunable.first}
    kept = sorted((config for config in first if first[config] < math.inf), key=first.__getitem__)[:KEPT]
    best = math.inf
    for config in dict.fromkeys(variant for each in kept for variant in tunable.variants(each)):
        mean = _mean(tunable, width, arch, config, shapes)
        if mean < best:
            best = mean
            yield config, mean


def _mean(tunable: Tunable, width: int, arch: int, config: Config, shapes: list[list[Case]]) -> float:
    """Infinite where the GPU has too little for the config, or its result is wrong."""
    kernel, times = tunable.kernel(config, arch), []
    name = f"{tunable.op} {width} {tunable.bits} {config}"
    for cases in shapes:
        try:
            wrong = cases[0].wrong(kernel)
        except OutOfResources as error:
            print(f"{name}: {error}", flush=True)
            return math.inf
        if wrong:
            print(f"{name}: WRONG, {wrong}", flush=True)
            return math.inf
        times.append(time_calls([case.call(kernel) for case in cases], repeats=10).ms)
    print(f"{name}: " + " ".join(f"{ms * 1e3:.1f}" for ms in times) + " us", flush=True)
    return math.exp(sum(map(math.log, times)) / len(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--op", choices=sorted({t.op for t in TUNABLES}), action="append", help="only this one; may be repeated"
    )
    parser.add_argument("--width", type=int, action="append", help="only rows of this head dimension")
    parser.add_argument("--bits", type=int, action="append", help="only rows of so many bits: a linear layer's weights")
    parser.add_argument("--table", type=Path, default=configs.PATH, help="the table to rewrite")
    args = parser.parse_args()
    facts = device_facts()
    arch = int(facts["capability"].replace(".", ""))
    failed = []
    for tunable in TUNABLES:
        for width in tunable.widths:
            asked = ((args.op, tunable.op), (args.width, width), (args.bits, tunable.bits))
            skipped = any(wanted and value not in wanted for wanted, value in asked)
            if skipped or configs.config_for(tunable.op, arch, width, tunable.bits) is None:
                continue
            row = None
            for config, _ in tune(tunable, width, arch):
                measured = f"{facts['device']}, triton {facts['triton']}"
                row = Row(tunable.op, arch, width, tunable.bits, config, measured)
                _replace(row, args.table)
            if row is None:
                failed.append(f"{tunable.op} {width} {tunable.bits}")
    if failed:
        sys.exit(f"no candidate of {', '.join(failed)} is right; make gpu says where, and the table keeps what it had")


def _replace(row: Row, path: Path) -> None:
    table = {(r.op, r.arch, r.width, r.bits): r for r in configs.read(path)}
    table[row.op, row.arch, row.width, row.bits] = row
    configs.write(tuple(table.values()), path)


if __name__ == "__main__":
    main()
