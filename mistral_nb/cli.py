"""The command `mistral-nb`: the engine process and the model store from a terminal."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_nb import __version__, bench_commands, lora_commands, store_commands
from mistral_nb.command_line import count, port, rank, require, seconds
from mistral_nb.config import DEVICES, MAX_REQUESTS, PRECISIONS
from mistral_nb.errors import ConfigurationError, MistralError

if TYPE_CHECKING:
    from mistral_nb.server import Tls

__all__ = ["main"]

_DEMO_PACKAGES = ("ipykernel", "jupyter_client", "nbclient", "nbformat")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error told on stderr, 2 for bad usage, 130 when interrupted.

    141, without a word, when nobody reads what it prints any more, as in `mistral-nb list | head -1`.
    """
    command = _command(sys.argv[1:] if arguments is None else arguments)
    try:
        status = command()
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


def _command(arguments: Sequence[str]) -> Callable[[], int]:
    if list(arguments[:2]) == ["bench", bench_commands.KERNELS]:
        from mistral_nb import kernel_bench

        return partial(kernel_bench.run, arguments[2:])
    options = _parser().parse_args(arguments)
    return partial(options.command, options)


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
    serve.add_argument("--port", type=port, default=0, help="port to listen on; 0 takes a free one (%(default)s)")
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
        type=count,
        default=MAX_REQUESTS,
        help="answer this many requests at once; as many wait for a moment, others get 429 (%(default)s)",
    )
    serve.add_argument(
        "--grace",
        type=seconds,
        metavar="SECONDS",
        default=30.0,
        help="on Ctrl+C or SIGTERM let running answers end for so long (%(default)g)",
    )
    serve.add_argument(
        "--idle-timeout",
        type=seconds,
        metavar="SECONDS",
        help="end after this long without a request, 0 for never (the setting idle_timeout: 1800)",
    )
    serve.add_argument(
        "--device", choices=DEVICES, help="where to run (the setting device: auto, a GPU if there is one)"
    )
    precision = serve.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what weights are kept in (the setting precision: auto, on a GPU bf16 or fp16 if that fits into its "
        "memory, else int8 or int4; on a CPU int8, or int4 for a model that has no more)",
    )
    precision.add_argument(
        "--quantize", choices=("int8", "int4"), dest="precision", help="the same as --precision int8 or int4"
    )
    serve.add_argument(
        "--context",
        type=count,
        metavar="TOKENS",
        help="tokens of context, fewer take less memory (the setting context: all that the model has)",
    )
    serve.add_argument(
        "--lora-rank",
        type=rank,
        metavar="RANK",
        help="the largest rank of adapters (the setting lora_rank: 64 on a CPU, 16 on a GPU)",
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

    bench_commands.add_to(commands)

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

    require("local", LOCAL_PACKAGES)
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
            lora_rank=options.lora_rank or settings.lora_rank,
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


def _demo(options: argparse.Namespace) -> int:
    """Run a notebook in a Jupyter kernel and show its answers as they stream."""
    require("demo", _DEMO_PACKAGES)
    from mistral_nb.demo import run

    return run(options.notebook)
