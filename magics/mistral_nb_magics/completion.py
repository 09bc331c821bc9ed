"""Completion of what our magics take: commands, options, their values, and `{{variables}}`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from IPython.core import completer
from IPython.core.error import UsageError

from mistral_nb.config import BACKENDS
from mistral_nb.errors import ModelError
from mistral_nb_magics.bench.options import bench_candidates
from mistral_nb_magics.commands import COMMANDS, LORA_ACTIONS
from mistral_nb_magics.interpolate import lookup
from mistral_nb_magics.options import FORMATS

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["add_completion", "candidates", "known_models", "remove_completion"]

_CELL = re.compile(r"\s*%%mistral(?!\S)")
_LINE = re.compile(r"(?:^|.*=)\s*%mistral(?!\S)")
_HOLE = re.compile(r"\{\{\s*((?:[^{}]*\.)?)(\w*)$")
_BEFORE_A_MODEL = (["pull"], ["models"])
_NAMED = ("--messages", "--functions", "--out", "-o")


def candidates(
    before: str, first_line: str, namespace: Mapping[str, Any], options: Iterable[str]
) -> tuple[str, list[str]]:
    """What could stand at the end of `before`, the line up to the cursor: the word begun, and the whole words.

    `first_line` is the first line of the cell, and `options` are those of the magic.
    """
    on_line = _LINE.match(before) or _CELL.match(before)
    if not on_line and not _CELL.match(first_line):
        return "", []
    hole = _HOLE.search(before)
    if hole:
        return hole[2], [name for name in _names(hole[1], namespace) if name.startswith(hole[2])]
    if not on_line:
        return "", []
    words = before[on_line.end() :].split(" ")
    word, former = words[-1], [each for each in words[:-1] if each]
    return word, [
        name
        for name in _words(word, former, _LINE.match(before) is not None, namespace, options)
        if name.startswith(word)
    ]


def _words(
    word: str, former: list[str], in_line: bool, namespace: Mapping[str, Any], options: Iterable[str]
) -> Iterable[str]:
    last = former[-1] if former else ""
    if former[:1] == ["lora"] and in_line and (len(former) == 1 or former[1] in LORA_ACTIONS):
        return _lora_words(word, former)
    if last == "--lora":
        return _adapters(word)
    if last == "--backend":
        return BACKENDS
    if last == "--format":
        return FORMATS
    if last == "--model" or (former in _BEFORE_A_MODEL and not word.startswith("-")):
        return known_models()
    if last in _NAMED:
        return _names("", namespace)
    if former and former[0] in COMMANDS and former[0] != "lora" and in_line:
        parser = COMMANDS[former[0]][1]
        return [name for action in parser._actions for name in action.option_strings]
    if word.startswith("-"):
        return options
    return COMMANDS if in_line and not former else ()


def _lora_words(word: str, former: list[str]) -> Iterable[str]:
    if len(former) == 1:
        return LORA_ACTIONS
    takes = LORA_ACTIONS[former[1]]
    if "folder" in takes and len(former) == 2 and not word.startswith("-"):
        return _folders(word)
    if "adapter" in takes and len(former) == 2:
        return _kept_here()
    if former[-1] == "--model":
        from mistral_nb.finetunes.adapter import DEFAULT_MODEL

        return (DEFAULT_MODEL,)
    return [f"--{name}" for name in takes if name not in ("folder", "adapter")] if word.startswith("-") else ()


def _folders(begun: str) -> list[str]:
    """The paths of folders that may go on from `begun`, hidden ones only where it says so; those of one word."""
    parent, name = begun[: begun.rfind("/") + 1], begun[begun.rfind("/") + 1 :]
    try:
        with os.scandir(os.path.expanduser(parent) or ".") as entries:
            found = sorted(entry.name for entry in entries if entry.is_dir() and " " not in entry.name)
    except OSError:
        return []
    return [f"{parent}{each}/" for each in found if name or not each.startswith(".")]


def _adapters(begun: str) -> list[str]:
    """What adapters are called, and folders where a path is begun: the local engine takes them too."""
    from mistral_nb.finetunes.adapter import is_path
    from mistral_nb.finetunes.known import known_names

    return _folders(begun) if is_path(begun) else known_names()


def _kept_here() -> list[str]:
    from mistral_nb.finetunes.known import kept_names

    return kept_names()


def _names(owner: str, namespace: Mapping[str, Any]) -> list[str]:
    """The public names in `namespace`, or those of the value that `owner`, which ends with a dot, leads to."""
    if not owner:
        return sorted(name for name in namespace if not name.startswith("_"))
    try:
        return [name for name in dir(lookup(owner[:-1].strip(), namespace)) if not name.startswith("_")]
    except UsageError:
        return []


def known_models() -> list[str]:
    """The names, aliases and hub ids of the known models, and the names of those that are here."""
    from mistral_nb.models import KNOWN, installed

    names = {name for model in KNOWN for name in (model.name, *model.aliases, model.hub_id)}
    with suppress(ModelError):  # a store that cannot be read is told when it is used
        names |= {model.name for model in installed()}
    return sorted(names)


def add_completion(shell: InteractiveShell) -> None:
    """Complete in `shell`, where IPython (8.6 and later) lets extensions do so."""
    context_matcher = getattr(completer, "context_matcher", None)
    if context_matcher is None:
        return
    parser = shell.magics_manager.registry["Mistral"].mistral.parser
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]

    @context_matcher(identifier="mistral_nb")  # type: ignore[untyped-decorator]
    def mistral_matcher(context: completer.CompletionContext) -> completer.SimpleMatcherResult:
        first_line = context.full_text.lstrip().partition("\n")[0]
        word, found = candidates(context.text_until_cursor, first_line, shell.user_ns, options)
        if not found:
            word, found = bench_candidates(context.text_until_cursor, shell.user_ns)
        completions = [completer.SimpleCompletion(text=name, type="mistral") for name in found]
        return {"completions": completions, "matched_fragment": word, "suppress": bool(found)}

    shell.Completer.custom_matchers.append(mistral_matcher)


def remove_completion(shell: InteractiveShell) -> None:
    matchers = shell.Completer.custom_matchers
    matchers[:] = [each for each in matchers if getattr(each, "matcher_identifier", "") != "mistral_nb"]
