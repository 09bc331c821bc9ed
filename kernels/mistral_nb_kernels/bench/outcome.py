"""What a run of the bench comes to: its results shown, drawn, and held against older ones, and its exit status."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from mistral_nb_kernels.bench.arguments import Options
from mistral_nb_kernels.bench.compare import compare
from mistral_nb_kernels.bench.events import Sink
from mistral_nb_kernels.bench.figures import MissingPlots, figures
from mistral_nb_kernels.bench.record import Record, read
from mistral_nb_kernels.bench.table import table

__all__ = ["INTERRUPTED", "Outcome", "Refused", "Results", "read_record"]

INTERRUPTED = 130
"""The exit status of a run that an interrupt ended."""


class Refused(Exception):
    """Why it cannot be done, in words for the user."""


@dataclass(slots=True)
class Outcome:
    """How a run ended: its exit status, whether all was measured, where the results are, and what went wrong."""

    status: int = 0
    complete: bool = True
    saved: Path | None = None
    error: str = ""


class Results:
    """A record, shown: it may be one that was measured before. `old`: what it is held against."""

    def __init__(self, options: Options, sink: Sink, record: Record, old: Record | None) -> None:
        self.options, self.sink, self.record, self.old = options, sink, record, old
        self.outcome = Outcome()

    def shown(self) -> Outcome:
        """Table, rows, pictures, notes and the comparison, in this order: the first are there if the last fail."""
        record, sink = self.record, self.sink
        sink.send("table", markdown=table(record, markdown=True), text=table(record))
        sink.send("rows", rows=record.tidy())
        notes = [*record.notes, *self._draw()]
        for note in notes:
            sink.send("note", text=note)
        self._compare()
        return self.outcome

    def _draw(self) -> list[str]:
        """A remark where there are no pictures."""
        folder = self.options.plot
        if not (folder or self.sink.fills) or not self.record.rows:
            return []
        try:
            drawn = figures(self.record)
        except MissingPlots as missing:
            return [str(missing)]
        for figure in drawn:
            path = self._written(folder / f"{figure.name}.png", figure.png) if folder else None
            png = base64.b64encode(figure.png).decode()
            self.sink.send("figure", name=figure.name, alt=figure.alt, png=png, saved=path)
        return []

    def _written(self, path: Path, content: bytes) -> str | None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            self.outcome.status = 1
            self.outcome.error = f"{path} cannot be written ({error.strerror}); give --plot another folder"
            return None
        return str(path)

    def _compare(self) -> None:
        if self.old is None:
            return
        try:
            comparison = compare(self.old, self.record, self.options.tolerance)
        except ValueError as error:
            self.outcome.status, self.outcome.error = 1, f"{self.options.compare}: {error}"
            return
        text, markdown = comparison.table(), comparison.table(markdown=True)
        self.sink.send("verdict", text=text, markdown=markdown, regressed=comparison.regressed)
        self.outcome.status = self.outcome.status or int(comparison.regressed)


def read_record(path: Path) -> Record:
    """Raises `Refused`."""
    try:
        return read(path)
    except ValueError as error:
        raise Refused(str(error)) from error
