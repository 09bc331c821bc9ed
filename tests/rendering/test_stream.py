"""A text that grows: the patches give what the whole text gives, cost little, and settle what is settled."""

from __future__ import annotations

import json
import random
import sys
from itertools import pairwise
from typing import Any

import pytest
from markdown_it.token import Token

from mistral_nb.rendering import Block, BlockStream, apply, blocks
from mistral_nb.rendering.blocks import block_of, groups
from mistral_nb.rendering.parsing import parse
from mistral_nb.rendering.patches import CODES, difference
from mistral_nb.rendering.signs import clean
from tests.hostile import HOSTILE
from tests.rendering.answers import KINDS, answer, pieces

SHORT = [text for text in HOSTILE.values() if len(text) < 2_000]
FRAGMENTS = [
    *(
        "word",
        " word",
        " two words.",
        "\n",
        "\n\n",
        " ",
        "\t",
        "- ",
        "\n- item",
        "\n  - nested",
        "\n1. one",
        "\n2. two",
        "\n> quote",
    ),
    *(
        "# ",
        "\n## Heading",
        "\n---\n",
        "\n===\n",
        "\n***",
        "```",
        "\n```python\n",
        "\n```\n",
        "\n~~~\n",
        "    code",
        "`",
        "``",
    ),
    *(
        "**",
        "*",
        "_",
        "~~",
        "[",
        "](",
        ")",
        "](http://a.b)",
        "[a]",
        "\n[a]: http://c.d\n",
        "<http://e.f>",
        "http://g.h/i",
        "![i](http://j.k)",
    ),
    *(
        "|",
        "\n|a|b|\n|-|-|\n",
        "|c|d|\n",
        "| x",
        "$",
        "$$",
        "\n$$\n",
        "\\(x^2\\)",
        "\\[",
        "\\]",
        "\n\\[\nx\n\\]\n",
        "\\",
        "&amp;",
        "&",
        "<b>",
    ),
    *(
        "\r\n",
        "\r",
        "\u2028",
        "\u0645\u0631",
        "\u202e",
        "\U0001f600",
        "\ud83d",
        "\ude00",
        "e\u0301",
        "\x1b[0m",
        "1",
        "1.",
        "-",
        "=",
        ":",
        "|-",
        '"',
    ),
]
STRUCTURED = [
    "1. a\n2.b\n3. c\n3) d\n4) e\n   4) f\n   5)g\n\n- a\n- b\n-c\n+ d\n+ e\n\n\n|a|\n|-|\n|b|\n|c|\n- d\n|e|\n# f",
    "Not a table:\n| a | b |\n|---|---|x\nso it is text.\n\n- not\n| a |\n|-|-\n|-|-|\n",
    "Not a formula:\n\\[\nx\n\\] as words follow.\n\nNor this:\n$$\nx\ny\n\nas it is not closed.",
    "A paragraph\nof two lines.\n\nAnother **one** with `code` and\nmore.\n\n\nA third.",
    "# Title\ntext after it\n## Next\n\nSetext\n===\nText\n---\n***\nEnd",
    "- one\n- two\n  - nested\n  - more\n- three\n\nafter\n\n1. a\n2. b\n\n   in b\n3. c\n* other\n+ third",
    "- one\n- two\n\n- loose\n- four\n- five\n\n\n- six\n\n  ```py\n  x = 1\n\n  y\n  ```\n- seven\n\nend",
    "- [ ] task\n- [x] done **bold**\n   1. deep\n   2. deeper\n\n      text\n- last\n    - x\n\n# h",
    "Before\n| a | b |\n|---|--:|\n| 1 | 2 |\n| `x|y` | **z** |\n| 3 |\n| 4 | 5 | 6 |\n| 7 | 8 |\n\nafter",
    (
        "text\n```python\ndef f():\n    return 1\n\n\n```\nmore\n~~~\n```\n~~~\n\n   ```js\n   let x\n     "
        "y\n  z\n   ```\nx"
    ),
    "```\na\n\t```\n  \t  ```\n```\n| `a|b` | c<br>d |\n|---|---|\n| $P(A|B)$ | x<br>y |\n$A$PATH and $HOME$PATH",
    "``` \nopen `\n``\n  ```` \n```x\n```\n```a`b\nnot a fence\n",
    "> quote\n> more\nlazy\n\n> second\n> - list\n> - in it\n\nend",
    "Formula:\n$$\nx = y\n- z\n$$\nand\n\\[\na\n\\]\n\n\\[ open\n\n- list\n\n$$ never\nclosed\n\nend $$",
    "    code\n\n    more\n\ntext\n    lazy\n\n\tcode",
    "Inline \\(a\\) and $b$ cost $5 and $6, https://example.org/a?b=c. And &amp; so <b>on</b>.\nEnd  \nbreak\\\nx",
    "para\n#hashtag\n#\n\nx\n-\n\n- a\n-b\n\n1) x\n10) y\n1.z\n",
    (
        "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643 **\u0627\u0644\u0639\u0631\u0628** \U0001f600 "
        "e\u0301\n\n- \U0001f600\n- \u4e2d\u6587\uff0c\u5b57\n\n```py\n'\U0001f600'  # \u00e9\n```\n"
    ),
]


def cut(text: str, chance: random.Random, longest: int) -> list[str]:
    places = {0, len(text)}
    at = 0
    while at < len(text):
        at += chance.randint(1, longest)
        places.add(min(at, len(text)))
    return [text[start:end] for start, end in pairwise(sorted(places))]


def received(parts: list[str]) -> tuple[list[Block], BlockStream]:
    """What the receiver has after the patches of all parts, sent as JSON."""
    stream, got = BlockStream(), []
    for part in parts:
        stream.add(part)
        patch = stream.patch()
        if patch is not None:
            got = apply(got, json.loads(json.dumps(patch)))
        assert got == stream.blocks
    patch = stream.end()
    return (apply(got, json.loads(json.dumps(patch))) if patch else got), stream


@pytest.mark.parametrize("seed", range(6))
def test_patches_give_what_the_whole_text_gives(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(30):
        text = chance.choice((*SHORT, *STRUCTURED)) + chance.choice(("", "\n", "\n\n")) + chance.choice(STRUCTURED)
        got, stream = received(cut(text, chance, chance.choice((1, 3, 20, 200)) if len(text) < 400 else 60))
        assert got == stream.blocks == blocks(text), text


@pytest.mark.parametrize("seed", range(6))
def test_patches_of_random_texts(seed: int) -> None:
    chance = random.Random(100 + seed)
    for _ in range(50):
        text = "".join(chance.choice(FRAGMENTS) for _ in range(chance.choice((3, 10, 40))))
        got, stream = received(cut(text, chance, chance.choice((1, 4, 15))))
        assert got == stream.blocks == blocks(text), text


@pytest.mark.parametrize("kind", KINDS)
def test_patches_of_a_long_answer(kind: str) -> None:
    text = answer(kind, 12_000, seed=3)
    got, _ = received(list(pieces(text, seed=3)))
    assert got == blocks(text)


def whole(text: str) -> list[tuple[str, str, str]]:
    """Kind, body and language of the blocks of a text of which more may come, parsed as a whole."""
    return [plain(block_of(group)) for group in groups(parse(clean(text), {}, growing=True))]


def plain(block: Block) -> tuple[str, str, str]:
    return block.kind, block.body, block.language


@pytest.mark.parametrize("longest", [1, 6])
@pytest.mark.parametrize("text", [*STRUCTURED, *(answer(kind, 1_500, seed=7) for kind in KINDS)])
def test_every_moment_shows_what_the_text_so_far_gives(text: str, longest: int) -> None:
    """Nothing that is settled, or only lengthened, would look different if all were parsed again."""
    stream, sofar = BlockStream(), ""
    for part in cut(text, random.Random(longest), longest if len(text) < 1_000 else 30):
        stream.add(part)
        stream.patch()
        sofar += part
        assert [plain(block) for block in stream.blocks] == whole(sofar), sofar


def test_a_patch_is_none_where_nothing_changed() -> None:
    stream = BlockStream()
    assert stream.patch() is None
    stream.add("text")
    assert stream.patch() == {"count": 1, "set": [[0, "html", "", "body", 0, "<p>text</p>"]]}
    assert stream.patch() is None
    stream.add(" more")
    assert stream.patch() == {"set": [[0, " more", 4]]}
    stream.add("\r")
    assert stream.patch() is None
    stream.add("\n*and* so")
    assert stream.patch() == {"set": [[0, "\n<em>and</em> so", 4]]}
    assert stream.end() is None


def test_a_link_that_is_defined_late_comes_at_the_end() -> None:
    stream = BlockStream()
    for part in ("See [the manual][m].\n\n", "More text\n\nand more\n\n", "[m]: https://example.org\n"):
        stream.add(part)
        stream.patch()
    assert "[the manual][m]" in stream.blocks[0].body
    patch = stream.end()
    assert patch is not None
    assert [entry[0] for entry in patch["set"]] == [0]
    assert 'href="https://example.org"' in stream.blocks[0].body


def test_a_link_that_is_defined_early_is_there_at_once() -> None:
    stream = BlockStream()
    for part in ("[m]: https://example.org\n\none\ntwo\n\n", "three\nfour\n\n", "See [m] and\n\n"):
        stream.add(part)
        stream.patch()
    assert 'href="https://example.org"' in stream.blocks[-1].body


def test_code_is_coloured_while_it_grows() -> None:
    stream = BlockStream()
    stream.add("```python\n")
    for number in range(100):
        stream.add(f"value_{number} = 'text'  # a comment\n")
        stream.patch()
    assert stream.blocks[0].marks.count("c11") > 60
    stream.add("```\n")
    stream.patch()
    assert stream.blocks[0].marks.count("c11") == 100


def test_a_patch_that_does_not_fit_is_refused() -> None:
    for patch in ({"set": [[1, "x"]]}, {"count": 2, "set": []}, {"set": [[0, "x", 90]]}):
        with pytest.raises(ValueError, match="patch"):
            apply([Block("html", "<p>a</p>")], patch)  # type: ignore[arg-type]


def test_any_list_of_blocks_becomes_any_other() -> None:
    chance = random.Random(1)
    texts = [
        "",
        "<p><mi>x</mi></p>",
        "<p><mi>x</mi><mo>+</mo><code>a</code></p>",
        "a",
        "ab",
        "\U0001f600a",
        "\U0001f600b\U0001f601",
        "b\U0001f601",
        "\u0645",
    ]

    def some() -> list[Block]:
        return [
            Block(
                chance.choice(("html", "code")),
                chance.choice(texts),
                chance.choice(("", "py")),
                chance.choice(("", "k1", "k12")),
            )
            for _ in range(chance.randrange(4))
        ]

    for _ in range(2_000):
        old, new = some(), some()
        patch = difference(old, new)
        assert (apply(old, patch) if patch else old) == new


def test_markup_of_formulas_is_one_sign_each() -> None:
    patch = difference([], [Block("html", "".join(CODES))])
    assert patch is not None
    assert len(patch["set"][0][-1]) < len(CODES)
    assert apply([], patch) == [Block("html", "".join(CODES))]
    assert len(CODES) <= 32
    assert not [code for code in CODES for sign in code if sign in "\x80\x9f"]


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of what is parsed, one for each time."""
    lengths: list[int] = []

    def counted(text: str, references: Any, *, growing: bool) -> list[Token]:
        lengths.append(len(text))
        return parse(text, references, growing=growing)

    for module in ("blocks", "growing"):
        monkeypatch.setattr(sys.modules[f"mistral_nb.rendering.{module}"], "parse", counted)
    return lengths


# Times the text: JSON of all patches of an 8,000-token answer in pieces of 6 tokens.
BYTES = {"prose": 2.6, "code": 2.6, "lists": 3.2, "one code": 2.4, "one list": 2.6, "math": 3.4}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_costs_few_bytes_and_little_parsing(kind: str, parsed: list[int]) -> None:
    text = answer(kind)
    stream, sent = BlockStream(), []
    for part in pieces(text):
        stream.add(part)
        sent.append(stream.patch())
    sent.append(stream.end())
    size = sum(len(json.dumps(patch, ensure_ascii=False).encode()) for patch in sent if patch)
    work = sum(parsed) / len(text)
    print(f"{kind}: {len(text)} characters, {size / len(text):.2f} times as many bytes, {work:.1f} as many parsed")
    assert size < BYTES[kind] * len(text)
    assert work < 24


@pytest.mark.parametrize(
    "text", ["word " * 6_000, "- item\n" * 4_000, "> " + "quoted " * 4_000, "[a](b" * 4_000, "$x " * 8_000]
)
def test_one_long_block_takes_little_parsing(text: str, parsed: list[int]) -> None:
    """Parsed anew with every piece it would be five hundred times its length."""
    stream = BlockStream()
    for at in range(0, len(text), 27):
        stream.add(text[at : at + 27])
        stream.patch()
    stream.end()
    print(f"{text[:12]!r}: {sum(parsed) / len(text):.1f} times as many characters parsed")
    assert sum(parsed) < 50 * len(text)
