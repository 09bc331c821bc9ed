"""Tokens as markup of a fixed list of elements: nothing is written that is not in a table here, and text is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mistral_nb.rendering.highlight import marks
from mistral_nb.rendering.links import allowed, bare_links, other_host
from mistral_nb.rendering.mathml import mathml
from mistral_nb.rendering.signs import attribute, escape, visible

if TYPE_CHECKING:
    from markdown_it.token import Token

__all__ = ["ALIGNMENTS", "ELEMENTS", "LINK", "code_of", "language_of", "markup"]

LINK = ' rel="noopener noreferrer nofollow" target="_blank"'
ALIGNMENTS = frozenset(("text-align:left", "text-align:right", "text-align:center"))

_PAIRS = {
    **{"paragraph": "p", "blockquote": "blockquote", "bullet_list": "ul", "ordered_list": "ol", "list_item": "li"},
    **{"table": "table", "thead": "thead", "tbody": "tbody", "tr": "tr", "th": "th", "td": "td"},
    **{"em": "em", "strong": "strong", "s": "s"},
}
_HEADINGS = {"h1": "h3", "h2": "h4", "h3": "h5", "h4": "h6", "h5": "h6", "h6": "h6"}
ELEMENTS = frozenset((*_PAIRS.values(), *_HEADINGS.values(), "a", "br", "code", "hr", "pre", "span"))
_BOXES = {"[ ] ": "\u2610 ", "[x] ": "\u2611 ", "[X] ": "\u2611 "}
_LANGUAGE = re.compile(r"[A-Za-z0-9_+#.-]{1,30}")
_CLOSING_SIGNS = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}


def code_of(token: Token) -> str:
    """The code of a fence or of indented lines, without its last line end."""
    return visible(token.content.removesuffix("\n"))


def language_of(info: str) -> str:
    """The language that the first word after a fence names, if it is one plain word."""
    words = info.split()
    return words[0] if words and _LANGUAGE.fullmatch(words[0]) else ""


def markup(tokens: Sequence[Token]) -> str:
    """The tokens of whole blocks, or of items of a list or rows of a table, as markup."""
    return _Writer(tokens).write()


class _Writer:
    """Writes one top-level block. Targets of links together grow no larger than some times its source."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.out: list[str] = []
        self.left = 4_000 + 8 * sum(len(token.content) for token in tokens)
        self.link = ""
        self.link_start = 0

    def write(self) -> str:
        tokens = self.tokens
        for index, token in enumerate(tokens):
            if token.type == "inline":
                task = index > 1 and tokens[index - 2].type == "list_item_open"
                self._inline(token.children or [], task=task)
            elif token.hidden:
                if token.nesting == -1 and tokens[index + 1].type != "list_item_close":
                    self.out.append("\n")
            else:
                self._block(token)
        return "".join(self.out)

    def _block(self, token: Token) -> None:
        name, _, way = token.type.rpartition("_")
        if name in _PAIRS or name == "heading":
            tag = _HEADINGS[token.tag] if name == "heading" else _PAIRS[name]
            self.out.append(f"</{tag}>" if way == "close" else f"<{tag}{_attributes(token)}>")
        elif token.type in ("fence", "code_block"):
            self.out.append(_code(token))
        elif token.type == "hr":
            self.out.append("<hr>")
        elif token.type == "math_block":
            self.out.append(_display(token))
        else:
            self.out.append(escape(token.content))

    def _inline(self, tokens: list[Token], *, task: bool) -> None:
        for index, token in enumerate(tokens):
            if token.type in ("text", "text_special"):
                box = _BOXES.get(token.content[:4]) if task and index == 0 else None
                self._text(box + token.content[4:] if box else token.content)
            elif token.type == "softbreak":
                self.out.append("\n")
            elif token.type == "hardbreak":
                self.out.append("<br>")
            elif token.type == "code_inline":
                self.out.append(f"<code>{escape(token.content)}</code>")
            elif token.type == "math_inline":
                self.out.append(_formula(token))
            elif token.type == "image":
                self._image(token)
            elif token.type == "link_open":
                self._open_link(str(token.attrs.get("href", "")))
            elif token.type == "link_close":
                self._close_link()
            else:
                self._block(token)

    def _text(self, text: str) -> None:
        at = 0
        if not self.link and "://" in text:
            for start, end in bare_links(text):
                self.out.append(escape(text[at:start]))
                self._anchor(text[start:end], escape(text[start:end]))
                at = end
        self.out.append(escape(text[at:]))

    def _image(self, token: Token) -> None:
        """An image is a link: fetching it would tell its server that it was seen."""
        text = "".join(child.content for child in token.children or []) or "image"
        target = str(token.attrs.get("src", ""))
        if self.link or not allowed(target):
            self.out.append(escape(text))
        else:
            self._anchor(target, escape(text) + _elsewhere(text, target))

    def _anchor(self, target: str, inside: str) -> None:
        self.left -= len(target)
        self.out.append(f'<a href="{attribute(target)}"{LINK}>{inside}</a>' if self.left > 0 else inside)

    def _open_link(self, target: str) -> None:
        if allowed(target):
            self.link = target
            self.link_start = len(self.out)

    def _close_link(self) -> None:
        if self.link:
            target, self.link = self.link, ""
            inside = "".join(self.out[self.link_start :])
            del self.out[self.link_start :]
            self._anchor(target, inside + _elsewhere(re.sub("<[^>]*>", "", inside), target))


def _elsewhere(text: str, target: str) -> str:
    host = other_host(text, target)
    return f" ({escape(host)})" if host else ""


def _attributes(token: Token) -> str:
    if token.type == "ordered_list_open" and token.attrs.get("start") is not None:
        return f' start="{int(token.attrs["start"])}"'
    style = token.attrs.get("style") if token.type in ("th_open", "td_open") else None
    return f' style="{style}"' if style in ALIGNMENTS else ""


def _code(token: Token) -> str:
    """Code inside of another block; it is highlighted once its fence is closed."""
    code, language = code_of(token), language_of(token.info)
    named = f' lang="{language}"' if language else ""
    runs = "" if token.meta.get("open") else marks(code, language)
    coloured = f' data-marks="{runs}"' if runs else ""
    return f"<pre{named}{coloured}><code>{escape(code)}</code></pre>"


def _display(token: Token) -> str:
    shown = None if token.meta["open"] else mathml(token.content, display=True)
    return f"<p>{shown}</p>" if shown else f"<pre><code>{escape(token.content)}</code></pre>"


def _formula(token: Token) -> str:
    shown = mathml(token.content, display=token.markup in ("$$", "\\["))
    source = f"{token.markup}{token.content}{_CLOSING_SIGNS[token.markup]}"
    return shown or f"<code>{escape(source)}</code>"
