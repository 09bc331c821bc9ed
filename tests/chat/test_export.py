"""What is exported can be read: Markdown in which no answer swallows the next turn, and valid notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest
from markdown_it import MarkdownIt

from mistral_nb.chat import Attachment, Choice, Conversation, Turn
from mistral_nb.chat.export import closed

CODE = "Like this:\n\n```python\nprint('a')\n```\n\nand\n\n```bash\nls\n```"


def chat(*answers: str) -> Conversation:
    conversation = Conversation()
    for number, answer in enumerate(answers):
        conversation.add(
            Turn(f"t{number}", conversation.head, f"Question {number}", answer=answer, finish_reason="stop")
        )
    return conversation


def test_markdown_reads_as_the_chat_went() -> None:
    conversation = chat("One.", "It is **bold**.")
    conversation.change("t0", footer="a_model · 3 tokens", served={"model": "a_model", "adapter": "mine"}, left_out=2)
    conversation.change("t0", attachments=(Attachment("variable", "df", "1"),))
    conversation.change("t1", error="it broke\noff", finish_reason="truncated")
    conversation.add(Turn("t2", "t1", "Still?\n# there", answer="wai"))
    assert conversation.to_markdown() == (
        "# Question 0\n\n"
        "**You**\n\n> Question 0\n\n*Attached: variable df*\n\n**a&#95;model · mine**\n\nOne.\n\n"
        "<small>a&#95;model · 3 tokens · 2 older turns not sent</small>\n\n---\n\n"
        "**You**\n\n> Question 1\n\n**Answer**\n\nIt is **bold**.\n\n**Error:** it broke off\n\n---\n\n"
        "**You**\n\n> Still?\n> # there\n\n**Answer**\n\nwai\n\n*Still being written.*\n\n---\n"
    )
    assert Conversation().to_markdown() == "# Chat\n"


def test_a_comparison_is_exported_side_by_side() -> None:
    conversation = chat("One.")
    pair = [Turn(n, "t0", "Which?", Choice(model=n), answer=f"by {n}", finish_reason="stop", group="g") for n in "xy"]
    conversation.add(*pair)
    conversation.select("y")
    text = conversation.to_markdown()
    assert text.count("Which?") == 1
    assert 0 < text.index("**y**\n\nby y") < text.index("**x**\n\nby x")
    assert [cell["metadata"]["mistral_nb"]["turn"] for cell in conversation.to_cells()] == ["t0", "t0", "y", "y", "x"]


def targets(markdown: str) -> list[str]:
    return re.findall('href="([^"]*)"', MarkdownIt().render(markdown))


DEFINED = (
    "[Docs][1], ![it][1], [1], [1][], *[a [b]][1]*, [1](https://in/)\n`x[1]` \\[1]\n\n    y[1]\n\n"
    '> [1]: https://{}/ "t"'
)


def test_each_answer_has_the_link_targets_that_it_defines() -> None:
    text = chat("As in [1].", DEFINED.format("one"), DEFINED.format("two")).to_markdown()
    assert targets(text) == [*("https://one/",) * 4, "https://in/", *("https://two/",) * 4, "https://in/"]
    assert text.count("`x[1]` \\[1]\n\n    y[1]\n") == 2
    hostile = "[" * 50_000 + "`" * 50_000 + "\\" * 50_000 + "\n\n[1]: x"
    assert len(chat(hostile).to_markdown()) > len(hostile)


def test_the_cells_of_an_answer_have_its_link_targets() -> None:
    answer = "See [docs][One]; not [two].\n\n```python\nx\n```\n\nand [docs][one].\n\n[one]: https://one/\n[two]: https://two/"
    cells = [cell["source"] for cell in chat(answer, "[two]").to_cells() if cell["cell_type"] == "markdown"]
    assert [targets(source) for source in cells] == [[], ["https://one/", "https://two/"], ["https://one/"], [], []]


def test_a_question_is_words_and_no_markup() -> None:
    conversation = chat("One.", "Two.")
    conversation.change("t0", prompt="What does <s> do?\n<!--")
    text = MarkdownIt().render(conversation.to_markdown())
    assert "<p>What does &lt;s&gt; do?\n&lt;!--</p>" in text
    assert "<s>" not in text


OPEN = [
    "```python\nprint(1)",
    "```",
    "~~~~\ncode",
    "````md\n```python\nx\n```\n",
    "- item\n\n  ```js\n  x",
    "> ```\n> x",
    "text\n\n<!-- hidden",
    "<script>\nalert(1)",
    "<PRE>\n\nx",
    "<pre><script>\n\nx",
    "<textarea>\n\nx",
    "<style>\n\nx",
    "<?php\n\nx",
    "<!DOCTYPE\n\nx",
    "<![CDATA[\n\nx",
    "- a\n- b",
    "    indented",
    "a\n===",
    "| a |\n|---|\n| b |",
    "[ref]: http://example.com",
    "$$\nx",
    "\\[",
    "text ``` not a fence",
    ">" * 1000 + "```",
    "",
    "\x00\x1b[31m",
]


@pytest.mark.parametrize("answer", OPEN)
def test_no_answer_swallows_the_next_turn(answer: str) -> None:
    text = chat(answer, "The end.").to_markdown()
    tokens = MarkdownIt("commonmark").parse(text)
    assert [token.content for token in tokens if token.type == "inline" and token.level == 1][-2:] == [
        "**Answer**",
        "The end.",
    ]
    assert closed(answer).startswith(answer)


def test_elements_that_an_answer_leaves_open_are_closed() -> None:
    assert closed("<details><summary>x</summary>\n\nand <b>bold") == (
        "<details><summary>x</summary>\n\nand <b>bold\n\n</b></details>"
    )
    for answer in ("<div>x</div>", "a vector<int> or List<String>", "`<div>`", "<br><img src=x>", "```\n<div>\n```"):
        assert closed(answer) == answer
    assert closed("<div>" * 5000).count("</div>") == 100
    assert closed("x\n\n<!-- <div>") == "x\n\n<!-- <div>\n-->"


def test_an_answer_that_is_whole_is_left_as_it_is() -> None:
    for answer in (CODE, "<b>x</b> $a_1$ \\(x\\)", "```\n<script>\n```", "# T\n\n1. a\n2. b"):
        assert closed(answer) == answer
        assert answer in chat(answer).to_markdown()


def test_cells_hold_python_code_to_run_and_all_else_to_read() -> None:
    conversation = chat(CODE, "```python\nx = 1\n```", "<script>alert(1)</script> and\n\n- ```python\n  y\n  ```")
    conversation.change("t1", footer="foot", served={"model": "m", "seed": 4})
    cells = conversation.to_cells()
    assert [(cell["cell_type"], cell["source"]) for cell in cells[:4]] == [
        ("markdown", "**You**\n\n> Question 0"),
        ("markdown", "**Answer**\n\nLike this:"),
        ("code", "print('a')"),
        ("markdown", "and\n\n```bash\nls\n```"),
    ]
    assert [(cell["cell_type"], cell["source"]) for cell in cells[4:8]] == [
        ("markdown", "**You**\n\n> Question 1"),
        ("markdown", "**m**"),
        ("code", "x = 1"),
        ("markdown", "<small>foot</small>"),
    ]
    assert cells[6]["metadata"] == {"mistral_nb": {"turn": "t1", "part": "answer", "served": {"model": "m", "seed": 4}}}
    assert "<script" not in json.dumps(cells[8:])
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.parametrize("answer", [*OPEN, CODE])
def test_notebooks_are_valid(answer: str, tmp_path: Path) -> None:
    conversation = chat(answer, "x")
    conversation.change("t0", prompt=answer or "x")
    path = conversation.save(tmp_path / "chat.ipynb")
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert notebook.cells[0].source.startswith("# ")


def test_a_long_answer_is_exported_in_time() -> None:
    chat("[" * 200_000, "`" * 100_000, "> " * 50_000, "```\n" * 20_001, "<!-- " * 40_000).to_markdown()
