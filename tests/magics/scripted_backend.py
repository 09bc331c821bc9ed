"""A `Backend` that plays chunks; a step may also be an event to wait for, or an error to raise."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from mistral_nb.backends.pump import Emit, Line, Pump
from mistral_nb.types import Chunk, Description, GenerationRequest

Step = Chunk | threading.Event | BaseException
LIMIT = 60.0


class Scripted:
    """Answers with its steps, over the same pump as the real backends."""

    name = "scripted"

    def __init__(self, *steps: Step | str) -> None:
        self._steps: Iterable[Step] = [Chunk(text=step) if isinstance(step, str) else step for step in steps]

    def stream(self, request: GenerationRequest) -> Pump:
        return Pump(self._play)

    def describe(self) -> Description:
        return Description(self.name, "a script")

    def _play(self, line: Line, emit: Emit) -> None:
        for step in self._steps:
            if isinstance(step, threading.Event):
                assert step.wait(LIMIT)
            elif isinstance(step, BaseException):
                raise step
            else:
                emit(step)
        emit(Chunk(finish_reason="stop"))
