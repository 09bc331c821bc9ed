"""Markdown, formulas and code as models write them: what the blocks say."""

from __future__ import annotations

import re

import pytest

from mistral_nb.rendering import Block, blocks
from mistral_nb.rendering.highlight import CLASSES, marks
from mistral_nb.rendering.mathml import mathml
from mistral_nb.rendering.signs import units
from mistral_nb.safe_markdown import is_formula

LINK = 'rel="noopener noreferrer nofollow" target="_blank"'


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("A *b* **c** ~~d~~ `e`", "<p>A <em>b</em> <strong>c</strong> <s>d</s> <code>e</code></p>"),
        ("a\nb  \nc\\\nd", "<p>a\nb<br>c<br>d</p>"),
        ("# One", "<h3>One</h3>"),
        ("###### Six", "<h6>Six</h6>"),
        ("- a\n- b", "<ul><li>a</li><li>b</li></ul>"),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("- [ ] a\n- [x] b", "<ul><li>\u2610 a</li><li>\u2611 b</li></ul>"),
        ("- a\n  - b", "<ul><li>a\n<ul><li>b</li></ul></li></ul>"),
        ("- a\n  ```py\n  x < 1\n  ```",
         '<ul><li>a\n<pre lang="py" data-marks="_4m1"><code>x &lt; 1</code></pre></li></ul>'),
        ('> ```p"y\n> x\n> ```', "<blockquote><pre><code>x</code></pre></blockquote>"),
        ("**\u6ce8\uff1a**\u8bf7\u5148**\u300c\u5148\u300d**\u3002",
         "<p><strong>\u6ce8\uff1a</strong>\u8bf7\u5148<strong>\u300c\u5148\u300d</strong>\u3002</p>"),
        ("\u91cd ** \u4e0d **\u662f 2 ** 3", "<p>\u91cd ** \u4e0d **\u662f 2 ** 3</p>"),
        ("a<br>b<BR />c `<br>` \\<br> <br x>", "<p>a<br>b<br>c <code>&lt;br&gt;</code> &lt;br&gt; &lt;br x&gt;</p>"),
        ("Use $PATH:$HOME, $A/$b, ${C}:${D}, $IN$OUT", "<p>Use $PATH:$HOME, $A/$b, ${C}:${D}, $IN$OUT</p>"),
        ("> a\n> b", "<blockquote><p>a\nb</p></blockquote>"),
        ("---", "<hr>"),
        ("[a](https://b.c/d?e=f&g)", f'<p><a href="https://b.c/d?e=f&amp;g" {LINK}>a</a></p>'),
        ("<https://b.c> <d@e.fg>", f'<p><a href="https://b.c" {LINK}>https://b.c</a> '
         f'<a href="mailto:d@e.fg" {LINK}>d@e.fg</a></p>'),
        ("(see https://b.c/d_(e).)", f'<p>(see <a href="https://b.c/d_(e)" {LINK}>https://b.c/d_(e)</a>.)</p>'),
        ("![a *b*](https://b.c/d.png)", f'<p><a href="https://b.c/d.png" {LINK}>a b</a></p>'),
        ("[a](page.html)", "<p>[a](page.html)</p>"),
        ("a < b & c > \"d\" 'e'", "<p>a &lt; b &amp; c &gt; \"d\" 'e'</p>"),
        ("&copy; &lt;b&gt;", "<p>\u00a9 &lt;b&gt;</p>"),
        ("a\u202eb", "<p>a[U+202E]b</p>"),
    ],
)  # fmt: skip
def test_markup(text: str, body: str) -> None:
    assert blocks(text) == [Block("html", body)]


def test_a_table() -> None:
    (table,) = blocks("| a | b |\n|:--|--:|\n| `x` | y |\n| z |")
    left, right = ' style="text-align:left"', ' style="text-align:right"'
    assert table.body == (
        f"<table><thead><tr><th{left}>a</th><th{right}>b</th></tr></thead><tbody>"
        f"<tr><td{left}><code>x</code></td><td{right}>y</td></tr><tr><td{left}>z</td><td{right}></td></tr></tbody></table>"
    )


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        ("`a || b` | x", ["<code>a || b</code>", "x"]),
        ("``a|`` | `b|c`", ["<code>a|</code>", "<code>b|c</code>"]),
        ("\\(a|b\\) | `x\\|y` \\|", ["<math><mi>a</mi><mo>|</mo><mi>b</mi></math>", "<code>x|y</code> |"]),
        ("$P(A|B)$ | x", ["<math><mi>P</mi><mi>(</mi><mi>A</mi><mo>|</mo><mi>B</mi><mi>)</mi></math>", "x"]),
        ("$5 | $6", ["$5", "$6"]),
        ("$A|$B", ["$A", "$B"]),
        ("\\`a | b`", ["`a", "b`"]),
        ("`a | b", ["`a", "b"]),
        ("$a | b", ["$a", "b"]),
    ],
)
def test_a_pipe_in_code_or_a_formula_ends_no_cell(row: str, cells: list[str]) -> None:
    (table,) = blocks(f"| a | b |\n|---|---|\n| {row} |")
    assert re.findall("<td>(.*?)</td>", table.body.replace(' stretchy="false"', "")) == cells


@pytest.mark.parametrize(
    ("text", "code", "language"),
    [
        ("```python\nx = 1\n\n```", "x = 1\n", "python"),
        ("~~~C++ title\n<b>&\n~~~", "<b>&", "C++"),
        ("```\nopen", "open", ""),
        ("    indented\n\n      more", "indented\n\n  more", ""),
        ('```{.python}" x\na\n```', "a", ""),
    ],
)
def test_code(text: str, code: str, language: str) -> None:
    (block,) = blocks(text)
    assert (block.kind, block.body, block.language) == ("code", code, language)


def test_every_block_is_by_itself() -> None:
    kinds = [block.kind for block in blocks("# a\n\nb\n```\nc\n```\n- d\n- e\n\n> f\n\n[x]: http://y.z\n\n[x]")]
    assert kinds == ["html", "html", "code", "html", "html", "html"]


def test_nothing_is_lost_below_the_deepest_nesting() -> None:
    for deep in ("> " * 500 + "words", "- " * 500 + "words", "*" * 101 + "words" + "*" * 101, "[" * 200 + "words"):
        assert "words" in blocks(deep)[0].body


def test_a_long_paragraph_is_whole() -> None:
    text = " ".join(f"word{number}" for number in range(3_000))
    assert blocks(text) == [Block("html", f"<p>{text}</p>")]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\\(x^2\\)", "<msup><mi>x</mi><mn>2</mn></msup>"),
        ("so $x^2$, then", "<p>so <math><msup>"),
        ("\\[\nx\n- y\n= z\n\\]", '<p><math display="block"><mi>x</mi><mo>\u2212</mo><mi>y</mi>'),
        ("\\(x\\) first", "<p><math><mi>x</mi></math> first</p>"),
        ("$$x$$", '<p><math display="block"><mi>x</mi></math></p>'),
        ("a $$x$$ b", '<math display="block">'),
        ("\\begin{align}\na &= b \\\\\nc &= d\n\\end{align}", "<mtable"),
        ("$\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}$", "<mtr><mtd><mi>a</mi></mtd><mtd><mi>b</mi></mtd></mtr>"),
        ("- item\n  $$\n  x\n  $$", '<ul><li>item\n<p><math display="block">'),
        ("$\\begin{cases} 1 & x < 0 \\\\ 2 \\end{cases}$", "<mo>&lt;</mo>"),
        ("$\\mathrm{softmax}(x)$", "<math><mi>softmax</mi><mi>("),
        ("$\\mathbf{xy} \\bm{x}$", "<mi>\U0001d431</mi><mi>\U0001d432</mi>"),
        ("$\\mathcal{LN}$", "<mi>\u2112</mi><mi>\U0001d4a9</mi>"),
        ("$\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}$", '<mtd style="text-align:right"><mi>a</mi></mtd>'),
        ("$\\ln n = \\sin(x)$", '<mi>ln</mi><mspace width="0.167em"></mspace><mi>n</mi><mo>=</mo><mi>sin</mi><mi>('),
        ("$\\text{a b}$", "<mtext>a\u00a0b</mtext>"),
        ("\\(15% \\text{ of } 80\\)", "<mi>%</mi><mtext>\u00a0of\u00a0</mtext><mn>80</mn>"),
        ("$5\\% \\text{a 9% b\\%}$", "<mn>5</mn><mi>%</mi><mtext>a\u00a09%\u00a0b%</mtext>"),
        ("$$x = 1 \\\\ y$$", "<mo>=</mo><mn>1</mn></mtd></mtr><mtr>"),
        ("$$a &= b \\\\[4pt] c &= d$$", "<mi>b</mi></mtd></mtr><mtr><mtd style=\"text-align:right\"><mi>c</mi></mtd>"),
        ("$$\\begin{equation}\\label{e}a \\nonumber\\\\ b\\notag\\end{equation}$$", "<mi>a</mi></mtd></mtr><mtr>"),
        ("$$\\begin{cases} a \\\\ b \\end{cases}$$", "<p><math display=\"block\"><mrow><mo stretchy=\"true\""),
        ("$\\arg\\max_\\theta L$", "<mo>arg</mo><msub><mo>max</mo>"),
        ("$x_{1}$", "<msub><mi>x</mi><mn>1</mn></msub>"),
        ("$f(x)$", "<mi>f</mi><mi>(</mi><mi>x</mi><mi>)</mi>"),
    ],
)  # fmt: skip
def test_formulas(text: str, found: str) -> None:
    assert found in "".join(block.body for block in blocks(text))


@pytest.mark.parametrize(
    "text",
    [
        *("It costs $5 and $6.", "`$x$` and `\\(x\\)`", "$ x$", "\\$x\\$", "C:\\(x", "open $x"),
        *("$$ open\n\n$$", "\\\\(x\\\\)"),
        "```\n$x$ \\[y\\]\n```",
    ],
)  # fmt: skip
def test_what_is_no_formula(text: str) -> None:
    assert not any("<math" in block.body for block in blocks(text))


def test_a_formula_that_cannot_be_shown_is_shown_as_source() -> None:
    for tex in (
        "\\frac{1}",
        "\\unknowncmd{x}",
        "a + \\R",
        "\\begin{tikzpicture}x\\end{tikzpicture}",
        "x_1_2",
        "{" * 60 + "x" + "}" * 60,
    ):
        assert is_formula(tex)
        assert blocks(f"\\({tex}\\)") == [Block("html", f"<p><code>\\({tex}\\)</code></p>")]


def test_a_formula_of_a_model_is_kept_small() -> None:
    tex = "\\mathbb{E}[X] = \\int_{-\\infty}^{\\infty} x f(x) \\, dx"
    shown = mathml(tex)
    assert shown
    assert len(shown) < 12 * len(tex)
    assert "xmlns" not in shown


def coloured(code: str, language: str) -> dict[str, list[str]]:
    """The runs of each class."""
    found: dict[str, list[str]] = {}
    whole, at = code.encode("utf-16-le"), 0
    for kind, size in re.findall(r"([a-z]+|_)(\d+)", marks(code, language)):
        found.setdefault(kind, []).append(whole[2 * at : 2 * (at + int(size))].decode("utf-16-le"))
        at += int(size)
    assert at <= units(code)
    return found


def test_highlighting() -> None:
    found = coloured("@cached\ndef f(x):\n    return '\U0001f600' + str(12)  # done \u00e9", "python")
    assert found["nd"] == ["@cached"]
    assert found["nf"] == ["f"]
    assert found["k"] == ["def", "return"]
    assert found["s"] == ["'\U0001f600'"]
    assert found["m"] == ["12"]
    assert found["c"] == ["# done \u00e9"]
    assert set(found) - {"_"} <= set(CLASSES.values())


@pytest.mark.parametrize("language", ["", "nosuchlanguage", "brainfuck", "../etc"])
def test_other_languages_are_plain(language: str) -> None:
    assert marks("x = 1", language) == ""


def test_long_code_is_plain() -> None:
    assert marks("x = 1\n" * 20_000, "python") == ""
    assert marks("x" * 5_000, "python") == ""
