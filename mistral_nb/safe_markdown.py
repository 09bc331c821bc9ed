r"""Markdown from a model, made safe to show: it reads the same, and nothing in it acts.

Whoever shows `text/markdown` (JupyterLab, VS Code, nbconvert, GitHub) passes raw HTML through, each with a parser of
its own. So the text is changed until no parser can find anything that acts: outside code every `<` becomes an entity;
a link keeps its form only where its scheme is allowed; an image, which would be fetched on sight, becomes a link; a
dollar or TeX delimiter that opens no formula is taken apart, since a formula may swallow the fence of the code after
it, and TeX can make links. Fenced code at the top level is written again in one plain form that all parsers read
alike. Any other code whose text would act outside code (in a list, indented, between backticks) becomes a `<code>`
element made of entities.

`\(..\)` and `\[..\]` become `$..$` and `$$..$$`, which is what notebooks typeset. A fence that is still open is closed.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

__all__ = ["CLOSE_DOLLAR", "MAX_MATH", "SCHEMES", "fenced", "is_formula", "literal", "plain_text", "safe_markdown"]

SCHEMES = frozenset({"http", "https", "mailto", "ftp"})
MAX_MATH = 2000
MAX_NESTING = 64
"""A browser takes a second to typeset a formula of 900 nested groups."""
MAX_COLUMNS = 200
"""Every row of a table gets all of its columns: 2,000 of them in 500 rows stop a page for five seconds."""


_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTAINER = re.compile(r"[ \t>]*(?:(?:[-+*]|\d{1,9}[.)])[ \t>]+)*[ \t>]*")
_ACTS = re.compile(r"<[A-Za-z/!?]|!\[|\$|\\(?:begin|end)\{|\\\\[\[(]")
_SPECIAL = re.compile(
    r"""
    (?P<environment>\\begin\{(?P<name>[a-zA-Z]+\*?)\})
  | (?P<tex>\\(?:begin|end)\{)
  | (?P<slashes>\\\\)
  | (?P<open>\\[\[(])
  | (?P<escape>\\[!-/:-@\[-`{-~])
  | (?P<ticks>`+)
  | (?P<tildes>~{3,})
  | (?P<dollars>\$\$?)
  | (?P<less><)
  | (?P<image>!(?=\[))
  | (?P<link>\](?=[(:]))
  | (?P<entity>&(?:\#0*(?:36|92)|\#[xX]0*(?:24|5[cC])|dollar|bsol);?)
    """,
    re.VERBOSE,
)
_LINK = re.compile(r"\](?=[(:])")
_TARGET = re.compile(r"[(:][\s>]*([^\s()]*)(\)?)")
_ACTIVE_TEX = re.compile(
    r"\\(?:href|url|style|class|cssId|data|require|includegraphics|mmlToken|csname|let|[gex]?def|(?:re)?new\w+)(?![a-zA-Z])"
)
_DOLLAR, _BACKSLASH = "<span>&#36;</span>", "<span>&#92;</span>"
CLOSE_DOLLAR = re.compile(r"(?<=[^\s\\$])\$(?![\d$A-Z]|(?<=[:/=]\$)[\w{])")  # nor `$PATH:$HOME`
_DISPLAY_OPEN = re.compile(r"[ \t]*(?:[-+*]|\d{1,9}[.)])?[ \t]*(\\\[|\$\$)")


def plain_text(text: str) -> str:
    """The text without terminal escapes and other control characters; line ends become newlines."""
    return _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))


def literal(line: str) -> str:
    """A line of plain text for the midst of Markdown or HTML, where no sign in it means anything."""
    return re.sub(r"""[&<>"`*_~\[\]|\\$]""", lambda sign: f"&#{ord(sign[0])};", plain_text(line))


def fenced(text: str, language: str = "") -> str:
    """`text` as one code block, whatever fences it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def safe_markdown(text: str) -> str:
    """Markdown that shows the same as `text` and holds nothing that acts. Linear in the length of `text`."""
    lines = plain_text(text).split("\n")
    parts = _parts(lines)
    joined = _join_formulas(lines, parts)
    if joined is not None:
        lines, parts = joined, _parts(joined)
    return "\n".join(_write(lines, parts))


@dataclass(frozen=True, slots=True)
class _Part:
    """Lines `first` to `last`, the latter excluded, of a kind: "fence", "indented" or "text"."""

    kind: str
    first: int
    last: int
    content: str = ""
    markup: str = ""
    info: str = ""
    nested: bool = False


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False})
    parser.core.ruler.enableOnly(["block"])
    return parser


def _parts(lines: list[str]) -> list[_Part]:
    """The document as code blocks and runs of text; a run never reaches over the end of a paragraph."""
    found = []
    for token in _parser().parse("\n".join(lines)):
        if token.map is None or token.type not in ("fence", "code_block", "inline"):
            continue
        kind = {"fence": "fence", "code_block": "indented", "inline": "text"}[token.type]
        first, last = token.map
        found.append(_Part(kind, first, last, token.content, token.markup, token.info, token.level > 0))
    parts: list[_Part] = []
    line = 0
    for part in found:
        if part.first < line:
            continue
        if part.first > line:
            parts.append(_Part("text", line, part.first))
        parts.append(part)
        line = part.last
    if line < len(lines):
        parts.append(_Part("text", line, len(lines)))
    return parts


def _join_formulas(lines: list[str], parts: list[_Part]) -> list[str] | None:
    r"""The lines with each display formula of several lines put on one, or None where there is none.

    Inside a formula a line that begins with `-` or `=` is no list and no heading.
    """
    code = {line for part in parts if part.kind != "text" for line in range(part.first, part.last)}
    joined: list[str] = []
    at = 0
    while at < len(lines):
        end = None if at in code else _formula_end(lines, at, code)
        joined.append(lines[at] if end is None else " ".join([lines[at], *(s.strip() for s in lines[at + 1 : end])]))
        at = end or at + 1
    return joined if len(joined) < len(lines) else None


def _formula_end(lines: list[str], first: int, code: set[int]) -> int | None:
    """The line after a display formula that line `first` opens and a later one closes."""
    opening = _DISPLAY_OPEN.match(lines[first])
    if not opening:
        return None
    closing = {"\\[": "\\]", "$$": "$$"}[opening[1]]
    if closing in lines[first][opening.end() :]:
        return None
    size = 0
    for line in range(first + 1, len(lines)):
        size += len(lines[line])
        if line in code or not lines[line].strip() or size > MAX_MATH or "%" in lines[line - 1]:
            return None
        if closing in lines[line]:
            return line + 1
    return None


def _write(lines: list[str], parts: list[_Part]) -> Iterator[str]:
    blank = True
    fenced = False
    for part in parts:
        source = "\n".join(lines[part.first : part.last])
        top = part.kind == "fence" and not part.nested
        if (top and not blank) or (fenced and source.partition("\n")[0].strip()):
            yield ""
        if top:
            yield _fence(part)
        elif part.kind == "text":
            yield _neutral(source)
        elif _acts(part.content) or _unclosed(lines, part):
            yield _code_element(lines[part.first], part)
        else:
            yield source
        fenced = top
        blank = not top and not lines[part.last - 1].strip()


def _unclosed(lines: list[str], part: _Part) -> bool:
    last = lines[part.last - 1].lstrip(" \t>").rstrip()
    return part.kind == "fence" and (part.last - part.first < 2 or set(last) != set(part.markup))


def _fence(part: _Part) -> str:
    """A fence at the margin, longer than any run of backticks inside, its language one plain word."""
    longest = max((len(run) for run in re.findall("`{3,}", part.content)), default=2)
    fence = "`" * (longest + 1)
    words = part.info.split()
    language = words[0] if words and re.fullmatch(r"[\w+#.-]{1,40}", words[0]) else ""
    if language.startswith("mermaid") and _acts(part.content):
        language = ""  # nbconvert puts a diagram's source into the page as it is
    body = part.content if not part.content or part.content.endswith("\n") else part.content + "\n"
    return f"{fence}{language}\n{body}{fence}"


def _code_element(line: str, part: _Part) -> str:
    """A nested or indented code block on one line, after the marks of the list items and quotes that hold it."""
    if part.kind == "fence":
        prefix = line[: line.find(part.markup)]
    else:
        code = part.content.partition("\n")[0]
        prefix = line.removesuffix(code).expandtabs(4).removesuffix("    ")
    if not _CONTAINER.fullmatch(prefix):
        prefix = ""
    return f"{prefix}<pre><code>{_entities(part.content)}</code></pre>"


def _entities(text: str) -> str:
    """`text` with every character that Markdown or HTML could read as a sign written as an entity."""
    return re.sub(r"[^\w ]|_", lambda match: f"&#{ord(match[0])};", text)


def _neutral(text: str) -> str:
    """A run of text outside code blocks, with code spans and formulas kept and everything else made inert."""
    text = "\n".join(map(_no_giant_table, text.split("\n"))) if text.count("|") > MAX_COLUMNS else text
    if not _SPECIAL.search(text):
        return text
    run = _Run(text)
    out: list[str] = []
    at = 0
    while match := _SPECIAL.search(text, at):
        out.append(text[at : match.start()])
        piece, at = _HANDLERS[str(match.lastgroup)](run, match)
        if piece.startswith("$") and out[-1] == "" and len(out) > 1 and out[-2].endswith("$"):
            out.append(" ")
        out.append(piece)
    out.append(text[at:])
    return "".join(out)


def _no_giant_table(line: str) -> str:
    """The row of dashes that makes a table, unless that has more columns than a page takes in its stride."""
    is_rule = line.count("|") > MAX_COLUMNS and not line.strip(" \t>|:-")
    return line.replace("|", "&#124;") if is_rule else line


class _Run:
    """A run of text and where in it code spans and formulas can end, found once so that the time stays linear."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.ticks: dict[int, list[int]] = {}
        for match in re.finditer("`+", text):
            self.ticks.setdefault(len(match[0]), []).append(match.start())
        self.dollars = [match.start() for match in CLOSE_DOLLAR.finditer(text)]

    def code_end(self, start: int, size: int) -> int | None:
        """Where the next run of `size` backticks starts."""
        return _next(self.ticks.get(size, []), start)

    def formula_end(self, start: int, closing: str) -> int | None:
        """Where the `closing` sign of a formula stands that begins at `start`."""
        end = _next(self.dollars, start) if closing == "$" else self.text.find(closing, start, start + MAX_MATH)
        return end if end is not None and start < end < start + MAX_MATH else None


def _next(places: list[int], start: int) -> int | None:
    index = bisect_left(places, start)
    return places[index] if index < len(places) else None


_Handler = Callable[[_Run, "re.Match[str]"], tuple[str, int]]


def _code_span(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    size = len(match[0])
    close = run.code_end(match.end(), size)
    if close is None:
        return (match[0] if size < 3 else _entities(match[0])), match.end()
    code = run.text[match.end() : close]
    end = close + size
    if size < 3 and not _acts(code):
        return run.text[match.start() : end], end
    if "\n" in code:
        signs = "\n".join(_entities(line) for line in code.split("\n"))
        return f"{_entities(match[0])}{signs}{_entities(match[0])}", end
    stripped = code[1:-1] if code.strip() and code[0] == code[-1] == " " else code
    return f"<code>{_entities(stripped)}</code>", end


def _escape(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    entity = {"\\<": "&lt;", "\\$": _DOLLAR, "\\!": "&#33;", "\\]": "&#93;", "\\`": "&#96;"}.get(match[0])
    return entity or match[0], match.end()


def _dollars(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    """A formula between dollars: as in Pandoc, `$` hugs what it encloses and no digit follows the last one."""
    sign, start = match[0], match.end()
    end = run.formula_end(start, sign)
    body = run.text[start:end] if end else ""
    if not end or not is_formula(body) or (sign == "$" and body[0].isspace()):
        return _DOLLAR * len(sign), start
    return sign + _formula(body) + sign, end + len(sign)


def _bracketed(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    closing, sign = ("\\]", "$$") if match[0] == "\\[" else ("\\)", "$")
    end = run.formula_end(match.end(), closing)
    body = run.text[match.end() : end].strip() if end else ""
    if not end or not is_formula(body):
        return match[0], match.end()
    return sign + _formula(body) + sign, end + len(closing)


def _environment(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    closing = f"\\end{{{match['name']}}}"
    end = run.formula_end(match.end(), closing)
    body = run.text[match.start() : end + len(closing)] if end else ""
    if not is_formula(body):
        return _tex(run, match)
    return f"$${_formula(body)}$$", match.start() + len(body)


def is_formula(body: str) -> bool:
    """Whether it can be typeset: whole, with no sign that would end it early, and no command that makes a link."""
    if not body.strip() or set(body) & set('`$"') or body.endswith("\\") or _ACTIVE_TEX.search(body):
        return False
    return _is_balanced(body) and _depth(body) <= MAX_NESTING


def _depth(body: str) -> int:
    """How deep groups and stretched brackets are nested."""
    steps = (
        1 if sign in ("{", "\\left") else -1
        for sign in re.findall(r"(?<!\\)[{}]|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])", body)
    )
    return max(accumulate(steps), default=0)


def _is_balanced(body: str) -> bool:
    """Whether every environment that the formula begins ends in it."""
    names: list[str] = []
    for sign, name in re.findall(r"\\(begin|end)\{([^{}]*)\}", body):
        if sign == "begin":
            names.append(name)
        elif not names or names.pop() != name:
            return False
    return not names


def _formula(body: str) -> str:
    r"""TeX that means the same and is no HTML and no link to a parser that does not see it as a formula."""
    body = re.sub(r"<\s?", r"\\lt ", body)
    body = re.sub(r"(\]|!|\\\\)(?=[(:\[])", r"\1 ", body)
    return body if "%" in body else body.replace("\n", " ")


def _link(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    """The `]` before a link's target: an entity, which ends the link, unless the target is allowed."""
    return ("]" if _allowed_link(run.text, match.end()) else "&#93;"), match.end()


def _entity(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    return _entities(match[0]), match.end()


def _less(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    return "&lt;", match.end()


def _sign(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    """A dollar or backslash that stays one: an element of its own, since MathJax looks for delimiters in the page."""
    return (_DOLLAR if html.unescape(match[0]) == "$" else _BACKSLASH), match.end()


def _tex(run: _Run, match: re.Match[str]) -> tuple[str, int]:
    return _BACKSLASH + _entities(match[0][1:]), match.end()


def _acts(code: str) -> bool:
    """Whether code would be more than text to a parser that does not see it as code."""
    return bool(_ACTS.search(code)) or not all(_allowed_link(code, link.end()) for link in _LINK.finditer(code))


def _allowed_link(text: str, at: int) -> bool:
    """Whether the target that `(` or `:` at `at` opens is relative, or absolute with an allowed scheme."""
    target = _TARGET.match(text, at)
    assert target
    if not target[1]:
        return bool(target[2])
    decoded = html.unescape(html.unescape(target[1])).replace("\\", "")
    word = "".join(c for c in decoded if c.isprintable() and not c.isspace()).lower()
    scheme, colon, _ = word.partition(":")
    return not colon or scheme in SCHEMES or any(sign in scheme for sign in "/?#")


_HANDLERS: dict[str, _Handler] = {
    "environment": _environment,
    "tex": _tex,
    "slashes": _sign,
    "entity": _sign,
    "open": _bracketed,
    "escape": _escape,
    "ticks": _code_span,
    "tildes": _entity,
    "dollars": _dollars,
    "less": _less,
    "image": _entity,
    "link": _link,
}
