"""A conversation to read elsewhere: as one Markdown document, as cells of a notebook, or as a notebook."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

from mistral_nb.chat.conversation import Conversation
from mistral_nb.chat.references import definitions, own_references, with_definitions
from mistral_nb.chat.turns import Turn, new_id
from mistral_nb.safe_markdown import literal, plain_text, safe_markdown

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["closed", "to_cells", "to_markdown", "to_notebook"]

_PYTHON = ("python", "python3", "py", "ipython", "ipython3")
# What ends the blocks of HTML that else go on to the end of the document. Source: CommonMark, "HTML blocks".
_HTML_ENDS = (("<!--", "-->"), ("<?", "?>"), ("<![CDATA[", "]]>"), ("<!", ">"))
# Elements that change how what is in them is shown.
_HOLDING = frozenset(
    (
        *("a", "article", "aside", "audio", "b", "big", "blockquote", "button", "center", "code", "del"),
        *("details", "dialog", "div", "dl", "em", "fieldset", "font", "footer", "form", "h1", "h2", "h3"),
        *("h4", "h5", "h6", "header", "i", "iframe", "ins", "kbd", "main", "mark", "math", "nav"),
        *("noscript", "object", "ol", "s", "samp", "section", "select", "small", "span", "strike"),
        *("strong", "sub", "summary", "sup", "svg", "table", "template", "title", "tt", "u", "ul"),
        "video",
    )
)
_MOST_OPEN = 100
_RAW_ELEMENT = re.compile("<(script|pre|style|textarea)", re.IGNORECASE)


def to_markdown(conversation: Conversation) -> str:
    """Each question quoted, each answer as the model wrote it, but for control characters; what it left open is closed.

    The labels of its link definitions are made its own. Turns that were compared with one of the path stand after it.
    """
    parts = [f"# {literal(conversation.title) or 'Chat'}"]
    for turns in conversation.shown:
        parts.append(_question(turns[0]))
        for each in turns:
            parts.append(f"**{_who(each)}**")
            parts.append(closed(own_references(plain_text(each.answer).strip("\n"), str(len(parts)))))
            parts.append(_below(each))
        parts.append("---")
    return "\n\n".join(part for part in parts if part.strip()) + "\n"


def to_cells(conversation: Conversation) -> list[dict[str, Any]]:
    """Cells as nbformat 4.5 has them. Markdown in them is safe to show; Python code is in code cells, and not run."""
    cells = []
    for turns in conversation.shown:
        cells.append(_cell("markdown", _question(turns[0]), turns[0], "question"))
        for each in turns:
            cells.extend(_answer_cells(each))
    return cells


def to_notebook(conversation: Conversation) -> str:
    """A notebook of the cells, with the title above."""
    title = _cell("markdown", f"# {literal(conversation.title) or 'Chat'}")
    data = {
        "cells": [title, *to_cells(conversation)],
        "metadata": {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(data, ensure_ascii=False, indent=1) + "\n"


def closed(text: str) -> str:
    """Markdown with the code, HTML block and elements that it leaves open closed: what follows is not part of them."""
    text = _with_last_block_closed(text)
    elements = _Elements(text).left_open
    return "\n\n".join([text, "".join(f"</{name}>" for name in reversed(elements))]) if elements else text


def _with_last_block_closed(text: str) -> str:
    if _ends(text):
        return text
    last = _parser().parse(text)[-1]
    if last.type == "fence":
        candidates = [last.markup]
    else:
        elements = dict.fromkeys(name.lower() for name in _RAW_ELEMENT.findall(last.content))
        candidates = ["".join(f"</{name}>" for name in reversed(elements))]
        candidates += [end for start, end in _HTML_ENDS if start in last.content]
    for candidate in candidates:
        if _ends(f"{text}\n{candidate}"):
            return f"{text}\n{candidate}"
    return text


def _ends(text: str) -> bool:
    """Whether a paragraph after the text is one."""
    mark = "end-of-the-answer"
    tokens = _parser().parse(f"{text}\n\n{mark}")
    return len(tokens) >= 3 and tokens[-1].type == "paragraph_close" and tokens[-2].content == mark


class _Elements(HTMLParser):
    """Reads the HTML in a Markdown text for the elements that it leaves open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.left_open: list[str] = []
        if "<" in text:
            for token in _parser(inline=True).parse(text):
                for each in token.children or [token]:
                    if each.type in ("html_block", "html_inline"):
                        self.feed(each.content)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in _HOLDING and len(self.left_open) < _MOST_OPEN:
            self.left_open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.left_open:
            del self.left_open[len(self.left_open) - 1 - self.left_open[::-1].index(tag) :]


@cache
def _parser(inline: bool = False) -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark")
    parser.core.ruler.enableOnly(["normalize", "block", *(["inline"] if inline else [])])
    return parser


def _question(turn: Turn) -> str:
    quoted = "\n".join(f"> {line}".rstrip() for line in safe_markdown(turn.prompt).strip("\n").split("\n"))
    names = ", ".join(f"{each.kind} {literal(each.name)}" for each in turn.attachments)
    return f"**You**\n\n{quoted}" + (f"\n\n*Attached: {names}*" if names else "")


def _below(turn: Turn) -> str:
    """What is told under an answer: that it failed or is not whole, and who gave it."""
    told = []
    if turn.error:
        told.append(f"**Error:** {literal(' '.join(turn.error.split()))}")
    elif turn.running:
        told.append("*Still being written.*")
    left_out = f"{turn.left_out} older turns not sent" if turn.left_out else ""
    footer = " · ".join(part for part in (turn.footer, left_out) if part)
    return "\n\n".join([*told, f"<small>{literal(footer)}</small>"] if footer else told)


def _who(turn: Turn) -> str:
    served = turn.served or {}
    model = served.get("model") or turn.choice.model or turn.choice.backend or "Answer"
    adapter = served.get("adapter") or turn.choice.fields.get("lora")
    return literal(" · ".join(str(part) for part in (model, adapter) if part))


def _answer_cells(turn: Turn) -> Iterator[dict[str, Any]]:
    pieces = list(_pieces(plain_text(turn.answer)))
    who, below = f"**{_who(turn)}**", _below(turn)
    if pieces and pieces[0][0] == "markdown":
        pieces[0] = ("markdown", f"{who}\n\n{pieces[0][1]}")
    else:
        pieces.insert(0, ("markdown", who))
    if below and pieces[-1][0] == "markdown":
        pieces[-1] = ("markdown", f"{pieces[-1][1]}\n\n{below}")
    elif below:
        pieces.append(("markdown", below))
    for kind, source in pieces:
        yield _cell(kind, source, turn, "answer")


def _pieces(answer: str) -> Iterator[tuple[str, str]]:
    """An answer as ("markdown", safe text) and ("code", Python code), in order."""
    lines, defined = answer.split("\n"), definitions(answer)
    at = 0
    for token in _parser().parse(answer):
        words = token.info.lower().split() if token.type == "fence" and token.level == 0 else []
        if words and words[0] in _PYTHON and token.content.strip():
            assert token.map
            yield from _prose(lines[at : token.map[0]], defined)
            yield "code", token.content.rstrip("\n")
            at = token.map[1]
    yield from _prose(lines[at:], defined)


def _prose(lines: list[str], defined: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    text = "\n".join(lines).strip("\n")
    if text.strip():
        yield "markdown", safe_markdown(with_definitions(text, defined))


def _cell(kind: str, source: str, turn: Turn | None = None, part: str = "") -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if turn is not None:
        served = {"served": turn.served} if part == "answer" and turn.served else {}
        metadata = {"mistral_nb": {"turn": turn.id, "part": part, **served}}
    cell: dict[str, Any] = {"cell_type": kind, "id": new_id(), "metadata": metadata, "source": source}
    return cell if kind == "markdown" else {**cell, "execution_count": None, "outputs": []}
