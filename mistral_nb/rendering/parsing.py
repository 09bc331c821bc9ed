r"""markdown-it-py, with HTML off, few links, formulas, and bounds on what makes it slow, large or forgetful.

Left open by markdown-it-py itself, and closed here: relative links, `data:` images and every scheme but four that it
knows as bad; text that it drops below its deepest nesting; time that grows with the square of the brackets in a
paragraph; and tables that grow to thousands of times their source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from markdown_it import MarkdownIt
from markdown_it.rules_block.table import table as table_rule
from markdown_it.rules_inline.emphasis import tokenize as emphasis_rule
from markdown_it.rules_inline.image import image as image_rule
from markdown_it.rules_inline.link import link as link_rule

from mistral_nb.rendering.links import allowed
from mistral_nb.safe_markdown import CLOSE_DOLLAR, MAX_MATH, is_formula

if TYPE_CHECKING:
    from markdown_it.rules_block import StateBlock
    from markdown_it.rules_core import StateCore
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

__all__ = ["parse"]

MAX_NESTING = 30
MAX_COLUMNS = 64
MAX_INLINE = 3_000  # characters parsed as one; a longer paragraph is parsed in parts
MAX_BRACKETS = 120  # in such a part; with more of them it has no links

_CLOSING = {"$$": "$$", "\\[": "\\]", "$": "$", "\\(": "\\)"}
_DISPLAYED = ("$$", "\\[")
_ENDS = {
    "$": CLOSE_DOLLAR,
    "$$": re.compile(r"(?<!\\)\$\$"),
    "\\]": re.compile(r"\\\]"),
    "\\)": re.compile(r"\\\)"),
}
_ENVIRONMENT = re.compile(r"\\begin\{((?:align|equation|gather|multline)\*?)\}")
_BRACKETS = re.compile(r"[\[\]]+")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
# Letters and signs of scripts that put no spaces between words.
_WIDE = re.compile("[\u1100-\u11ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff00-\uffef]")
# Code and formulas on one line, in which a `|` ends no cell of a table; an escape begins neither.
_WHOLE = re.compile(
    r"\\\((?:(?!\\[()]).)*\\\)|\\.|(?<!`)(`+)[^`\n]+\1(?!`)"
    r"|(?<!\$)\$(?![\s$|])[^$\n]*(?<!\|)" + CLOSE_DOLLAR.pattern
)
_PIPE = re.compile(r"(?<!\\)\|")
_HELD = "\x01"  # a `|` in them, while a table is cut into cells; no control character is left in a cleaned text
_AFTER = re.compile(r"[ \t]*[.,;:]?[ \t]*")


def parse(text: str, references: Any, *, growing: bool) -> list[Token]:
    """The tokens of cleaned text. `references` takes and gives link definitions.

    With `growing`, more text may come: a display formula that is still open at the end is a formula already.
    """
    return _parser().parse(text, {"references": references, "growing": growing, "known": {}})


class _Markdown(MarkdownIt):
    """The parser with its own idea of which links there are."""

    def validateLink(self, url: str) -> bool:
        return allowed(url)


@cache
def _parser() -> MarkdownIt:
    parser = _Markdown("commonmark", {"html": False, "maxNesting": MAX_NESTING + 4})
    parser.enable(["table", "strikethrough"]).disable(["html_block", "html_inline"])
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    parser.block.ruler.before(
        "fence", "math_block", _display, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )
    parser.block.ruler.before("table", "deep", _deep)
    parser.inline.ruler.before("escape", "math_inline", _inline_formula)
    parser.inline.ruler.at("emphasis", _emphasis)
    parser.inline.ruler.before("autolink", "break", _break)
    parser.inline.ruler.at("link", _link)
    parser.inline.ruler.at("image", _image)
    parser.core.ruler.at("inline", _inline)
    return parser


def _deep(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """What is nested deeper than anyone writes is one paragraph."""
    if state.level < MAX_NESTING:
        return False
    if not silent:
        state.push("paragraph_open", "p", 1).map = [start, end]
        token = state.push("inline", "", 0)
        token.content = state.getLines(start, end, state.blkIndent, False).strip()
        token.children = []
        state.push("paragraph_close", "p", -1)
    state.line = end
    return True


def _table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    if start + 1 < end and state.src.count("|", state.bMarks[start + 1], state.eMarks[start + 1]) > MAX_COLUMNS:
        return False
    source, first = state.src, len(state.tokens)
    if "held" not in state.env:
        state.env["held"] = _WHOLE.sub(lambda match: _PIPE.sub(_HELD, match[0]), source)
    state.src = state.env["held"]
    found = table_rule(state, start, end, silent)
    state.src = source
    for token in state.tokens[first:]:
        token.content = token.content.replace(_HELD, "|")
    return found


def _display(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    r"""`$$..$$`, `\[..\]` or an environment on lines of its own, without a blank line and not over MAX_MATH."""
    first = _line(state, start)
    environment = _ENVIRONMENT.match(first)
    if state.is_code_block(start) or not (environment or first.startswith(_DISPLAYED)):
        return False
    closing = f"\\end{{{environment[1]}}}" if environment else _CLOSING[first[:2]]
    found = _closed(state, start, end, closing, keep=bool(environment))
    if found is None:
        return False
    content, line, is_open = found
    if silent:
        return True
    token = state.push("math_block", "math", 0)
    token.content, token.markup, token.block, token.map = content, first[:2], True, [start, line]
    token.meta = {"open": is_open}
    state.line = line
    return True


def _line(state: StateBlock, line: int) -> str:
    return state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]]


def _closed(state: StateBlock, start: int, end: int, closing: str, *, keep: bool) -> tuple[str, int, bool] | None:
    """(formula, line after it, whether it is still open) where `closing` ends a line soon enough."""
    skip = 0 if keep else 2
    parts: list[str] = []
    size = 0
    for line in range(start, end):
        if line > start and (state.isEmpty(line) or state.sCount[line] < state.blkIndent):
            return None
        text = _line(state, line)[skip if line == start else 0 :]
        at = text.find(closing)
        size += len(text) + 1
        if size > MAX_MATH or "\\[" in (text[:at] if at >= 0 else text):
            return None
        if at >= 0:
            parts.append(text[: at + len(closing)] if keep else text[:at])
            content = "\n".join(parts).strip()
            whole = _AFTER.fullmatch(text, at + len(closing)) and is_formula(content)
            return (content, line + 1, False) if whole else None
        parts.append(text)
    open_end = state.env["growing"] and state.level == 0 and end == state.lineMax
    return ("\n".join(parts), end, True) if open_end else None


def _inline_formula(state: StateInline, silent: bool) -> bool:
    r"""`$..$`, `$$..$$`, `\(..\)` or `\[..\]` within a paragraph; dollars as in `mistral_nb.safe_markdown`."""
    src, start = state.src, state.pos
    if src[start] not in "$\\":
        return False
    sign = src[start : start + 2]
    if sign not in _CLOSING:
        if sign[0] != "$":
            return False
        sign = "$"
    begin, closing = start + len(sign), _CLOSING[sign]
    end = _formula_end(state, begin, closing)
    body = src[begin:end] if end is not None else ""
    if end is None or not is_formula(body) or (sign == "$" and body[0].isspace()):
        return False
    if not silent:
        token = state.push("math_inline", "math", 0)
        token.content, token.markup = body.strip(), sign
    state.pos = end + len(closing)
    return True


def _formula_end(state: StateInline, begin: int, closing: str) -> int | None:
    """Where `closing` stands next within MAX_MATH. What was searched in vain before is not searched again."""
    limit = min(state.posMax, begin + MAX_MATH)
    known = state.env["known"]
    source, clear_from, clear_to = known.get(closing, ("", 0, 0))
    if source is not state.src or not clear_from <= begin <= clear_to:
        clear_from = clear_to = begin
    match = _ENDS[closing].search(state.src, clear_to, limit)
    known[closing] = (state.src, clear_from, match.start() if match else max(limit - len(closing) + 1, clear_to))
    return match.start() if match and match.start() > begin else None


def _emphasis(state: StateInline, silent: bool) -> bool:
    """Stars beside a letter of a script without spaces open and close, whatever signs they enclose."""
    start, first = state.pos, len(state.delimiters)
    if not emphasis_rule(state, silent):
        return False
    before, after = state.src[max(0, start - 1) : start], state.src[state.pos : state.pos + 1]
    if state.src[start] == "*" and before.strip() and after.strip():
        for delimiter in state.delimiters[first:]:
            delimiter.open = delimiter.open or bool(_WIDE.match(before))
            delimiter.close = delimiter.close or bool(_WIDE.match(after))
    return True


def _break(state: StateInline, silent: bool) -> bool:
    """`<br>`, the one way to write a line end into a cell of a table."""
    match = _BREAK.match(state.src, state.pos, state.posMax)
    if not match:
        return False
    if not silent:
        state.push("hardbreak", "br", 0)
    state.pos = match.end()
    return True


def _link(state: StateInline, silent: bool) -> bool:
    if state.env["no_links"]:
        return _brackets(state, silent)
    return link_rule(state, silent)


def _image(state: StateInline, silent: bool) -> bool:
    return not state.env["no_links"] and image_rule(state, silent)


def _brackets(state: StateInline, silent: bool) -> bool:
    """Brackets as the text that they are, a run at a time."""
    match = _BRACKETS.match(state.src, state.pos, state.posMax)
    if not match:
        return False
    if not silent:
        state.pending += match[0]
    state.pos = match.end()
    return True


def _inline(state: StateCore) -> None:
    end = state.src.rstrip("\n").count("\n") + 1 if state.env["growing"] else None
    for token in state.tokens:
        if token.type == "fence":
            token.meta = {"open": bool(end and token.map and token.map[1] >= end)}
        elif token.type == "inline":
            token.children = []
            for part in _parts(token.content):
                state.env["no_links"] = "]" not in part or part.count("[") > MAX_BRACKETS
                children: list[Token] = []
                state.md.inline.parse(part, state.md, state.env, children)
                token.children += children


def _parts(content: str) -> Iterator[str]:
    """The content, cut at white space where it is longer than MAX_INLINE."""
    at = 0
    while len(content) - at > MAX_INLINE:
        cut = max(content.rfind(space, at + MAX_INLINE // 2, at + MAX_INLINE) for space in (" ", "\n")) + 1
        cut = cut or at + MAX_INLINE
        yield content[at:cut]
        at = cut
    yield content[at:]
