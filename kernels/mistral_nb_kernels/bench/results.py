"""The figures of one `make gpu` part: rows with their shares of the limits, a JSON file and plots made of it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mistral_nb_kernels.bench import timing
from mistral_nb_kernels.bench.case import Case
from mistral_nb_kernels.bench.timing import Timing

__all__ = ["Plot", "Results"]

Ceiling = Literal["read_gbs", "copy_gbs"]
UNITS = {"tflops": "TFLOP/s", "gbs": "GB/s", "share": "share of the read ceiling", "us": "us"}


@dataclass(frozen=True, slots=True)
class Plot:
    """A column of the rows whose ops begin so, over another column; an axis for each value of `panels`."""

    name: str
    column: str
    ops: tuple[str, ...]
    over: str = "t"
    panels: str = "head_dim"


class Results:
    """Rows of `part`, whose every one of `sections` has to be `finished` before anything is written.

    facts: device, versions and ceilings, among them read_gbs and copy_gbs, which rows are held against.
    """

    def __init__(self, part: str, sections: Collection[str], facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)
        self.rows: list[dict[str, Any]] = []
        self._part = part
        self._missing = set(sections)

    def record(
        self,
        op: str,
        timing: Timing,
        case: Case,
        ceiling: Ceiling | None = None,
        **shape: Any,
    ) -> dict[str, Any]:
        """Prints and keeps a row: microseconds, TFLOP/s, GB/s, and its share of the measured `ceiling` and the data
        sheet's.
        """
        times = {name: round(getattr(timing, name), 2) for name in ("us", "p20", "p80")}
        row = {"op": op, **shape, **times}
        row |= {"tflops": round(case.flops / timing.ms / 1e9, 1), "gbs": round(case.bytes / timing.ms / 1e6)}
        if ceiling is not None:
            row["share"] = round(row["gbs"] / self.facts[ceiling], 3)
        unit = "tflops" if ceiling is None else "gbs"
        if f"spec_{unit}" in self.facts:
            row["share_of_spec"] = round(row[unit] / self.facts[f"spec_{unit}"], 3)
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    def timed(
        self,
        op: str,
        make: Callable[[], Case],
        function: Callable[..., Any],
        ceiling: Ceiling | None = None,
        **shape: Any,
    ) -> dict[str, Any]:
        """The row of `function`, once it has been right on a case."""
        return self.record(op, *timing.time_case(make, function), ceiling, **shape)

    def timed_peers(
        self,
        op: str,
        make: Callable[[], Case],
        peers: Callable[[Case], Mapping[str, Callable[[], Any]]],
        ceiling: Ceiling | None = None,
        **shape: Any,
    ) -> dict[str, dict[str, Any]]:
        """The rows of what others have for a case, by their names, which stand for {} in `op`."""
        found, case = timing.time_peers(make, peers)
        return {name: self.record(op.format(name), took, case, ceiling, **shape) for name, took in found.items()}

    def finished(self, section: str) -> None:
        self._missing.remove(section)

    def write(self, folder: Path, plots: Collection[Plot] = ()) -> Path | None:
        """<device>/<part>.json below `folder`, and plots where matplotlib is; None if a section is missing."""
        if self._missing:
            print(f"{self._part}: nothing is written, for {', '.join(sorted(self._missing))} did not run to its end")
            return None
        path = folder / re.sub(r"\W+", "-", self.facts["device"]).strip("-").lower() / f"{self._part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib") is not None:
            for plot in plots:
                self._plot(path, plot)
        return path

    def _plot(self, path: Path, plot: Plot) -> None:
        rows = [row for row in self.rows if row["op"].startswith(plot.ops)]
        panels = sorted({row[plot.panels] for row in rows}, reverse=True)
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(5.5 * len(panels), 4))
        for axis, panel in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            lines: dict[str, list[tuple[Any, float]]] = {}
            for row in rows:
                if row[plot.panels] == panel:
                    label = row["op"] + (f", batch {row['batch']}" if "batch" in row else "")
                    lines.setdefault(label, []).append((row[plot.over], row[plot.column]))
            for label, points in lines.items():
                axis.plot(*zip(*points, strict=True), marker="o", label=label)
            axis.set(title=f"{plot.panels} {panel}, {self.facts['dtype']}", ylabel=UNITS[plot.column])
            if plot.over == "t":
                axis.set(xlabel="tokens", xscale="log")
            axis.legend(fontsize=7)
        figure.suptitle(f"{self.facts['device']}, torch {self.facts['torch']}, triton {self.facts['triton']}")
        figure.savefig(path.with_name(f"{path.stem}-{plot.name}.png"), dpi=120, bbox_inches="tight")
