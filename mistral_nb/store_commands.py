"""The commands of `mistral-nb` that are about the model store: pull, list, show and rm."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from mistral_nb.errors import EngineBusy, ModelError
from mistral_nb.progress import Bar, amount

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add the store's commands to the subparsers of `mistral-nb`."""
    pull = commands.add_parser("pull", help="fetch a model into the store", description=_pull.__doc__)
    pull.add_argument(
        "model", help="name such as embedded, Hugging Face id (ORG/NAME), or path of a checkpoint folder or GGUF file"
    )
    pull.add_argument("--revision", metavar="R", help="branch, tag or commit of a model of the Hugging Face hub")
    pull.add_argument("--name", metavar="N", help="what a path is called in the store; its own name by default")
    pull.set_defaults(command=_pull)

    models = commands.add_parser(
        "list", aliases=["models"], help="list the known models and those in the store", description=_list.__doc__
    )
    models.set_defaults(command=_list)

    show = commands.add_parser("show", help="tell all about a model", description=_show.__doc__)
    show.add_argument("model", help="name, alias, Hugging Face id, or path of a checkpoint folder")
    show.add_argument("--verify", action="store_true", help="read all of its files and compare their SHA-256 sums")
    show.set_defaults(command=_show)

    remove = commands.add_parser("rm", help="remove a model from the store", description=_rm.__doc__)
    remove.add_argument("model", help="name, alias or Hugging Face id of a model in the store")
    remove.set_defaults(command=_rm)


def _pull(options: argparse.Namespace) -> int:
    """Fetch a model into the store, going on where an earlier pull was cut short. Does nothing when it is there."""
    from mistral_nb.model_report import kept_by_pull, pulled
    from mistral_nb.models import pull

    with Bar(sys.stderr) as bar:
        try:
            folder = pull(options.model, bar.show, revision=options.revision, store_name=options.name)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept_by_pull(options.model, options.name)) from None
    print(pulled(folder, bar.begun))
    return 0


def _list(options: argparse.Namespace) -> int:
    """List the models that are known by name and those in the store, with their sizes, and where the store is."""
    from mistral_nb.model_report import models_table

    print(models_table())
    return 0


def _show(options: argparse.Namespace) -> int:
    """Tell what a model is and where it came from, and what memory it takes against what is free on this machine."""
    from mistral_nb.model_report import model_report

    print(model_report(options.model))
    if options.verify:
        print(_verified(options.model))
    return 0


def _verified(model: str) -> str:
    """That every file is as it was pulled; `ModelError` with those that are not."""
    from mistral_nb.models import verify

    with Bar(sys.stderr) as bar:
        wrong = verify(model, bar.show)
    if wrong:
        raise ModelError(f"{model} is damaged: {'; '.join(wrong)}; run: mistral-nb rm {model}, and pull it again")
    return "Every file has the SHA-256 that it was pulled with."


def _rm(options: argparse.Namespace) -> int:
    """Remove a model from the store, with what an unfinished pull of it left. Refused while an engine has it loaded."""
    from mistral_nb.config import load_settings
    from mistral_nb.engine_control import status
    from mistral_nb.models import remove
    from mistral_nb.models.store import removable, store_folder

    name = removable(options.model)
    folder = store_folder(name).resolve()
    for engine in status(load_settings()):
        loaded = engine.record.model
        if loaded == name or (Path(loaded).is_absolute() and Path(loaded).resolve() == folder):
            raise EngineBusy(
                f"{name} is loaded by an engine (process {engine.record.pid}); "
                f"end it with: mistral-nb stop {shlex.quote(loaded)}, then remove it"
            )
    print(f"Removed {name}: {amount(remove(name))} freed.")
    return 0
