"""Measures configs on this machine's GPU and writes the best into the table that is shipped.

`python -m mistral_nb_kernels.tune` times every candidate of every op in 16 bits at the shapes that the engine serves,
refuses those whose result is wrong, and rewrites this architecture's rows of `configs.json`, with the device and the
version of Triton as what they were measured on. A config is chosen by the geometric mean over its op's shapes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.runtime.errors import OutOfResources

from mistral_nb_kernels import MODULES, configs, reference
from mistral_nb_kernels.bench.attention_cases import Case, decode_case, prefill_case, rope_case
from mistral_nb_kernels.bench.timing import device_facts, rotation, time_calls
from mistral_nb_kernels.configs import Config, Row

__all__ = ["candidates", "main", "tune"]

OPS = {
    "rope_write": "rope_write",
    "prefill_attention": "prefill_attention",
    "decode_attention": "rope_decode_attention",
}
"""Each op of the table, and the one that is timed for it."""
PAGE = 128
"""Tokens of a page while tuning: the longest tile of keys that a candidate has."""
TOLERANCE = 2e-2
"""Of a result in bf16, its distance from the reference in fp32 over the reference's norm: a gate, not the proof."""


def candidates(op: str) -> Iterator[Config]:
    if op == "rope_write":
        yield from (Config(warps) for warps in (1, 2, 4, 8))
    elif op == "decode_attention":
        for warps, stages, block_n, split in itertools.product((2, 4, 8), (2, 3, 4), (32, 64, 128), (128, 256, 512)):
            yield Config(warps, stages, block_n=block_n, split=split)
    else:
        for warps, stages, block_m, block_n in itertools.product((4, 8), (2, 3, 4), (64, 128), (32, 64, 128)):
            yield Config(warps, stages, block_m=block_m, block_n=block_n)


def cases(op: str, head_dim: int) -> list[list[Case]]:
    """Each shape with as many sets of inputs as keep L2 out of it."""
    makers = {
        "rope_write": [functools.partial(rope_case, t, head_dim, PAGE) for t in (2048, 8192)],
        "prefill_attention": [functools.partial(prefill_case, t, head_dim, PAGE) for t in (2048, 8192)],
        "decode_attention": [
            functools.partial(decode_case, batch, t, head_dim, PAGE)
            for batch, t in ((1, 2048), (1, 8192), (8, 2048), (1, 32768))
        ],
    }
    found = []
    for make in makers[op]:
        first = make()
        found.append([first, *(make() for _ in range(rotation(first.bytes, 16) - 1))])
    return found


def right(op: str, config: Config, case: Case) -> bool:
    """Whether a config's result is the reference's."""
    got = kernel(op, config)(*case.inputs).float()
    expected = getattr(reference, OPS[op])(*case.inputs).float()
    return bool((got - expected).norm() <= TOLERANCE * expected.norm())


def kernel(op: str, config: Config) -> functools.partial[torch.Tensor]:
    module = importlib.import_module(f"mistral_nb_kernels.{MODULES[OPS[op]]}")
    return functools.partial(getattr(module, OPS[op]), config=config)


def tune(op: str, head_dim: int) -> Row:
    """The best row of an op; prints every candidate's times."""
    shapes = cases(op, head_dim)
    best = (math.inf, Config(4))
    for config in candidates(op):
        try:
            if not right(op, config, shapes[0][0]):
                print(f"{op} {head_dim} {config}: WRONG", flush=True)
                continue
            times = [time_calls([c.call(kernel(op, config)) for c in sets], 10).ms for sets in shapes]
        except OutOfResources:
            continue
        mean = math.exp(sum(map(math.log, times)) / len(times))
        print(f"{op} {head_dim} {config}: " + " ".join(f"{ms * 1e3:.1f}" for ms in times) + " us", flush=True)
        best = min(best, (mean, config), key=lambda pair: pair[0])
    facts = device_facts()
    arch = int(facts["capability"].replace(".", ""))
    return Row(op, arch, head_dim, 16, best[1], f"{facts['device']}, triton {facts['triton']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=OPS, action="append", help="only this one; may be repeated")
    parser.add_argument("--head-dim", type=int, choices=configs.HEAD_DIMS, action="append")
    parser.add_argument("--out", type=Path, default=configs.PATH, help="the table to write")
    args = parser.parse_args()
    table = {(r.op, r.arch, r.width, r.bits): r for r in configs.read()}
    for op in args.op or OPS:
        for head_dim in args.head_dim or configs.HEAD_DIMS:
            row = tune(op, head_dim)
            table[row.op, row.arch, row.width, row.bits] = row
            configs.write(tuple(table.values()), args.out)


if __name__ == "__main__":
    main()
