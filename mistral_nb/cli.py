"""The command `mistral-nb`: the engine process and the model store from a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from mistral_nb import __version__
from mistral_nb.errors import MissingDependency, MistralError

__all__ = ["main"]

_DEMO_PACKAGES = ("ipykernel", "jupyter_client", "nbclient", "nbformat")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error told on stderr, 2 for bad usage, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except MistralError as error:
        print(f"mistral-nb: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mistral-nb: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mistral-nb", description="Mistral-7B-Instruct in a notebook, from a terminal.")
    parser.add_argument("--version", action="version", version=f"mistral-nb {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", help="run an engine in the foreground", description=_serve.__doc__)
    serve.add_argument("--model", default="embedded", help="name, alias or checkpoint folder (%(default)s)")
    serve.add_argument(
        "--serve-as", metavar="NAME", action="append", default=[], help="answer for this model's name too; repeatable"
    )
    serve.add_argument("--host", default="127.0.0.1", help="loopback address to listen on (%(default)s)")
    serve.add_argument("--port", type=_port, default=0, help="port to listen on; 0 takes a free one (%(default)s)")
    serve.add_argument(
        "--idle-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="end after this long without a request, 0 for never (the setting idle_timeout: 1800)",
    )
    serve.add_argument("--managed", action="store_true", help=argparse.SUPPRESS)
    serve.set_defaults(command=_serve)

    pull = commands.add_parser("pull", help="fetch a model into the store", description=_pull.__doc__)
    pull.add_argument("model", help="name or alias, such as embedded")
    pull.set_defaults(command=_pull)

    models = commands.add_parser("models", help="list the known and the installed models", description=_models.__doc__)
    models.set_defaults(command=_models)

    status = commands.add_parser("status", help="list the running engines", description=_status.__doc__)
    status.set_defaults(command=_status)

    stop = commands.add_parser("stop", help="end running engines", description=_stop.__doc__)
    stop.add_argument("model", nargs="?", help="only this model's engine")
    stop.add_argument(
        "--force", action="store_true", help="also while it is answering, and kill it if it does not respond"
    )
    stop.set_defaults(command=_stop)

    bench = commands.add_parser("bench", help="measure the local engine on this machine", description=_bench.__doc__)
    bench.add_argument("--model", default="embedded", help="name, alias or checkpoint folder (%(default)s)")
    bench.add_argument("--runs", type=_count, default=5, help="measurements of each kind (%(default)s)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there instead of printing it")
    bench.set_defaults(command=_bench)

    demo = commands.add_parser(
        "demo", help="run a notebook and show its answers as they stream", description=_demo.__doc__
    )
    demo.add_argument("notebook", type=Path, nargs="?", help="the notebook; in a checkout the quickstart by default")
    demo.set_defaults(command=_demo)
    return parser


def _serve(options: argparse.Namespace) -> int:
    """Load a model and answer on the Workers AI wire until stopped or idle."""
    from mistral_nb.backends.engine_process import LOCAL_PACKAGES
    from mistral_nb.config import load_settings
    from mistral_nb.models import canonical, locate

    _require("local", LOCAL_PACKAGES)
    model = canonical(options.model)
    folder = locate(model)
    idle_timeout = load_settings().idle_timeout if options.idle_timeout is None else options.idle_timeout
    from mistral_nb.server import ServeOptions, serve

    return serve(
        ServeOptions(
            model=model,
            folder=folder,
            serve_as=tuple(options.serve_as),
            host=options.host,
            port=options.port,
            idle_timeout=idle_timeout,
            managed=options.managed,
        )
    )


def _require(extra: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f'this needs {", ".join(missing)}: pip install "mistral-nb[{extra}]"')


def _pull(options: argparse.Namespace) -> int:
    """Fetch a model into the store; does nothing when it is there."""
    from mistral_nb.models import canonical, pull

    bar = _Bar(sys.stderr)
    try:
        folder = pull(options.model, lambda progress: bar.show(progress.step, progress.done, progress.total))
    finally:
        bar.close()
    print(f"{canonical(options.model)} is in {folder}")
    return 0


class _Bar:
    """One line that is redrawn on a terminal; elsewhere one line for each step."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        self._shown = ""

    def show(self, step: str, done: int, total: int | None) -> None:
        """`done` and `total` in bytes; without a total there is no bar."""
        line = self._line(step, done, total) if self._live else step
        if line == self._shown:
            return
        self._out.write(f"\r{line:<{len(self._shown)}}" if self._live else f"{line}\n")
        self._out.flush()
        self._shown = line

    def close(self) -> None:
        if self._live and self._shown:
            self._out.write("\n")
            self._out.flush()

    @staticmethod
    def _line(step: str, done: int, total: int | None) -> str:
        if not total:
            return step
        share = min(done / total, 1.0)
        return f"{step:<12} [{'#' * int(share * 30):<30}] {share:4.0%}  {done / 1e6:.0f} of {total / 1e6:.0f} MB"


def _models(options: argparse.Namespace) -> int:
    """List the models that are known by name and those in the store, with their sizes, and where the store is."""
    from mistral_nb.report import models_table

    print(models_table())
    return 0


def _status(options: argparse.Namespace) -> int:
    """List the running engines: their models, what they do, where they are, and their logs."""
    from mistral_nb.config import load_settings
    from mistral_nb.engine_control import status
    from mistral_nb.report import engines_table

    print(engines_table(status(load_settings())))
    return 0


def _stop(options: argparse.Namespace) -> int:
    """End running engines. One that is answering, or does not respond, is left alone unless forced."""
    from mistral_nb.config import load_settings
    from mistral_nb.engine_control import stop

    stopped = stop(load_settings(), options.model, options.force)
    print(f"Stopped {', '.join(stopped)}." if stopped else "No engine is running.")
    return 0


def _bench(options: argparse.Namespace) -> int:
    """Measure cold start, first token and decoding of the local engine."""
    from mistral_nb.backends.engine_process import LOCAL_PACKAGES

    _require("local", LOCAL_PACKAGES)
    from mistral_nb.bench import run

    return run(options.model, options.runs, options.json)


def _demo(options: argparse.Namespace) -> int:
    """Run a notebook in a Jupyter kernel and show its answers as they stream."""
    _require("demo", _DEMO_PACKAGES)
    from mistral_nb.demo import run

    return run(options.notebook)


def _port(text: str) -> int:
    port = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= port <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: a whole number from 0 to 65535")
    return port


def _count(text: str) -> int:
    count = int(text) if text.isascii() and text.isdigit() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: a whole number, 1 or more")
    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: seconds, 0 or more")
    return seconds
