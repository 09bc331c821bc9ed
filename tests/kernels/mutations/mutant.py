"""One line of a kernel, broken."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """`old`, found once in the module, becomes `new`; `tests` are the module's."""

    what: str
    module: str
    tests: str
    old: str
    new: str
