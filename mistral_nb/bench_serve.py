"""`mistral-nb bench serve`: an engine under load over HTTP: TTFT, inter-token latency, throughput and goodput.

The engine is one of its own, in a runtime folder that ends with the benchmark, or one that runs at an address. Requests
come at a rate, independent of the answers, or a number of them is kept under way; more than one rate or number makes a
series. Before the first load every adapter, and the model alone, is asked once: what cannot be answered is an error
then.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mistral_nb import runtime
from mistral_nb.backends.local import Local, title
from mistral_nb.backends.lookup import check_address
from mistral_nb.bench import fetch
from mistral_nb.bench_client import Outcome, Run, Target, measure
from mistral_nb.bench_latency import PERCENTILES, Latency, Limits, Summary, summarise
from mistral_nb.bench_plots import check_plots, draw
from mistral_nb.bench_report import check_writable, machine, write_report
from mistral_nb.bench_workload import Ask, Lengths, Load, Words, Workload
from mistral_nb.config import MAX_REQUESTS, load_settings
from mistral_nb.engine_control import stop
from mistral_nb.errors import BackendError, ConfigurationError
from mistral_nb.secret import Secret
from mistral_nb.tables import indent, table
from mistral_nb.types import GenerationRequest

__all__ = ["Plan", "run", "told"]

_LATE = 10.0
"""Milliseconds: where the latest hundredth of the requests was sent later than that, the client did not keep up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: the `workload` under each of `loads`, of the engine at `url`, or else of one that is started
    with `model` and `engine`, which are settings by name. `timeout` is in seconds, for a whole answer.
    """

    workload: Workload
    loads: Sequence[Load]
    limits: Limits = field(default_factory=Limits)
    model: str = "embedded"
    url: str | None = None
    engine: dict[str, str] = field(default_factory=dict)
    timeout: float = 300.0


def run(plan: Plan, path: Path | None = None, plots: Path | None = None) -> int:
    """Print the tables, and the same as JSON; `path` takes the JSON instead, with every request. The exit status: 1
    where a request of a load failed.

    `plots` is a folder for pictures. Raises `ConfigurationError` before it measures when either cannot be written,
    `MistralError` when the engine does not answer what the load consists of.
    """
    if path is not None:
        check_writable(path)
    if plots is not None:
        check_plots(plots)
    with ExitStack() as stack:
        target = _running(plan) if plan.url else _started(plan, stack)
        health = target.health()
        words = Words.measured(target.count)
        _try_out(target, health["model"], plan.workload, words)
        runs = list(_runs(target, health["model"], plan, words))
    summaries = [summarise(each, plan.limits) for each in runs]
    where = ", ".join(str(health[name]) for name in ("device", "precision") if health.get(name))
    print("\n".join([f"{title(health['model'])} on {where}, {_asked(plan.workload)}", *told(summaries, plan.limits)]))
    report = {**machine(), "model": health["model"], "device": where, "url": plan.url, "plan": _described(plan)}
    if path is not None:
        report["answers"] = [[_record(outcome) for outcome in each.outcomes] for each in runs]
    write_report(report, summaries, path)
    for picture in draw(runs, summaries, plots) if plots is not None else ():
        print(picture, file=sys.stderr)
    return int(any(each.errors for each in summaries))


def _started(plan: Plan, stack: ExitStack) -> Target:
    """An engine that ends with the `stack`. All that a load keeps under way at once have a place there."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mistral-nb-bench-"))
    os.environ |= {"MISTRAL_NB_RUNTIME_DIR": folder, "MISTRAL_NB_LOG_DIR": folder}
    os.environ |= {f"MISTRAL_NB_{name.upper()}": value for name, value in plan.engine.items()}
    settings = load_settings()
    fetch(plan.model)
    most = max(load.concurrency or 0 for load in plan.loads)
    backend = Local(settings, plan.model, max(MAX_REQUESTS, most))
    stack.callback(stop, settings, plan.model, force=True)
    print("starting the engine", file=sys.stderr, flush=True)
    backend.tokenize(GenerationRequest(prompt="Hello"))
    record = runtime.read_record(backend.model)
    assert record is not None
    return Target(record.base_url, Secret(record.token), plan.timeout, Secret(record.proof))


def _running(plan: Plan) -> Target:
    """The engine at the plan's address, with its record's token where this user started it, else with the settings'."""
    assert plan.url is not None
    url = plan.url.rstrip("/")
    host = check_address(url, "--url")
    own = _record_at(url)
    token = Secret(own.token) if own else load_settings().server_token
    if token is None:
        raise ConfigurationError(
            f"the engine at {host} needs its token: set MISTRAL_NB_SERVER_TOKEN to the one that it was given, or that "
            "`mistral-nb serve` printed when it started"
        )
    return Target(own.base_url if own else url, token, plan.timeout, Secret(own.proof) if own and own.proof else None)


def _record_at(url: str) -> runtime.EngineRecord | None:
    """Of this user's engine at an address; localhost is whichever of this machine's it listens on."""
    parts = urlsplit(url)
    here = (parts.scheme, parts.hostname, parts.path) == ("http", "localhost", "")
    for record in runtime.all_records():
        if record.base_url == url or (here and record.port == parts.port and runtime.is_loopback(record.host)):
            return record
    return None


def _try_out(target: Target, model: str, workload: Workload, words: Words) -> None:
    """Ask the model, and each adapter, once. `BackendError` in the engine's words where one is not answered."""
    adapters = [None, *workload.mix] if sum(workload.mix.values()) < 1 else [*workload.mix]
    asks = (Ask(number, 0.0, 16, 8, name, f"{workload.seed} first") for number, name in enumerate(adapters))
    found = measure(target, model, Load(concurrency=1), asks, lambda ask: words.text(ask, workload))
    for outcome in found.outcomes:
        if outcome.error:
            whose = f"the adapter {outcome.ask.adapter}" if outcome.ask.adapter else "the model"
            raise BackendError(f"{whose} does not answer ({outcome.error}): {outcome.message or 'see its log'}")


def _runs(target: Target, model: str, plan: Plan, words: Words) -> Iterator[Run]:
    workload = plan.workload
    for part, load in enumerate(plan.loads):
        found = measure(
            target,
            model,
            load,
            workload.asks(load, part),
            lambda ask: words.text(ask, workload),
            workload.seconds,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        if not found.outcomes:
            raise ConfigurationError(f"no request came within {workload.seconds:g} s at {load}: give --seconds more")
        yield found


def _asked(workload: Workload) -> str:
    mix = [f"{name} {share:.0%}" for name, share in workload.mix.items()]
    shared = f" ({workload.shared_prefix} of them in common)" if workload.shared_prefix else ""
    return "; ".join(
        [f"prompts of {workload.prompts} tokens{shared}, answers of {workload.answers}, seed {workload.seed}"]
        + ([f"adapters: {', '.join(mix)}"] if mix else [])
    )


def told(summaries: Sequence[Summary], limits: Limits) -> Iterator[str]:
    """The lines of the tables: of each load, and of all of them where there are more."""
    for each in summaries:
        yield f"\n{each.load}: {each.requests} requests in {each.seconds:.1f} s"
        yield indent(_latencies(each))
        yield from map(indent, _lines(each, limits))
    if len(summaries) > 1:
        yield "\n" + _compared(summaries)


def _latencies(each: Summary) -> str:
    rows = [("ms", "mean", *(f"p{percent}" for percent in PERCENTILES), "max")]
    kinds = {
        "first text (TTFT)": each.ttft,
        "between texts (ITL)": each.itl,
        "token after the first (TPOT)": each.tpot,
        "end to end": each.e2e,
    }
    for name, part in each.adapters.items():
        kinds |= {f"TTFT, {name or 'no adapter'}": part.ttft, f"ITL, {name or 'no adapter'}": part.itl}
    return table([*rows, *((name, *_cells(latency)) for name, latency in kinds.items())])


def _cells(latency: Latency) -> Iterator[str]:
    for value in (latency.mean, latency.p50, latency.p90, latency.p95, latency.p99, latency.max):
        yield "-" if value is None else f"{value:.1f}"


def _lines(each: Summary, limits: Limits) -> Iterator[str]:
    short = each.answer_tokens < each.asked_tokens
    yield (
        f"{each.requests_per_s:.2f} answers/s, {each.tokens_per_s:.1f} tokens/s written, "
        f"{each.all_tokens_per_s:.1f} read and written; at most {each.peak} under way"
    )
    if each.reused_tokens is not None:
        share = each.reused_tokens / max(1, each.prompt_tokens)
        yield f"{each.reused_tokens} of the {each.prompt_tokens} tokens read were reused ({share:.0%})"
    if each.goodput is not None:
        yield f"goodput {each.goodput:.2f} answers/s, {each.good:.0%} of the requests ({limits})"
    if short:
        yield f"answers ended by themselves: {each.answer_tokens} of the {each.asked_tokens} tokens asked for"
    for kind, count in each.errors.items():
        words = each.messages[kind]
        yield f"{count} failed, {kind}{f': {words}' if words else ''}"
    if each.late.p99 is not None and each.late.p99 > _LATE:
        yield f"the client was late: a hundredth of the requests left {each.late.p99:.0f} ms or more after its moment"


def _compared(summaries: Sequence[Summary]) -> str:
    rows: list[Sequence[str]] = [
        ("load", "answers/s", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99", "goodput/s", "failed")
    ]
    for each in summaries:
        latencies = (each.ttft.p50, each.ttft.p99, each.itl.p50, each.itl.p99)
        rows.append(
            (
                each.load,
                f"{each.requests_per_s:.2f}",
                f"{each.tokens_per_s:.1f}",
                *("-" if value is None else f"{value:.1f}" for value in latencies),
                "-" if each.goodput is None else f"{each.goodput:.2f}",
                str(sum(each.errors.values())),
            )
        )
    return table(rows)


def _described(plan: Plan) -> dict[str, Any]:
    workload = plan.workload
    lengths: dict[str, Lengths] = {"prompt_tokens": workload.prompts, "answer_tokens": workload.answers}
    return {
        **{name: str(length) for name, length in lengths.items()},
        "adapters": dict(workload.mix),
        **{name: getattr(workload, name) for name in ("shared_prefix", "seed", "requests", "seconds")},
        "limits_ms": asdict(plan.limits),
        "timeout_s": plan.timeout,
    }


def _record(outcome: Outcome) -> dict[str, Any]:
    """A request of the JSON file: moments in seconds after the beginning of its load, counts in tokens."""
    return {
        "due": round(outcome.due, 6),
        "sent": round(outcome.sent, 6),
        "first": round(outcome.texts[0], 6) if outcome.texts else None,
        "ended": round(outcome.ended, 6),
        "pieces": len(outcome.texts),
        "prompt_tokens": outcome.usage.prompt_tokens if outcome.usage else None,
        "reused_tokens": outcome.reused,
        "answer_tokens": outcome.tokens,
        "adapter": outcome.ask.adapter,
        "error": outcome.error,
    }
