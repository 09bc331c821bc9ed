r"""TeX as MathML of a few elements and attributes, or nothing where a formula cannot be shown that way.

latex2mathml's own writer turns entities in a formula back into markup, so only its tree of elements is used. What is
written here is elements and attributes of two fixed lists, and text with every sign escaped. Lengths are bounded, so
that no formula reaches over its neighbours, and colours are a few names, so that none hides.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING

from mistral_nb.rendering.signs import escape
from mistral_nb.safe_markdown import MAX_MATH, is_formula

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

__all__ = ["ELEMENTS", "mathml", "write"]

MAX_DEPTH = 40
MAX_GROWTH = 40

ELEMENTS = frozenset(
    (
        *("math", "mi", "mn", "mo", "ms", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mstyle", "mpadded"),
        *("mphantom", "menclose", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts"),
        *("mtable", "mtr", "mtd"),
    )
)
_CHILDREN = {
    **dict.fromkeys(("mfrac", "mroot", "msub", "msup", "munder", "mover"), 2),
    **dict.fromkeys(("msubsup", "munderover"), 3),
}
_SWITCH = re.compile("true|false")
_LENGTH = re.compile(r"([+-]?(?:\d{1,2}(?:\.\d{1,4})?|\.\d{1,4}))(?:em|ex|px|pt|mu)?")
_ALIGNMENT = re.compile(r"(?:left|right|center)")
_LINES = re.compile(r"(?:none|solid|dashed)(?: (?:none|solid|dashed)){0,40}")
_VALUES = {
    "display": re.compile("block"),
    **dict.fromkeys(("displaystyle", "stretchy", "fence", "separator", "largeop", "movablelimits", "accent"), _SWITCH),
    "scriptlevel": re.compile("[+-]?[0-3]"),
    "form": re.compile("prefix|infix|postfix"),
    "linethickness": re.compile("0|0pt|thin|medium|thick"),
    "mathvariant": re.compile("normal"),
    "mathcolor": re.compile("red|green|blue|orange|purple|magenta|cyan|teal|brown|gray|violet|olive"),
    "notation": re.compile("[a-z]{1,20}(?: [a-z]{1,20}){0,4}"),
    "rowlines": _LINES,
    "columnlines": _LINES,
}
_LETTER = re.compile("(?:LATIN|GREEK) (SMALL|CAPITAL) LETTER ([A-Z]+)|(DIGIT [A-Z]+)")
_BRACKETS = frozenset("()[]{}")
THIN_SPACE = '<mspace width="0.167em"></mspace>'
_LENGTHS = frozenset(("width", "height", "depth", "lspace", "rspace", "voffset", "minsize", "maxsize"))
# Environments that the converter does not know, as ones that it does; None: as nothing but what is inside.
_ENVIRONMENTS = {
    **dict.fromkeys(("aligned", "align", "align*", "eqnarray", "eqnarray*", "gathered", "gather", "gather*"), "align*"),
    **dict.fromkeys(("equation", "equation*", "multline", "multline*", "displaymath", "math"), None),
    **{name: name for name in ("split", "cases", "array", "smallmatrix")},
    **{f"{kind}matrix": f"{kind}matrix" for kind in ("", "p", "b", "B", "v", "V")},
}
_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([^{}]*)\}")
_PERCENT = re.compile(r"(\\(?:text[a-z]*|mbox)\s*\{[^{}]*\})|(?<!\\)((?:\\\\)*)%")
_UNNUMBERED = re.compile(r"\\(?:(?:nonumber|notag)(?![a-zA-Z])|label\s*\{[^{}]*\})")
_ARG = re.compile(r"\\arg(?![a-zA-Z])")
_ROWS = re.compile(r"\\begin\b|\\end\b|\\\\|\\.|[{}&]", re.DOTALL)
_ROW_GAP = re.compile(r"(\\\\)\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]")
_NESTS = re.compile(r"\\left(?![a-z])|\\begin\b|(?<!\\)\{|\\right(?![a-z])|\\end\b|(?<!\\)\}")


@lru_cache(maxsize=512)
def mathml(tex: str, *, display: bool = False) -> str | None:
    """A `<math>` element for a formula without its delimiters; None where it must be shown as source."""
    if len(tex) > MAX_MATH or not is_formula(tex) or _depth(tex) > MAX_DEPTH:
        return None
    from latex2mathml.converter import convert_to_element

    try:
        root = convert_to_element(_known(tex, display=display), display="block" if display else "inline")
        written = "".join(write(root))
    except Exception:  # the converter raises whatever a broken formula leads it to, up to RecursionError
        return None
    return written if len(written) < 1000 + MAX_GROWTH * len(tex) else None


def _known(tex: str, *, display: bool) -> str:
    """The formula in what the converter knows. KeyError for an environment that it does not know."""

    def other(match: re.Match[str]) -> str:
        name = _ENVIRONMENTS[match[2]]
        return f"\\{match[1]}{{{name}}}" if name else ""

    tex = _PERCENT.sub(_percent, tex)  # the converter takes % for a comment
    tex = _ENVIRONMENT.sub(other, _ARG.sub(r"\\operatorname{arg}", _UNNUMBERED.sub("", _ROW_GAP.sub(r"\1", tex))))
    return rf"\begin{{align*}}{tex}\end{{align*}}" if display and _has_rows(tex) else tex


def _percent(match: re.Match[str]) -> str:
    return match[1].replace(r"\%", "%") if match[1] else rf"{match[2]}\%"


def _has_rows(tex: str) -> bool:
    """Whether lines or columns of it end outside of braces and environments."""
    depth = 0
    for sign in _ROWS.findall(tex):
        if sign in ("{", "\\begin"):
            depth += 1
        elif sign in ("}", "\\end"):
            depth -= 1
        elif depth == 0 and sign in ("\\\\", "&"):
            return True
    return False


def _depth(tex: str) -> int:
    depth = deepest = 0
    for sign in _NESTS.findall(tex):
        depth += 1 if sign in ("{", "\\left", "\\begin") else -1
        deepest = max(deepest, depth)
    return deepest


def write(element: Element) -> Iterator[str]:
    """The element, with the one row that the converter puts around everything left out."""
    name, children = element.tag, list(element)
    if name not in ELEMENTS or len(children) != _CHILDREN.get(name, len(children)):
        raise ValueError(f"a formula with <{name}> of {len(children)}")
    if (element.text or "").startswith("\\") and element.text != "\\":
        raise ValueError(f"a formula with {element.text}, which the converter does not know")
    if name == "mrow" and len(children) == 1 and not element.attrib and not (element.text or children[0].tail):
        yield from write(children[0])
        return
    if name == "mo" and element.attrib == {"stretchy": "false"} and _text(element.text or "") in _BRACKETS:
        yield f"<mi>{_text(element.text or '')}</mi>"  # looks the same, in a third of the room
        return
    if name == "mrow" and len(children) > 1 and all(map(_is_upright, children)):
        yield f"<mi>{_text(''.join(child.text or '' for child in children))}</mi>"
        return
    variant = element.get("mathvariant", "")
    yield f"<{name}{''.join(_attributes(element))}>"
    yield _text(_styled(html.unescape(element.text or ""), variant))
    if name == "math" and len(children) == 1 and children[0].tag == "mrow" and not children[0].attrib:
        children = list(children[0])
    for child, following in zip_longest(children, children[1:]):
        yield from write(child)
        yield _text(child.tail or "")
        if following is not None and following.tag != "mo" and name not in _CHILDREN and _is_function(child):
            yield THIN_SPACE
    yield f"</{name}>"


def _is_function(element: Element) -> bool:
    """Whether it is a name such as that of `\\ln`, with its indices: what it is applied to stands off from it."""
    base = element[0] if element.tag in ("msub", "msup", "msubsup", "munder") and len(element) else element
    return base.tag == "mi" and len(base.text or "") > 1 and str(base.text).isalpha()


def _text(text: str) -> str:
    return escape(html.unescape(text))


def _is_upright(element: Element) -> bool:
    """Whether it is a letter that stands upright, as those of `\\mathrm{name}` do; several are upright as one."""
    return element.tag == "mi" and element.attrib == {"mathvariant": "normal"} and not len(element)


def _styled(text: str, variant: str) -> str:
    """The letters and digits in a style, each as a character of its own: browsers ignore most of `mathvariant`."""
    if variant in ("", "normal", "italic"):
        return text
    style = variant if variant == "double-struck" else variant.replace("-", " ")
    signs = []
    for sign in text:
        letter = _LETTER.fullmatch(unicodedata.name(sign, ""))
        name = f"{style.upper()} {' '.join(filter(None, letter.groups()))}" if letter else ""
        with suppress(KeyError):
            signs.append(_character(name))
            continue
        signs.append(sign)
    return "".join(signs)


def _character(name: str) -> str:
    """The character of that name among the mathematical ones, or, for the few that are older, elsewhere."""
    with suppress(KeyError):
        return unicodedata.lookup(f"MATHEMATICAL {name}")
    return unicodedata.lookup(name)


def _attributes(element: Element) -> Iterator[str]:
    for name, value in element.attrib.items():
        pattern = _VALUES.get(name)
        if name == "columnalign" and element.tag == "mtd" and _ALIGNMENT.fullmatch(value):
            yield f' style="text-align:{value}"'
        elif (pattern and pattern.fullmatch(value)) or (name in _LENGTHS and _is_small(value)):
            yield f' {name}="{value}"'


def _is_small(value: str) -> bool:
    """Whether a length is at most a few letters wide, and negative by one at most."""
    length = _LENGTH.fullmatch(value)
    return bool(length) and -1 <= float(length[1]) <= 10 if length else False
