"""Completion of what `%mistral` and `%%mistral` take: commands, options, their values, and `{{variables}}`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from IPython.core import completer
from IPython.core.error import UsageError

from mistral_nb.config import BACKENDS
from mistral_nb.errors import ModelError
from mistral_nb_magics.commands import COMMANDS, LORA_ACTIONS
from mistral_nb_magics.interpolate import lookup
from mistral_nb_magics.options import FORMATS

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["add_completion", "candidates", "remove_completion"]

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
    if last == "--backend":
        return BACKENDS
    if last == "--format":
        return FORMATS
    if last == "--model" or (former in _BEFORE_A_MODEL and not word.startswith("-")):
        return _models()
    if last in _NAMED:
        return _names("", namespace)
    if former == ["lora"] and in_line and not word.startswith("-"):
        return LORA_ACTIONS
    if former and former[0] in COMMANDS and in_line:
        parser = COMMANDS[former[0]][1]
        return [name for action in parser._actions for name in action.option_strings]
    if word.startswith("-"):
        return options
    return COMMANDS if in_line and not former else ()


def _names(owner: str, namespace: Mapping[str, Any]) -> list[str]:
    """The public names in `namespace`, or those of the value that `owner`, which ends with a dot, leads to."""
    if not owner:
        return sorted(name for name in namespace if not name.startswith("_"))
    try:
        return [name for name in dir(lookup(owner[:-1].strip(), namespace)) if not name.startswith("_")]
    except UsageError:
        return []


def _models() -> list[str]:
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
        completions = [completer.SimpleCompletion(text=name, type="mistral") for name in found]
        return {"completions": completions, "matched_fragment": word, "suppress": bool(found)}

    shell.Completer.custom_matchers.append(mistral_matcher)


def remove_completion(shell: InteractiveShell) -> None:
    matchers = shell.Completer.custom_matchers
    matchers[:] = [each for each in matchers if getattr(each, "matcher_identifier", "") != "mistral_nb"]
