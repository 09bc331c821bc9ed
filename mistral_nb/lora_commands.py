"""The commands `mistral-nb lora`: LoRA adapters checked, listed, put on Cloudflare, and kept for the engine here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mistral_nb.progress import Bar

__all__ = ["add_to"]


def add_to(commands: Any) -> None:
    """Add `lora` and its own commands to the subparsers of `mistral-nb`."""
    lora = commands.add_parser("lora", help="LoRA adapters, here and on Cloudflare", description=__doc__)
    actions = lora.add_subparsers(title="commands", metavar="COMMAND", required=True)

    check = actions.add_parser(
        "check", help="tell what an adapter is and what is wrong with it", description=_check.__doc__
    )
    _add_folder(check)
    check.add_argument("--local", action="store_true", help="for use here alone: leave Cloudflare's limits out")
    check.add_argument(
        "--fix",
        type=Path,
        metavar="NEW_FOLDER",
        help='make a copy there that has "model_type": "mistral", and check that',
    )
    check.set_defaults(command=_check)

    listed = actions.add_parser("list", help="list the adapters here and on the account", description=_list.__doc__)
    listed.set_defaults(command=_list)

    public = actions.add_parser("public", help="list Cloudflare's own adapters", description=_public.__doc__)
    public.set_defaults(command=_public)

    push = actions.add_parser("push", help="put an adapter on the Cloudflare account", description=_push.__doc__)
    _add_folder(push)
    push.add_argument("--name", required=True, help="what requests call it")
    push.add_argument("--model", help="the model on Cloudflare that it is for (Mistral-7B-Instruct v0.2's)")
    push.add_argument("--description", default="", help="a text that lists show")
    push.set_defaults(command=_push)

    add = actions.add_parser("add", help="copy an adapter to this machine's store", description=_add.__doc__)
    _add_folder(add)
    add.add_argument("--name", help="what requests call it (the folder's name)")
    add.add_argument("--model", help="the model that it is for (the one that it was trained on)")
    add.add_argument("--description", default="", help="a text that lists show")
    add.set_defaults(command=_add)

    remove = actions.add_parser(
        "remove", aliases=["rm"], help="remove an adapter from this machine's store", description=_remove.__doc__
    )
    remove.add_argument("adapter", help="name or id of an adapter on this machine")
    remove.set_defaults(command=_remove)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the folder that PEFT's save_pretrained has written")


def _check(options: argparse.Namespace) -> int:
    """Tell what the adapter in a folder is, and everything that is wrong with it. Nothing is changed or executed."""
    from mistral_nb.config import load_settings
    from mistral_nb.finetunes.report import check_report

    lora_rank = load_settings().lora_rank
    print(check_report(options.folder, for_cloudflare=not options.local, fix=options.fix, lora_rank=lora_rank))
    return 0


def _list(options: argparse.Namespace) -> int:
    """List the adapters on this machine, and those of the Cloudflare account."""
    from mistral_nb.config import load_settings
    from mistral_nb.finetunes.report import account_report, local_report

    print(local_report(), flush=True)
    print(account_report(load_settings()))
    return 0


def _public(options: argparse.Namespace) -> int:
    """List the adapters that Cloudflare has for every account."""
    from mistral_nb.config import load_settings
    from mistral_nb.finetunes.report import public_report

    print(public_report(load_settings()))
    return 0


def _push(options: argparse.Namespace) -> int:
    """Check an adapter, upload it to the Cloudflare account, and wait until requests find it.

    One that was cut short goes on with another push of the same name. The service removes no adapters.
    """
    from mistral_nb.config import load_settings
    from mistral_nb.finetunes.adapter import DEFAULT_MODEL
    from mistral_nb.finetunes.cloudflare import Push
    from mistral_nb.finetunes.report import pushed

    with Bar(sys.stderr) as bar:
        task = Push(
            options.folder,
            options.name,
            settings=load_settings(),
            model=options.model or DEFAULT_MODEL,
            description=options.description,
            progress=bar.show,
        )
        adapter = task.run()
    print(pushed(adapter, task.untried, task.doubt))
    return 0


def _add(options: argparse.Namespace) -> int:
    """Check an adapter, and copy its two files into this machine's store: a running engine finds it by its name."""
    from mistral_nb.config import load_settings
    from mistral_nb.finetunes.report import add_report

    lora_rank = load_settings().lora_rank
    print(add_report(options.folder, options.name, options.model, options.description, lora_rank))
    return 0


def _remove(options: argparse.Namespace) -> int:
    """Remove an adapter from this machine's store. What is on Cloudflare stays: the service removes no adapters."""
    from mistral_nb.finetunes.report import remove_report

    print(remove_report(options.adapter))
    return 0
