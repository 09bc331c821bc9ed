"""What changed between two lists of blocks, as little JSON, and the receiver that puts it together again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NotRequired, TypedDict

from mistral_nb.rendering.blocks import Block
from mistral_nb.rendering.signs import units

__all__ = ["CODES", "Patch", "apply", "difference"]


MAX_STAY = 300  # characters at the end of a body that are looked for again

# Markup that formulas are full of; in a patch each is one control character from U+0080 on, which no block holds.
CODES = (
    *("<mi>", "</mi>", "<mo>", "</mo>", "<mn>", "</mn>", "</mi><mi>", "</mi><mo>", "</mo><mi>", "</mo><mn>"),
    *("</mn><mo>", "</mi><mn>", "<msub><mi>", "</mn></msub>", "<msup><mi>", "</mn></msup>", "<mfrac>", "</mfrac>"),
    *("<mrow>", "</mrow>", "<math>", "</math>", '<math display="block">', '<mspace width="', 'em"></mspace>'),
    *('<mtd style="text-align:', "</mtd>", "</td><td>", "<strong>", "</strong>", "<code>", "</code>"),
)
_CODED = {code: chr(0x80 + index) for index, code in enumerate(CODES)}
_LONG = re.compile("|".join(sorted(CODES, key=len, reverse=True)))
_SHORT = re.compile("[\x80-\x9f]")


class Patch(TypedDict):
    """A change of a list of blocks, to be applied in this order: cut to `count` blocks, then `set`, entry by entry.

    An entry is [index, kind, language, field, keep, add]: that block's `field` ("body" or "marks") becomes the first
    `keep` UTF-16 code units of what it was, and `add`. A block of another kind, or a new one, starts empty.
    Where only the body changes, and not from its start, the entry is [index, add, stay, drop], of which zeros at the
    end are left out: the last `stay` units of the body stay, the `drop` before them go, and `add` takes their place.
    `add` is written with CODES; all numbers count what it stands for.
    """

    count: NotRequired[int]
    """How many blocks there are now; left out where the number stays."""
    set: list[list[Any]]


def difference(old: Sequence[Block], new: Sequence[Block], start: int = 0) -> Patch | None:
    """The patch that makes `new` of `old`, whose first `start` blocks are equal; None where there is none."""
    entries = [
        entry
        for index in range(start, len(new))
        for entry in _entries(index, old[index] if index < len(old) else None, new[index])
    ]
    if len(old) != len(new):
        return {"count": len(new), "set": entries}
    return {"set": entries} if entries else None


def _entries(index: int, old: Block | None, new: Block) -> Iterator[list[Any]]:
    if old == new:
        return
    if old is None or old.kind != new.kind:
        yield [index, new.kind, new.language, "body", 0, _coded(new.body)]
        if new.marks:
            yield [index, new.kind, new.language, "marks", 0, new.marks]
        return
    if old.language != new.language:
        yield [index, new.kind, new.language, "body", *_change(old.body, new.body)]
    elif old.body != new.body:
        yield [index, *_middle(old.body, new.body)]
    if old.marks != new.marks:
        yield [index, new.kind, new.language, "marks", *_change(old.marks, new.marks)]


def _change(old: str, new: str) -> tuple[int, str]:
    kept = _common(old, new)
    return units(old[:kept]), _coded(new[kept:])


def _middle(old: str, new: str) -> tuple[str] | tuple[str, int] | tuple[str, int, int]:
    """(add, stay, drop), without the zeros at its end."""
    start = _common(old, new)
    end = _common(old[start:][: -MAX_STAY - 1 : -1], new[start:][: -MAX_STAY - 1 : -1])
    add = _coded(new[start : len(new) - end])
    stay, drop = units(old[len(old) - end :]), units(old[start : len(old) - end])
    if drop:
        return add, stay, drop
    return (add, stay) if stay else (add,)


def _coded(add: str) -> str:
    return _LONG.sub(lambda code: _CODED[code[0]], add)


def _spelled(add: str) -> str:
    return _SHORT.sub(lambda sign: CODES[ord(sign[0]) - 0x80], add)


def _common(first: str, second: str) -> int:
    """How many characters two texts share at their start. Linear: each step halves what is compared."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def apply(blocks: list[Block], patch: Patch) -> list[Block]:
    """The blocks that a receiver has after a patch. ValueError where it does not fit, so that one was missed."""
    count = patch.get("count", len(blocks))
    blocks = blocks[:count]
    for entry in patch["set"]:
        index = entry[0]
        if index > len(blocks):
            raise ValueError(f"a patch for block {index} came before one for block {len(blocks)}")
        old = blocks[index] if index < len(blocks) else None
        new = _applied(old, *entry[1:]) if len(entry) == 6 else _spliced(old, *entry[1:])
        blocks[index : index + 1] = [new]
    if len(blocks) != count:
        raise ValueError(f"a patch for {count} blocks left {len(blocks)}")
    return blocks


def _applied(old: Block | None, kind: Literal["html", "code"], language: str, field: str, keep: int, add: str) -> Block:
    body, marks = (old.body, old.marks) if old and old.kind == kind else ("", "")
    if field == "body":
        return Block(kind, _cut(body, keep) + _spelled(add), language, marks)
    return Block(kind, body, language, _cut(marks, keep) + _spelled(add))


def _spliced(old: Block | None, add: str, stay: int = 0, drop: int = 0) -> Block:
    if old is None or units(old.body) < stay + drop:
        raise ValueError("a patch came for more of a block than there is")
    end = units(old.body) - stay
    body = _cut(old.body, end - drop) + _spelled(add) + old.body.encode("utf-16-le")[2 * end :].decode("utf-16-le")
    return replace(old, body=body)


def _cut(text: str, keep: int) -> str:
    return text.encode("utf-16-le")[: 2 * keep].decode("utf-16-le")
