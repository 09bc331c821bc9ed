"""`%mistral status` and the other words that are no prompt."""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import re
import shlex
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic_arguments import MagicArgumentParser

from mistral_nb.types import FIELDS
from mistral_nb_magics.interpolate import near_miss

__all__ = ["COMMANDS", "LORA_ACTIONS", "find_command"]

LORA_ACTIONS: dict[str, tuple[str, ...]] = {
    "list": (),
    "public": (),
    "check": ("folder", "local", "fix"),
    "add": ("folder", "name", "model", "description"),
    "remove": ("adapter",),
    "rm": ("adapter",),
    "push": ("folder", "name", "model", "description"),
}
"""What can be done with adapters, and what each takes: a folder or an adapter is the word after it."""

_OPTION = re.compile(r"--\w")
_OTHER_WORDS = {"delete": "remove", "del": "remove", "ls": "list"}


def _parser(*options: tuple[str, dict[str, Any]]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = MagicArgumentParser()  # type: ignore[no-untyped-call]
    parser.allow_abbrev = False
    for name, settings in options:
        parser.add_argument(name, **settings)
    return parser


def _chat_options() -> list[tuple[str, dict[str, Any]]]:
    """Who answers and how: the numbers of a request and the adapter, which the chat's panel has too."""
    numbers = {"int": int, "float": float}
    fields = [field for field in FIELDS if field.kind in numbers or field.name == "lora"]
    named = [(f"--{field.name.replace('_', '-')}", {"type": numbers.get(field.kind, str)}) for field in fields]
    return [(f"--{name}", {}) for name in ("backend", "model", "system", "preset", "load")] + named


COMMANDS: dict[str, tuple[str, argparse.ArgumentParser]] = {
    "chat": (
        "a chat below the cell; --backend, --model, --system, --preset NAME, --load FILE, --temperature X ...",
        _parser(*_chat_options()),
    ),
    "status": ("who would answer and why, the running engines, the settings", _parser()),
    "last": ("the last answer again", _parser()),
    "models": (
        "the models that are known, and those that are here; %mistral models NAME tells all about one",
        _parser(("model", {"nargs": "?"})),
    ),
    "stop": (
        "end the running engines; --model NAME ends one, --force also one that is answering",
        _parser(("--model", {}), ("--force", {"action": "store_true"})),
    ),
    "pull": (
        "fetch a model into the store: a name, a Hugging Face id (--revision R), or a path (--name N)",
        _parser(("model", {"nargs": "?"}), ("--revision", {}), ("--name", {})),
    ),
    "lora": (
        "LoRA adapters: list, public, check DIR (--local, --fix NEW_DIR), add DIR and remove NAME here, push DIR "
        "--name N to Cloudflare (--model M, --description D)",
        _parser(
            ("action", {"nargs": "?"}),
            ("which", {"nargs": "?"}),
            ("--local", {"action": "store_true", "default": None}),
            ("--fix", {}),
            ("--name", {}),
            ("--model", {}),
            ("--description", {}),
        ),
    ),
    "help": ("this manual", _parser()),
}
"""What each command does, and its options."""


def find_command(line: str) -> tuple[str, argparse.Namespace] | None:
    """The command that a line is, with its options; None for a prompt.

    A line is a command when its first word is a command's name and nothing but options comes after it (for `pull` and
    `models`, one word too; for `lora`, one of its actions and one word), and always when an option comes right after
    it. An empty line is the command "". Raises `UsageError` for an unknown option, and for a misspelt action.
    """
    words = line.split()
    if not words:
        return "", argparse.Namespace()
    if words[0] not in COMMANDS:
        return None
    if words in (["lora", "help"], ["lora", "-h"]):
        line = "lora"
    elif words[0] == "lora" and words[1:] and words[1] not in LORA_ACTIONS and not _OPTION.match(words[1]):
        _refuse_near_miss(words)
        return None
    parser = COMMANDS[words[0]][1]
    try:
        arguments = shlex.split(line)[1:]
    except ValueError:
        return None
    options, rest = parser.parse_known_intermixed_args(arguments)
    text = any(not word.startswith("-") for word in rest)
    if text and not _OPTION.match(rest[0] if words[0] == "lora" else words[1]):
        return None
    if rest:
        known = [name for action in parser._actions for name in action.option_strings]
        told = f"{near_miss(rest[0], known)}" if known else "; it takes none"
        raise UsageError(f"unknown option {rest[0]} of %mistral {words[0]}{told}. After a lone -- everything is text")
    return words[0], options


def _refuse_near_miss(words: list[str]) -> None:
    """`UsageError` where an action of `lora` seems misspelt: as a prompt it might have to be paid for.

    A word that follows it must be what the action takes, or else they are taken for prose.
    """
    said, what = words[1], list(itertools.takewhile(lambda word: not word.startswith("--"), words[2:]))
    actions = [action for action in LORA_ACTIONS if len(action) > 2]
    near = [_OTHER_WORDS[said]] if said in _OTHER_WORDS else difflib.get_close_matches(said, actions, 1, 0.75)
    if near and len(what) <= 1 and all(_fits(near[0], word) for word in what):
        told = f"%mistral lora has no {said}; did you mean {near[0]}?"
        raise UsageError(f"{told} After a lone -- everything is text")


def _fits(action: str, word: str) -> bool:
    """Whether `word` can be the folder or the adapter that comes after an action."""
    from mistral_nb.finetunes.adapter import is_path
    from mistral_nb.finetunes.known import kept_names

    takes = LORA_ACTIONS[action]
    folder = "folder" in takes and (is_path(word) or os.path.isdir(word))
    return folder or ("adapter" in takes and word in kept_names())
