"""What a candidate becomes ahead of time, told in events by a process of its own, which never launches a kernel."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import torch

from mistral_nb_kernels.bench.events import Lines
from mistral_nb_kernels.bench.subject import Asked
from mistral_nb_kernels.bench.tether import fasten

if TYPE_CHECKING:
    from mistral_nb_kernels.bench.candidate.compiled import CompiledKernel

__all__ = ["main"]


def main() -> int:
    """`python -m mistral_nb_kernels.bench.compiling OP JSON`: the source is read from the standard input."""
    from mistral_nb_kernels.bench.candidate import CandidateError, load
    from mistral_nb_kernels.bench.candidate.compiled import compiled, report

    fasten()
    lines = Lines()
    op, asked = sys.argv[1], json.loads(sys.argv[2])
    dtypes = tuple(getattr(torch, name) for name in asked["dtypes"])
    seq, batch = (tuple(asked[name] or ()) or None for name in ("seq", "batch"))
    wanted = Asked(dtypes=dtypes or None, seq=seq, batch=batch)
    try:
        candidate = load(sys.stdin.buffer.read().decode(), op)
        kernels = []
        for done, arch in enumerate(asked["archs"]):
            lines.send("doing", text=f"compiling for sm_{arch}", done=done, total=len(asked["archs"]))
            kernels += [_sent(each, lines) for each in compiled(candidate, op, [arch], wanted)]
    except CandidateError as error:
        lines.send("error", text=str(error))
        return 1
    lines.send("report", markdown=report(kernels, markdown=True), text=report(kernels, markdown=False))
    return 0


def _sent(kernel: CompiledKernel, lines: Lines) -> CompiledKernel:
    for kind, text in (("ptx", kernel.ptx), ("sass", kernel.sass)):
        lines.send("code", kernel=kernel.kernel, arch=kernel.name, kind=kind, text=text)
    return kernel


if __name__ == "__main__":
    sys.exit(main())
