"""Pictures of `mistral-nb bench serve`, by matplotlib, which only they need."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mistral_nb.bench_client import Outcome, Run
from mistral_nb.bench_latency import Summary
from mistral_nb.errors import ConfigurationError, MissingDependency

__all__ = ["check_plots", "draw"]

_BINS = 60


def check_plots(folder: Path) -> None:
    """Make the folder. `MissingDependency` without matplotlib, `ConfigurationError` unless it can be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependency('--plot needs matplotlib: pip install "mistral-nb[plots]"')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be written ({error.strerror or error}); give --plot another folder"
        ) from error


def draw(runs: Sequence[Run], summaries: Sequence[Summary], folder: Path) -> Iterator[Path]:
    """Write the pictures: how latencies are distributed, what a load was like over its time, and loads compared."""
    pictures: dict[str, Callable[[], Any]] = {
        "latencies": lambda: _latencies(runs),
        "timeline": lambda: _timeline(runs),
    }
    if len(runs) > 1:
        pictures["loads"] = lambda: _loads(summaries)
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        picture().savefig(path, dpi=120, bbox_inches="tight")
        yield path


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(5.0 * columns, 3.4 * rows))
    return figure, figure.subplots(rows, columns, squeeze=False, sharex="col" if rows > 1 else False)


def _latencies(runs: Sequence[Run]) -> Any:
    """Shares of the values at most so long."""
    figure, axes = _figure(1, 3)
    kinds: dict[str, list[list[float | None]]] = {
        "first text (TTFT)": [[one.first for one in _whole(run)] for run in runs],
        "between texts (ITL)": [[*(gap for one in _whole(run) for gap in one.gaps)] for run in runs],
        "end to end": [[one.whole for one in _whole(run)] for run in runs],
    }
    for axis, (name, series) in zip(axes[0], kinds.items(), strict=True):
        for run, values in zip(runs, series, strict=True):
            ordered = sorted(1e3 * value for value in values if value is not None)
            if ordered:
                heights = [(place + 1) / len(ordered) for place in range(len(ordered))]
                axis.step(ordered, heights, where="post", label=str(run.load))
        axis.set(title=name, xlabel="ms", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="share of the values")
    _legend(axes[0][0])
    return figure


def _timeline(runs: Sequence[Run]) -> Any:
    """Of each load: what was under way, texts a second, and each request's first text."""
    figure, axes = _figure(3, len(runs))
    for column, run in enumerate(runs):
        width = max(run.seconds / _BINS, 1e-3)
        changes = sorted(change for one in run.outcomes for change in ((one.sent, 1), (one.ended, -1)))
        level, levels = 0, []
        for _, change in changes:
            level += change
            levels.append(level)
        axes[0][column].step([at for at, _ in changes], levels, where="post")
        axes[0][column].set(title=str(run.load), ylim=(0, None))
        texts = [at for one in run.outcomes for at in one.texts]
        counts = [0] * (_BINS + 1)
        for at in texts:
            counts[min(_BINS, int(at / width))] += 1
        axes[1][column].step([place * width for place in range(_BINS + 1)], [n / width for n in counts], where="post")
        axes[1][column].set(ylim=(0, None))
        firsts = [(one.due, 1e3 * one.first) for one in run.outcomes if one.first is not None]
        axes[2][column].plot(*zip(*firsts, strict=True) if firsts else ((), ()), ".", markersize=4)
        axes[2][column].set(xlabel="seconds", ylim=(0, None))
    for row, name in enumerate(("under way", "texts/s", "TTFT, ms")):
        axes[row][0].set(ylabel=name)
    return figure


def _loads(summaries: Sequence[Summary]) -> Any:
    """What each load got: throughput, and the latencies that it cost."""
    figure, axes = _figure(1, 3)
    rates = all(each.rate is not None for each in summaries)
    over = [each.rate if rates else each.concurrency for each in summaries]
    axes[0][0].plot(over, [each.tokens_per_s for each in summaries], marker="o")
    axes[0][0].set(title="tokens/s written", ylim=(0, None))
    axes[0][1].plot(over, [each.requests_per_s for each in summaries], marker="o", label="answers/s")
    if all(each.goodput is not None for each in summaries):
        axes[0][1].plot(over, [each.goodput for each in summaries], marker="o", label="goodput/s")
    axes[0][1].set(title="answers and goodput", ylim=(0, None))
    _legend(axes[0][1])
    for name, latencies in {"TTFT": [each.ttft for each in summaries], "ITL": [each.itl for each in summaries]}.items():
        for which in ("p50", "p99"):
            points = [(x, getattr(one, which)) for x, one in zip(over, latencies, strict=True) if one.count]
            axes[0][2].plot(*zip(*points, strict=True) if points else ((), ()), marker="o", label=f"{name} {which}")
    axes[0][2].set(title="latency, ms", yscale="log")
    _legend(axes[0][2])
    for axis in axes[0]:
        axis.set(xlabel="requests/s" if rates else "requests at once")
        axis.grid(alpha=0.3)
    return figure


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def _whole(run: Run) -> list[Outcome]:
    return [outcome for outcome in run.outcomes if not outcome.error]
