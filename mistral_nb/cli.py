"""The command `mistral-nb`: the engine process and the model store from a terminal."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_nb import __version__, lora_commands, store_commands
from mistral_nb.config import DEVICES, PRECISIONS
from mistral_nb.errors import ConfigurationError, MissingDependency, MistralError

if TYPE_CHECKING:
    from mistral_nb.server import Tls

__all__ = ["main"]

_DEMO_PACKAGES = ("ipykernel", "jupyter_client", "nbclient", "nbformat")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error told on stderr, 2 for bad usage, 130 when interrupted.

    141, without a word, when nobody reads what it prints any more, as in `mistral-nb list | head -1`.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        status = command(options)
        print(end="", flush=True)
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        return 141
    except MistralError as error:
        from mistral_nb.safe_markdown import plain_text

        print(f"mistral-nb: {plain_text(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        print(f"mistral-nb: interrupted{f'; {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
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
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any but loopback needs a certificate and the setting server_token (%(default)s)",
    )
    serve.add_argument("--port", type=_port, default=0, help="port to listen on; 0 takes a free one (%(default)s)")
    serve.add_argument("--certificate", type=Path, metavar="FILE", help="serve with TLS: the certificate and its chain")
    serve.add_argument("--key", type=Path, metavar="FILE", help="the certificate's key, without a pass phrase")
    serve.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="answer requests that name this host too; behind a proxy that ends TLS and passes the Host header on, "
        "give the origin that browsers see, as https://play.example.org; repeatable",
    )
    serve.add_argument(
        "--max-requests",
        type=_count,
        default=64,
        help="answer this many requests at once; as many wait for a moment, others get 429 (%(default)s)",
    )
    serve.add_argument(
        "--grace",
        type=_seconds,
        metavar="SECONDS",
        default=30.0,
        help="on Ctrl+C or SIGTERM let running answers end for so long (%(default)g)",
    )
    serve.add_argument(
        "--idle-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="end after this long without a request, 0 for never (the setting idle_timeout: 1800)",
    )
    serve.add_argument(
        "--device", choices=DEVICES, help="where to run (the setting device: auto, a GPU if there is one)"
    )
    serve.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what to compute in (the setting precision: auto, which is int8 on a CPU and bf16 or fp16 on a GPU)",
    )
    serve.add_argument(
        "--context",
        type=_count,
        metavar="TOKENS",
        help="tokens of context, fewer take less memory (the setting context: all that the model has)",
    )
    serve.add_argument("--managed", action="store_true", help=argparse.SUPPRESS)
    serve.set_defaults(command=_serve)

    store_commands.add_to(commands)
    lora_commands.add_to(commands)

    status = commands.add_parser("status", help="list the running engines", description=_status.__doc__)
    status.set_defaults(command=_status)

    stop = commands.add_parser("stop", help="end running engines", description=_stop.__doc__)
    stop.add_argument("model", nargs="?", help="only this model's engine")
    stop.add_argument(
        "--force", action="store_true", help="also while it is answering, and kill it if it does not respond"
    )
    stop.set_defaults(command=_stop)

    bench = commands.add_parser("bench", help="measure the local engine on this machine", description=_bench.__doc__)
    bench.add_argument(
        "what",
        nargs="?",
        choices=("answer", "load", "frames"),
        default="answer",
        help="answer: cold start, first token and decoding; load: a checkpoint made for it; "
        "frames: reading a stream (%(default)s)",
    )
    bench.add_argument("--model", default="embedded", help="of answer: name, alias or checkpoint folder (%(default)s)")
    bench.add_argument("--size-gb", type=_gigabytes, default=2.0, help="of load: the checkpoint's size (%(default)s)")
    bench.add_argument(
        "--folder", type=Path, metavar="DIR", help="of load: where to write it for a while (the temporary folder)"
    )
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
    settings = load_settings()
    idle_timeout = settings.idle_timeout if options.idle_timeout is None else options.idle_timeout
    from mistral_nb.server import Address, ServeOptions, serve

    return serve(
        ServeOptions(
            model=model,
            folder=folder,
            serve_as=tuple(options.serve_as),
            address=Address(options.host, options.port, _tls(options)),
            allow_hosts=tuple(options.allow_host),
            token=None if options.managed else settings.server_token,
            max_requests=options.max_requests,
            device=options.device or settings.device,
            precision=options.precision or settings.precision,
            context=options.context or settings.context,
            idle_timeout=idle_timeout,
            grace=0.0 if options.managed else options.grace,
            managed=options.managed,
        )
    )


def _tls(options: argparse.Namespace) -> Tls | None:
    if options.certificate is None and options.key is None:
        return None
    if options.certificate is None or options.key is None:
        missing = "--key" if options.key is None else "--certificate"
        raise ConfigurationError(f"TLS needs a certificate and its key: give {missing} FILE too")
    from mistral_nb.server import Tls

    return Tls(options.certificate, options.key)


def _require(extra: str, packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f'this needs {", ".join(missing)}: pip install "mistral-nb[{extra}]"')


def _status(options: argparse.Namespace) -> int:
    """List the running engines: their models, what they do, where they are, and their logs; and unfinished pulls."""
    from mistral_nb.config import load_settings
    from mistral_nb.engine_control import status
    from mistral_nb.model_report import unfinished_pulls
    from mistral_nb.report import engines_table

    print("\n".join([engines_table(status(load_settings())), *unfinished_pulls()]))
    return 0


def _stop(options: argparse.Namespace) -> int:
    """End running engines. One that is answering, or does not respond, is left alone unless forced."""
    from mistral_nb.config import load_settings
    from mistral_nb.engine_control import stop

    stopped = stop(load_settings(), options.model, options.force)
    print(f"Stopped {', '.join(stopped)}." if stopped else "No engine is running.")
    return 0


def _bench(options: argparse.Namespace) -> int:
    """Measure cold start, first token and decoding of the local engine, loading a checkpoint, or reading a stream."""
    if options.what == "frames":
        from mistral_nb import bench_frames

        return bench_frames.run(options.runs, options.json)
    from mistral_nb.backends.engine_process import LOCAL_PACKAGES

    _require("local", LOCAL_PACKAGES)
    if options.what == "load":
        from mistral_nb import bench_load

        return bench_load.run(options.size_gb, options.runs, options.json, options.folder)
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


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0.25 <= size <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: gigabytes from 0.25 to 100")
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: seconds, 0 or more")
    return seconds
