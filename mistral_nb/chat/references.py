"""The link definitions of an answer (`[1]: https://..`), kept to that answer where several stand in one document."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["definitions", "own_references", "with_definitions"]

# An escaped sign, code between backticks, or a label with the one after it. Possessive, so that the time stays linear.
_LABEL = re.compile(
    r"""
    \\.
  | (?P<ticks>`++) [^`]++ (?:(?!(?P=ticks)(?!`)) `++ [^`]++)*+ (?P=ticks)(?!`)
  | `++
  | \[ (?P<label>[^\[\]\\`]{1,200}+) \] (?P<full>\[ (?P<target>[^\[\]\\`]{1,200}+)? \])?
    """,
    re.VERBOSE | re.DOTALL,
)


def own_references(text: str, name: str) -> str:
    """`text` with the labels that it defines made its own by `name`, which no other text in the document has."""
    lines = text.split("\n")
    places, defined = _read(text)
    for first, last in places if defined else ():
        lines[first:last] = "".join(_renamed("\n".join(lines[first:last]), defined, name)).split("\n")
    for first, last in defined.values():
        definition = "\n".join(lines[first:last])
        lines[first:last] = re.sub(r"\[([^\[\]\\`]{1,200})\]:", rf"[\1-{name}]:", definition, count=1).split("\n")
    return "\n".join(lines)


def definitions(text: str) -> dict[str, str]:
    """What `text` defines: the source of each definition by its label, as `with_definitions` takes it."""
    lines = text.split("\n")
    return {key: "\n".join(lines[first:last]) for key, (first, last) in _read(text)[1].items()}


def with_definitions(part: str, defined: Mapping[str, str]) -> str:
    """A part of a text, and after it those of the `definitions` of the whole that it uses and does not hold itself."""
    if not defined:
        return part
    labels = (label for match in _LABEL.finditer(part) for label in match.group("label", "target") if label)
    here = _read(part)[1]
    added = [defined[key] for key in dict.fromkeys(map(_key, labels)) if key in defined and key not in here]
    return "\n".join([part, "", *added]) if added else part


def _renamed(text: str, defined: Collection[str], name: str) -> Iterator[str]:
    """A run of text in pieces, each label that stands for one of `defined` with `name` in it."""
    at = after = 0
    for match in _LABEL.finditer(text):
        yield text[at : match.start()]
        at = match.end()
        label, target = match.group("label", "target")
        if label is None:
            yield match[0]
            continue
        nested = text[match.start() - 1 : match.start()] == "]" and match.start() != after
        after = at
        if _key(target or label) not in defined or (not match["full"] and text[at : at + 1] == "("):
            yield match[0]
        elif nested and not match["full"]:
            yield f"[{label}-{name}]"
        else:
            yield f"[{label}][{target or label}-{name}]"
    yield text[at:]


def _read(text: str) -> tuple[list[tuple[int, int]], dict[str, tuple[int, int]]]:
    """The lines of each run of text outside code, and of what is defined, by its key; the last line is excluded."""
    env: dict[str, Any] = {}
    tokens = _parser().parse(text, env) if "]:" in text else []
    places = [(token.map[0], token.map[1]) for token in tokens if token.type == "inline" and token.map]
    found = env.get("references", {}).items()
    return places, {key: (reference["map"][0], reference["map"][1]) for key, reference in found}


def _key(label: str) -> str:
    from markdown_it.common.utils import normalizeReference

    return normalizeReference(label)


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser
