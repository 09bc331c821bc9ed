"""What the bench is asked for, and what it is asked about: the points of a sweep, and the subjects that they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mistral_nb_kernels.bench.case import Case, Device
from mistral_nb_kernels.bench.providers import Provider

__all__ = ["Asked", "Point", "Subject"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asked for.

    ops: of a subject's ops those to measure, by their names in `Ops`; none of them: those that it measures by default.
    The rest None: the subject's defaults for the device. seq: tokens of a prompt or a context, rows of a prompt for
    ops that have rows only; batch: sequences, the rows of a decoding step.
    """

    ops: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] | None = None
    seq: tuple[int, ...] | None = None
    batch: tuple[int, ...] | None = None
    providers: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One shape of an op in one type: a line of the table for each provider.

    case: the shape in words, by which results are compared; shape: the same by name. `make` gives it on a device with
    new random numbers.
    """

    op: str
    case: str
    shape: Mapping[str, int | str]
    dtype: torch.dtype
    make: Callable[[Device], Case]


@dataclass(frozen=True, slots=True)
class Subject:
    """One word of the command line. summary: its line in a list; axes: of "seq" and "batch" those that it has; ops:
    all that `Asked.ops` may name.
    """

    name: str
    summary: str
    axes: tuple[str, ...]
    ops: tuple[str, ...]
    points: Callable[[Asked, Device], list[Point]]
    providers: tuple[Provider, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Those of its providers, each once: one may do another part of each op."""
        return tuple(dict.fromkeys(provider.name for provider in self.providers))
