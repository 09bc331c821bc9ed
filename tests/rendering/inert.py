"""What a browser would make of markup: every element, attribute and address that is not on a list is told."""

from __future__ import annotations

import re
import unicodedata
from html.parser import HTMLParser

from mistral_nb.rendering import Block

ELEMENTS = {
    *("p", "em", "strong", "s", "a", "code", "pre", "blockquote", "ul", "ol", "li", "hr", "br", "h3", "h4", "h5", "h6"),
    *("table", "thead", "tbody", "tr", "th", "td"),
}
MATH = {
    *("math", "mi", "mn", "mo", "ms", "mtext", "mspace", "mrow", "mfrac", "msqrt", "mroot", "mstyle", "mpadded"),
    *("mphantom", "menclose", "msub", "msup", "msubsup", "munder", "mover", "munderover", "mmultiscripts"),
    *("mtable", "mtr", "mtd"),
}
LANGUAGE = r"[A-Za-z0-9_+#.-]{1,30}"
MARKS = r"((_|k|n[bfcdta]|s|m|c|g[dihp])[1-9]\d*)*"
EMPTY = {"br", "hr"}
VALUES = {
    (
        "a",
        "href",
    ): r"(https?|ftp)://[^/@\s\x00-\x20\"'<>\\]+(?:[/?#][^\s\x00-\x20\"<>\\]*)?|mailto:[^\s\x00-\x20\"<>\\]+",
    ("a", "rel"): "noopener noreferrer nofollow",
    ("a", "target"): "_blank",
    ("ol", "start"): r"\d{1,9}",
    ("th", "style"): "text-align:(left|right|center)",
    ("td", "style"): "text-align:(left|right|center)",
    ("mtd", "style"): "text-align:(left|right|center)",
    ("math", "display"): "block",
    ("pre", "lang"): LANGUAGE,
    ("pre", "data-marks"): MARKS,
}
MATH_VALUES = {
    **dict.fromkeys(
        ("displaystyle", "stretchy", "fence", "separator", "largeop", "movablelimits", "accent"), "true|false"
    ),
    **dict.fromkeys(
        ("width", "height", "depth", "lspace", "rspace", "voffset"), r"[+-]?(\d{1,2}(\.\d+)?|\.\d+)[a-z]{0,2}"
    ),
    **dict.fromkeys(("minsize", "maxsize"), r"(\d{1,2}(\.\d+)?|\.\d+)[a-z]{0,2}"),
    **dict.fromkeys(("scriptlevel",), "[+-]?[0-3]"),
    **dict.fromkeys(("form", "linethickness", "mathvariant", "mathcolor", "notation"), r"[a-z0-9 -]{1,40}"),
    **dict.fromkeys(("rowlines", "columnlines"), "((none|solid|dashed) ?)+"),
}
REORDERING = re.compile("[\u202a-\u202e\u2066-\u2069]")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Inert(HTMLParser):
    """Collects in `found` what must not be there; markup that is not whole is found too."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(markup)
        self.close()
        if self.open:
            self.found.append(f"left open: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ELEMENTS | MATH or (tag == "a" and "a" in self.open):
            self.found.append(f"<{tag}>")
        if tag in MATH and tag != "math" and "math" not in self.open:
            self.found.append(f"<{tag}> outside of a formula")
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "a" and [name for name, _ in attrs] != ["href", "rel", "target"]:
            self.found.append(f"a link with {attrs}")
        for name, value in attrs:
            wanted = VALUES.get((tag, name)) or (MATH_VALUES.get(name) if tag in MATH else None)
            if (
                tag in MATH
                and re.match(r"[+-]?[\d.]+[a-z]", value or "")
                and not -1 <= float(re.sub("[a-z]", "", value or "")) <= 10
            ):
                self.found.append(f"<{tag} {name}={value!r}> over its neighbours")
            if wanted is None or not re.fullmatch(wanted, value or "", re.IGNORECASE):
                self.found.append(f"<{tag} {name}={value!r}>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.found.append(f"</{tag}> in the wrong place")

    def handle_data(self, data: str) -> None:
        self.found += text_dangers(data)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(f"<{tag}/>")

    def handle_comment(self, data: str) -> None:
        self.found.append(f"a comment {data!r}")

    def handle_decl(self, decl: str) -> None:
        self.found.append(f"a declaration {decl!r}")

    def unknown_decl(self, data: str) -> None:
        self.found.append(f"a declaration {data!r}")

    def handle_pi(self, data: str) -> None:
        self.found.append(f"an instruction {data!r}")


def text_dangers(text: str) -> list[str]:
    """Signs in a text that reorder or cover what is around them, or that no browser shows."""
    found = [f"U+{ord(sign):04X}" for sign in set(REORDERING.findall(text) + CONTROLS.findall(text))]
    run = 0
    for sign in text:
        run = run + 1 if unicodedata.category(sign) in ("Mn", "Me") else 0
        if run > 4:
            return [*found, "a pile of marks"]
    return found


def dangers(blocks: list[Block]) -> list[str]:
    """Everything in blocks that is not known to be harmless."""
    found = []
    for block in blocks:
        if block.kind == "html":
            found += Inert(block.body).found
            if block.language or block.marks:
                found.append("markup with a language")
            continue
        found += text_dangers(block.body)
        if not re.fullmatch(r"[A-Za-z0-9_+#.-]{0,30}", block.language):
            found.append(f"the language {block.language!r}")
        if not re.fullmatch(MARKS, block.marks):
            found.append(f"the marks {block.marks!r}")
        size = sum(map(int, re.findall(r"\d+", block.marks)))
        if size > len(block.body.encode("utf-16-le")) // 2:
            found.append(f"marks over {size} signs")
    return found
