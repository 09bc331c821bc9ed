"""Whatever a model writes: what is shown is made of harmless parts, is whole, and took bounded time and room."""

from __future__ import annotations

import random
import re
import sys
import time
from xml.etree.ElementTree import Element

import pytest

from mistral_nb.rendering import Block, BlockStream, apply, blocks
from mistral_nb.rendering.mathml import write
from mistral_nb.rendering.signs import attribute, escape
from tests.hostile import FENCES, FORMULAS, HOSTILE, LINKS, MARKUP, SIGNS
from tests.rendering.inert import Inert, dangers

ROOM = 45  # times the text, the most that formulas and links of a fixed size take
TEXTS = list(HOSTILE.values())
CHUNKS = [
    part
    for text in [*MARKUP.values(), *LINKS.values(), *FORMULAS.values(), *FENCES.values()]
    if len(text) < 400
    for part in (text, text[: len(text) // 2], text[len(text) // 3 :])
]
BETWEEN = [
    "",
    " ",
    "\n",
    "\n\n",
    "\n- ",
    "\n> ",
    "\n    ",
    "|",
    "\n|-|\n",
    "`",
    "```\n",
    "$",
    "\\(",
    "\\[\n",
    "[",
    "](",
    ")",
    "*",
]


def shown(text: str) -> str:
    """The words that a reader sees."""
    page = Inert("")
    words: list[str] = []
    page.handle_data = words.append  # type: ignore[method-assign]
    for block in blocks(text):
        if block.kind == "html":
            page.feed(block.body)
        else:
            words.append(block.body)
        words.append("\n")
    return "".join(words)


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_acts(name: str) -> None:
    text = HOSTILE[name]
    seen = blocks(text)
    assert dangers(seen) == []
    assert sum(len(block.body) + len(block.marks) for block in seen) < 2_000 + ROOM * len(text)


@pytest.mark.parametrize(
    "markup",
    [
        *("<script>x</script>", "<svg></svg>", "<p onclick=x></p>", "<p id=x></p>", "<p class=x></p>", "<mi>x</mi>"),
        *("<p>", "</p>", "<p><em></p></em>", "<!-- x -->", "<!x>", "<?x>", "<p>\u202e</p>", "<p>\x1b</p>", "<br/>"),
        *(
            f'<a href="{to}" rel="noopener noreferrer nofollow" target="_blank">x</a>'
            for to in ("javascript:x", "/x", "")
        ),
        *('<a href="http://a.b">x</a>', "<td style=position:fixed></td>", "<math><mi width=99999em></mi></math>"),
    ],
)
def test_the_check_sees_what_acts(markup: str) -> None:
    assert dangers([Block("html", markup)])


def test_the_check_sees_code_that_lies() -> None:
    assert dangers([Block("code", "a\u202eb")])
    assert dangers([Block("code", "a", '"><script>')])
    assert dangers([Block("code", "a", "py", "k2")])
    assert dangers([Block("code", "a", "py", "<b>1")])


@pytest.mark.parametrize("name", MARKUP)
def test_source_stays_readable(name: str) -> None:
    """What would act elsewhere is shown as the text it is."""
    text = HOSTILE[name]
    for word in re.findall("window|onerror|javascript", text):
        assert word in re.sub("\ufffd", "", shown(text))


@pytest.mark.parametrize("name", LINKS)
def test_links_lead_where_they_say(name: str) -> None:
    allowed = ("http://", "https://", "mailto:")
    for block in blocks(LINKS[name]):
        targets = re.findall('href="([^"]*)"', block.body)
        assert all(target.lower().startswith(allowed) for target in targets)
        assert not any("example@" in target or "127.0.0.1:9/@" in target for target in targets if "//" in target)


def test_the_true_host_stands_beside_a_text_that_names_another() -> None:
    text = shown(LINKS["text of another address"])
    assert "https://bank.example/login (127.0.0.1)" in text
    assert "apple" not in re.sub(
        r"\(xn--[^)]*\)", "", "".join(re.findall('href="([^"]*)"', blocks("<https://\u0430pple.com>")[0].body))
    )
    for honest in (
        *(
            "[example.org](https://www.example.org/x)",
            "<https://example.org>",
            "https://example.org/a",
            "<a@b.example>",
        ),
        *("[os.path](https://docs.example)", "[README.md](https://a.example)", "[the manual](https://b.example)"),
    ):
        assert "(" not in shown(honest)


def test_no_sign_ends_an_attribute_or_an_element() -> None:
    assert attribute("\"<'&>\u202e\x00") == "&quot;&lt;'&amp;&gt;[U+202E]\ufffd"
    assert escape("</p>\u2066") == "&lt;/p&gt;[U+2066]"


def test_of_a_formula_only_what_is_listed_is_written() -> None:
    hostile = {"onclick": "x", "href": "javascript:x", "style": "x", "mathcolor": "white", "width": "99em", "id": "x"}
    for name in ("script", "a", "annotation-xml", "maction", "mglyph", "semantics", "mi onclick=x"):
        with pytest.raises(ValueError, match="a formula with"):
            list(write(Element(name)))
    assert "".join(write(Element("mi", hostile))) == "<mi></mi>"


@pytest.mark.parametrize("seed", range(6))
def test_nothing_acts_in_random_mixtures(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        text = "".join(chance.choice(CHUNKS) + chance.choice(BETWEEN) for _ in range(chance.choice((2, 5, 12))))
        assert dangers(blocks(text)) == [], text


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_acts_while_it_streams(name: str) -> None:
    text = HOSTILE[name]
    stream, received = BlockStream(), []
    step = max(1, len(text) // 20)
    for at in range(0, len(text), step):
        stream.add(text[at : at + step])
        patch = stream.patch()
        received = apply(received, patch) if patch else received
        assert dangers(received) == []
    patch = stream.end()
    received = apply(received, patch) if patch else received
    assert received == stream.blocks == blocks(text)


@pytest.mark.parametrize("sign", SIGNS)
def test_time_grows_with_the_length(sign: str) -> None:
    """Ten times the text takes far less than a hundred times as many calls of functions."""

    def calls(size: int) -> int:
        count, text = 0, (sign * size)[:size]

        def see(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(see)
        try:
            found = blocks(text)
        finally:
            sys.setprofile(None)
        assert dangers(found[:50]) == []
        return count

    blocks(sign)
    assert calls(20_000) < 20 * max(calls(2_000), 10_000)


def test_a_megabyte_of_brackets() -> None:
    """Time in the square of it would be hours."""
    start = time.process_time()
    assert dangers(blocks("[" * 1_000_000)) == []
    assert time.process_time() - start < 60
