"""Markdown from a model: nothing in it acts in any renderer, and it reads as it did."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt
from nbconvert.filters.markdown_mistune import markdown2html_mistune

from mistral_nb.safe_markdown import literal, plain_text, safe_markdown

HARMLESS = {
    *("p", "em", "strong", "del", "s", "code", "pre", "a", "ul", "ol", "li", "dl", "dt", "dd", "input", "blockquote"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "hr", "br", "span", "div", "section", "sup"),
    *("table", "thead", "tbody", "tr", "td", "th"),
}
RENDERERS: dict[str, Callable[[str], str]] = {
    "markdown-it, as in VS Code": MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render,
    "mistune, as in nbconvert": markdown2html_mistune,
}
PIECES = [
    *("<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "</script>", "<b>", "<!--", "-->", "<pre>", "<?"),
    *("<![CDATA[", "<https://a.b>", "<div\n", "onerror=alert(1)>", "[a](javascript:alert(1))", "[a](", ")", "[a]:"),
    *("\n[a]: javascript:alert(1)\n", "[a]", "![i](x)", "![", "javascript:alert(1)", "javascript&colon;", "&Tab;"),
    *("`", "``", "```", "~~~", "```html\n", "```mermaid\n", "\n```\n", "\n~~~\n", "````\n", "\n", "\n\n", " ", "\t"),
    *("- ", "1. ", "> ", "    ", "\n- ", "\n  ", "\n    ", "\n> ", "# ", "---\n", "===\n", "\n|a|b|\n|-|-|\n|", "|"),
    *("$", "$$", "\\", "\\(", "\\)", "\\[", "\\]", "\\\\[", "\\\\]", "\\\\(", "\\\\)", "\\begin{x}", "\\end{x}"),
    *("\\$", "\\`", "\\<", "\\!", "&#36;", "&#92;", "&lt;", "&#60;", "&", "\u2028", "\x0b", "*", "_", '"', "'", "text"),
]


class Acting(HTMLParser):
    """Collects what a browser would act on: elements that are not harmless, handlers, and links to scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in HARMLESS:
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            link = re.sub(r"[\x00-\x20]", "", value or "").lower()
            if name.startswith("on") or (
                name in ("href", "src") and link.startswith(("javascript:", "data:", "vbscript:"))
            ):
                self.found.append(f"{name}={value}")


def acting(markdown: str) -> dict[str, list[str]]:
    """What acts, by renderer."""
    found = {}
    for name, render in RENDERERS.items():
        page = Acting()
        page.feed(render(markdown))
        if page.found:
            found[name] = page.found
    return found


def visible(html: str) -> str:
    page = HTMLParser()
    texts: list[str] = []
    page.handle_data = texts.append  # type: ignore[method-assign]
    page.feed(html)
    return " ".join("".join(texts).split())


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "text <img src=x onerror=alert(1)> text",
        "<div onclick=alert(1)>\n\nblock\n\n</div>",
        "[click](javascript:alert(1))",
        "[click]( javascript&colon;alert(1) )",
        "[click](java&#115;cript:alert(1))",
        "[click](java\\script:alert(1))",
        "[click](vbscript:x) [click](data:text/html,x) [click](command:run)",
        "[click][a]\n\n[a]: javascript:alert(1)",
        "> [a]:\n> javascript:alert(1)\n\n[a]",
        "![seen](https://elsewhere.example/pixel)",
        "```html\n</script><script>alert(1)</script>\n```",
        "```html\n<script>alert(1)</script>",
        "```mermaid\n<img src=x onerror=alert(1)>\n```",
        "- item\n  ```html\n  $ <img src=x onerror=alert(1)> $\n  ```",
        "$$\n\n```\n$$ <img src=x onerror=alert(1)>\n```",
        "\\begin{a}\n\n```\n\\end{a} <img src=x onerror=alert(1)>\n```",
        "    <img src=x onerror=alert(1)>",
        "|a|b|\n|-|-|\n|`<img src=x onerror=alert(1)>|`|",
        "`` `<img src=x onerror=alert(1)> ``",
        "\\<img src=x onerror=alert(1)>",
        '$:"onerror=alert(1)$ http://a.b/$"x$',
    ],
)
def test_nothing_acts(text: str) -> None:
    assert acting(safe_markdown(text)) == {}


def test_the_check_sees_what_acts() -> None:
    for text in ("<script>x</script>", "<img src=x onerror=y>", "```mermaid\n<img src=x>\n```"):
        assert acting(text), text
    assert acting("[a](javascript:x)\n\n<a href=javascript:x>")


@pytest.mark.parametrize("seed", range(8))
def test_nothing_acts_in_random_hostile_text(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(150):
        text = "".join(chance.choice(PIECES) for _ in range(chance.choice((4, 8, 16, 40))))
        assert acting(safe_markdown(text)) == {}, text


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n\nSome *emphasis*, **strong** and `code`.\n\n- one\n- two\n\n1. first\n2. second\n\n> quoted",
        "Use `List<int>` or `a < b`; 1 < 2 > 0 & 3. A tag is `<div>` or <div>.",
        "```python\nif a < b:\n    print('<b>', f\"{x}\")\n```\n\nand\n\n~~~\nplain\n~~~",
        "1. Run\n   ```sh\n   echo $HOME > file\n   ```\n2. Then `for x in a[1:]: f[x](y)`",
        "A [link](https://example.org/a?b=c) and [another](page.html#part).",
        "It costs $5, not $10. C:\\\\Users and \\*stars\\*.",
        "Head | Tail\n-----|-----\n`a` | b < c",
        "    indented <code>\n\ntext with ``two ` ticks``",
        "Dear [name]: see below!\n\n![diagram]",
    ],
)
def test_it_reads_as_before(text: str) -> None:
    plain = MarkdownIt("commonmark", {"html": False}).enable("table")
    shown = MarkdownIt("commonmark", {"html": True}).enable("table")
    assert visible(shown.render(safe_markdown(text))) == visible(plain.render(text))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\\(x^2\\) and \\[ y \\]", "$x^2$ and $$y$$"),
        ("\\[\na\n- b\n= c\n\\]", "$$a - b = c$$"),
        ("so $a < b$ and $$c < d$$", "so $a \\lt b$ and $$c \\lt d$$"),
        ("\\begin{align}x &= 1\\\\y\\end{align}", "$$\\begin{align}x &= 1\\\\y\\end{align}$$"),
        ("`\\(x\\)` and\n```\n\\[x\\]\n```", "`\\(x\\)` and\n\n```\n\\[x\\]\n```"),
        ("open \\( only", "open \\( only"),
    ],
)
def test_formulas(text: str, wanted: str) -> None:
    assert safe_markdown(text) == wanted


@pytest.mark.parametrize("text", ["\\(\\href{javascript:x}{y}\\)", "$\\href{x}{y}$", "&#36;x&#36;", "$5 to $6"])
def test_what_is_no_formula_keeps_no_delimiter(text: str) -> None:
    assert "$" not in safe_markdown(text).replace("<span>&#36;</span>", "")
    assert "&#36;" not in safe_markdown(text).replace("<span>&#36;</span>", "")


def test_an_open_fence_is_closed() -> None:
    assert safe_markdown("```python\nx = 1") == "```python\nx = 1\n```"
    assert safe_markdown("```") == "```\n```"
    assert safe_markdown("````md\n```\nx\n```") == "````md\n```\nx\n```\n````"


def test_a_literal_line_means_nothing() -> None:
    line = 'my_model_v2 *x* [a](javascript:x) `c` <b>"q"</b> $x$ C:\\dir | &lt;'
    html = RENDERERS["markdown-it, as in VS Code"](f"<small>{literal(line)}</small>")
    assert visible(html) == line
    assert re.findall(r"<(\w+)", html) == ["p", "small"]


def test_control_characters_are_left_out() -> None:
    assert plain_text("a\x1b[31mb\r\nc\rd\x00\x07\te\x9b") == "a[31mb\nc\nd\te"


@pytest.mark.parametrize(
    "piece", ["a", "<", "`", "`a", "$a ", "[", "](", "\\(", "> ", "a\n", "```\n", "$$\n", "\\begin{a}"]
)
def test_a_long_text_takes_bounded_time(piece: str) -> None:
    """In the square of its length that would be many minutes."""
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    safe_markdown(text)
    assert time.process_time() - started < 60


@pytest.mark.parametrize(("columns", "tables"), [(30, 1), (2000, 0)])
def test_a_table_with_too_many_columns_stays_text(columns: int, tables: int) -> None:
    text = f"{'|h' * columns}|\n{'|-' * columns}|\n|a|\n"
    html = RENDERERS["markdown-it, as in VS Code"](safe_markdown(text))
    assert html.count("<table>") == tables
    assert visible(html).count("h") == columns


@pytest.mark.parametrize(("depth", "typeset"), [(20, True), (900, False)])
@pytest.mark.parametrize(("left", "right"), [("{", "}"), ("\\left(", "\\right)")])
def test_a_formula_nested_too_deeply_stays_text(left: str, right: str, depth: int, typeset: bool) -> None:
    depth = min(depth, 150) if "(" in left else depth
    text = f"${left * depth}x{right * depth}$"
    assert ("$" in safe_markdown(text)) is typeset
