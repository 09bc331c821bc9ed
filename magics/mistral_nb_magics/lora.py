"""`%mistral lora`: adapters listed, checked, kept here, and put on Cloudflare, with a bar while they are uploaded."""

from __future__ import annotations

import threading
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from IPython.core.error import UsageError

from mistral_nb.config import Settings
from mistral_nb_magics.commands import LORA_ACTIONS

__all__ = ["run_lora"]

T = TypeVar("T")
Say = Callable[[str], None]

_CLEARING_UP = 2.0
"""Seconds that an interrupted push gets to end."""


class Work(Protocol):
    """Runs a job in a thread, and shows the lines that it says; `stopped` tells after an interrupt what is left."""

    def __call__(self, waiting: str, job: Callable[[Say], T], stopped: Callable[[], str] = ...) -> T: ...


def run_lora(options: Namespace, settings: Settings, work: Work) -> None:
    """Do what `%mistral lora` was asked for, and print what came of it. `UsageError` for a word missing or too many."""
    from mistral_nb.finetunes import report

    _refuse_unused(options)
    match options.action:
        case "list":
            print(report.local_report())
            print(work("Asking Cloudflare", lambda say: report.account_report(settings)))
        case "public":
            print(work("Asking Cloudflare", lambda say: report.public_report(settings)))
        case "check":
            fix, cloudflare = _path(options.fix) if options.fix else None, not options.local
            rank = settings.lora_rank
            print(report.check_report(_folder(options), for_cloudflare=cloudflare, fix=fix, lora_rank=rank))
        case "add":
            told = options.name, options.model, options.description or ""
            print(report.add_report(_folder(options), *told, settings.lora_rank))
        case "remove" | "rm":
            if options.which is None:
                raise UsageError("which adapter? Such as: %mistral lora remove my-adapter")
            print(report.remove_report(options.which))
        case "push":
            _push(options, settings, work)
        case _:
            raise UsageError("%mistral lora list, public, check DIR, add DIR, remove NAME, or push DIR --name N?")


def _refuse_unused(options: Namespace) -> None:
    takes = LORA_ACTIONS.get(options.action, vars(options))
    takes = (*takes, "action", *(["which"] if {"folder", "adapter"} & set(takes) else []))
    for name, value in vars(options).items():
        if value is not None and name not in takes:
            what = f"folder ({value})" if name == "which" else f"--{name}"
            raise UsageError(f"%mistral lora {options.action} takes no {what}; leave it out")


def _folder(options: Namespace) -> Path:
    if options.which is None:
        raise UsageError(f"which folder? Such as: %mistral lora {options.action} my-adapter")
    return _path(options.which)


def _path(word: str) -> Path:
    try:
        return Path(word).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{word}: nobody here is called so; give the folder by its path") from error


def _push(options: Namespace, settings: Settings, work: Work) -> None:
    folder = _folder(options)
    if options.name is None:
        raise UsageError(f"under which name? Such as: %mistral lora push {options.which} --name my-adapter")
    from mistral_nb.finetunes.adapter import DEFAULT_MODEL
    from mistral_nb.finetunes.cloudflare import Push
    from mistral_nb.finetunes.report import pushed
    from mistral_nb.progress import Meter, Progress

    meter, ended = Meter(), threading.Event()
    says: list[Say] = []

    def show(now: Progress) -> None:
        for say in says:
            say(meter.line(now))

    task = Push(
        folder,
        options.name,
        settings=settings,
        model=options.model or DEFAULT_MODEL,
        description=options.description or "",
        progress=show,
    )

    def job(say: Say) -> str:
        says.append(say)
        try:
            return pushed(task.run(), task.untried, task.doubt)
        finally:
            ended.set()

    def stopped() -> str:
        task.stop()
        ended.wait(_CLEARING_UP)
        return task.told

    print(work(f"Looking at {folder.name}", job, stopped))
