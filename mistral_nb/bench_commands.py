"""The commands `mistral-nb bench`: the engine alone, beside others and under load, and what it depends on, measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_nb.command_line import count, gigabytes, positive, require
from mistral_nb.config import DEVICES, MAX_REQUESTS, PRECISIONS
from mistral_nb.errors import ConfigurationError

if TYPE_CHECKING:
    from mistral_nb.bench_serve import Plan
    from mistral_nb.bench_workload import Workload

__all__ = ["KERNELS", "add_to"]

KERNELS = "kernels"
"""A benchmark of a program of its own, which knows its options."""

_SERVE = (
    "url",
    "rate",
    "concurrency",
    "requests",
    "seconds",
    "prompt_tokens",
    "answer_tokens",
    "shared_prefix",
    "lora",
    "slo_ttft",
    "slo_itl",
    "seed",
    "timeout",
    "plot",
)
_OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("answer", "engine", "serve"): ("model",),
    ("answer", "engine", "load", "frames"): ("runs",),
    ("load",): ("size_gb", "folder"),
    ("engine", "serve"): ("device", "precision"),
    ("engine",): ("contexts", "threads", "gguf", "peer_python"),
    ("serve",): _SERVE,
}
"""Those that not every kind of benchmark has."""

_RUNS = 5
_REQUESTS = 100
_CONCURRENCY = 8


def add_to(commands: Any) -> None:
    """Add `bench` to the subparsers of `mistral-nb`."""
    bench = commands.add_parser("bench", help="measure the local engine on this machine", description=_bench.__doc__)
    bench.add_argument(
        "what",
        nargs="?",
        choices=("answer", "engine", "serve", "load", "frames", KERNELS),
        default="answer",
        help="answer: cold start, first token and decoding; engine: decoding, prompts and loading without HTTP, beside "
        "other engines; serve: many requests at once; load: a checkpoint made for it; frames: reading a stream; "
        "kernels: each kernel beside others, with options of its own, which `bench kernels --help` lists (%(default)s)",
    )
    bench.add_argument(
        "--model",
        help="of answer, engine and serve: name, alias or checkpoint folder (embedded; of engine on a GPU mistral-7b, "
        "or random-7b, which is random weights in its shape)",
    )
    bench.add_argument("--size-gb", type=gigabytes, help="of load: the checkpoint's size (2.0)")
    bench.add_argument(
        "--folder", type=Path, metavar="DIR", help="of load: where to write it for a while (the temporary folder)"
    )
    bench.add_argument("--runs", type=count, help=f"measurements of each kind, but of serve ({_RUNS})")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there instead of printing it")
    bench.add_argument("--device", choices=DEVICES, help="of engine and serve: where to run (auto)")
    bench.add_argument(
        "--precision",
        action="append",
        choices=[precision for precision in PRECISIONS if precision != "auto"],
        help="of engine, where it is repeatable, and serve: what weights are kept in (int8 and int4, on a GPU bf16 or "
        "else fp16 too; of serve auto)",
    )
    _add_engine(bench.add_argument_group("of engine"))
    told = "The exit status is 1 where a request failed: one over an SLO has not."
    _add_serve(bench.add_argument_group("of serve", told))
    bench.set_defaults(command=_bench)


def _add_engine(engine: argparse._ArgumentGroup) -> None:
    engine.add_argument(
        "--contexts", nargs="+", type=count, metavar="TOKENS", help="lengths of prompts (36 to 2048, or 32768)"
    )
    engine.add_argument("--threads", type=count, help="of every engine on the CPU (as many as there are CPUs)")
    engine.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama-cpp-python")
    engine.add_argument(
        "--peer-python",
        action="append",
        metavar="PATH",
        help="a Python 3.11 or newer that has transformers, llama-cpp-python, gpt-fast or vllm; repeatable",
    )


def _add_serve(serve: argparse._ArgumentGroup) -> None:
    serve.add_argument("--url", help="an engine that runs, as http://127.0.0.1:PORT (one is started, and ended)")
    load = serve.add_mutually_exclusive_group()
    load.add_argument(
        "--rate",
        nargs="+",
        type=positive,
        metavar="R",
        help="requests a second, at random moments (Poisson); several in turn. Those that the engine refuses have "
        f"failed: the one that is started answers {MAX_REQUESTS} at once, and as many wait",
    )
    load.add_argument(
        "--concurrency",
        nargs="+",
        type=count,
        metavar="N",
        help=f"keep so many requests under way; several in turn ({_CONCURRENCY})",
    )
    serve.add_argument(
        "--requests", type=count, metavar="N", help=f"of each load ({_REQUESTS}, or as many as begin within --seconds)"
    )
    serve.add_argument("--seconds", type=positive, metavar="S", help="no request of a load begins later")
    serve.add_argument("--prompt-tokens", metavar="LENGTHS", help="128, from 32..512, or around 200~50 (128)")
    serve.add_argument("--answer-tokens", metavar="LENGTHS", help="the same of answers, which may end before (64)")
    serve.add_argument(
        "--shared-prefix",
        type=count,
        metavar="TOKENS",
        help="begin every prompt with the same tokens, fewer than any has: whole pieces of them are read once (128 "
        "tokens on a CPU, 512 of a longer prompt on a GPU)",
    )
    serve.add_argument(
        "--lora",
        action="append",
        metavar="NAME=SHARE",
        help="ask this adapter in a share of the requests, as 0.25; those without one divide what is left; repeatable",
    )
    serve.add_argument(
        "--slo-ttft", type=positive, metavar="MS", help="for goodput: an answer's first text comes within so long"
    )
    serve.add_argument(
        "--slo-itl", type=positive, metavar="MS", help="for goodput: and its later tokens, in their mean"
    )
    serve.add_argument(
        "--seed",
        type=int,
        help="draws moments, lengths, adapters and prompts; give --url another each time, lest prompts are known (0)",
    )
    serve.add_argument("--timeout", type=positive, metavar="S", help="give a request up after (300)")
    serve.add_argument("--plot", type=Path, metavar="FOLDER", help="write pictures there (needs matplotlib)")


def _bench(options: argparse.Namespace) -> int:
    """Measure the engine process, the engine beside others or under load, loading a checkpoint, or reading a stream."""
    _check(options)
    runs = options.runs or _RUNS
    if options.what == "frames":
        from mistral_nb import bench_frames

        return bench_frames.run(runs, options.json)
    if options.what == "serve":
        return _serve(options)
    from mistral_nb.backends.engine_process import LOCAL_PACKAGES

    require("local", LOCAL_PACKAGES)
    if options.what == "load":
        from mistral_nb import bench_load

        return bench_load.run(options.size_gb or 2.0, runs, options.json, options.folder)
    if options.what == "engine":
        return _engine(options, runs)
    from mistral_nb.bench import run

    return run(options.model or "embedded", runs, options.json)


def _check(options: argparse.Namespace) -> None:
    """`ConfigurationError` for an option of another kind of benchmark."""
    if options.what == KERNELS:
        raise ConfigurationError("the options of bench kernels come after it: mistral-nb bench kernels --help")
    for kinds, names in _OPTIONS.items():
        for name in names:
            if options.what not in kinds and getattr(options, name) is not None:
                those = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} is of bench {those}, not of bench {options.what}: "
                    f"leave it out, or begin with bench {kinds[-1]}"
                )


def _engine(options: argparse.Namespace, runs: int) -> int:
    from mistral_nb import bench_engine

    return bench_engine.run(
        options.model,
        runs,
        options.json,
        device=options.device or "auto",
        precisions=options.precision or (),
        contexts=options.contexts or (),
        threads=options.threads,
        gguf=options.gguf,
        pythons=options.peer_python or (),
    )


def _serve(options: argparse.Namespace) -> int:
    if options.url:
        for name in ("model", "device", "precision"):
            if getattr(options, name):
                raise ConfigurationError(f"--{name} is of an engine that is started: leave it out, or --url")
    else:
        from mistral_nb.backends.engine_process import LOCAL_PACKAGES

        require("local", LOCAL_PACKAGES)
    if len(options.precision or ()) > 1:
        raise ConfigurationError("bench serve measures one engine: give --precision once")
    from mistral_nb import bench_serve

    return bench_serve.run(_plan(options), options.json, options.plot)


def _plan(options: argparse.Namespace) -> Plan:
    from mistral_nb.bench_latency import Limits
    from mistral_nb.bench_serve import Plan
    from mistral_nb.bench_workload import Load

    loads = [Load(rate=rate) for rate in options.rate or ()]
    loads += [Load(concurrency=number) for number in options.concurrency or ()]
    engine = {"device": options.device, "precision": (options.precision or [None])[0]}
    return Plan(
        workload=_workload(options),
        loads=loads or [Load(concurrency=_CONCURRENCY)],
        limits=Limits(options.slo_ttft, options.slo_itl),
        model=options.model or "embedded",
        url=options.url,
        engine={name: value for name, value in engine.items() if value},
        timeout=options.timeout or 300.0,
    )


def _workload(options: argparse.Namespace) -> Workload:
    from mistral_nb.bench_workload import Lengths, Workload, shares

    shared = options.shared_prefix or 0
    try:
        prompts = Lengths.parse(options.prompt_tokens or "128")
        if shared >= prompts.low:
            raise ValueError(f"--shared-prefix {shared} leaves prompts of {prompts} tokens nothing of their own: less")
        return Workload(
            prompts=prompts,
            answers=Lengths.parse(options.answer_tokens or "64"),
            mix=shares(options.lora or []),
            shared_prefix=shared,
            seed=options.seed or 0,
            requests=options.requests or (None if options.seconds else _REQUESTS),
            seconds=options.seconds,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
