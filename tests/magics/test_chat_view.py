"""The chat's front end: its parts are one module, and it takes patches as the reference receiver does."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.rendering import BlockStream, blocks
from mistral_nb.rendering.patches import CODES
from mistral_nb_magics.chat.view import SCRIPTS, STATIC, STYLES, ChatView, join_scripts, join_styles

ANSWERS = (
    "# Title\n\nSome *text* with a [link](https://example.org) and `code`.\n\n- one\n- two\n  - three\n\n> said\n",
    "```python\ndef f(x: int) -> str:\n    return 'é😀' * x  # twice\n```\n\nafter 😀 it\n\n```\nplain\n```\n",
    "| a | b |\n|---|--:|\n| 1 | 2 |\n| 😀 | 4 |\n\n$$\\frac{a}{b}$$\n\n1. x\n2. y\n\n***\n\n```js\nlet a",
    "text that becomes\n===\n\na heading, and [a link] defined late\n\n[a link]: https://example.org\n",
)
RECEIVER = """
const { streams } = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(streams.map((patches) => {
  const blocks = [];
  for (const patch of patches) if (applyPatch(blocks, patch) === null) throw new Error("a patch does not fit");
  return blocks;
})));
"""


@pytest.fixture
def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("no node on the PATH: the front end is checked in the browser group only")
    return found


def test_the_front_end_is_every_file_and_holds_no_comment() -> None:
    names = {f"{name}.js" for name in SCRIPTS} | {f"{name}.css" for name in STYLES}
    assert names | {"slider.js", "slider.css"} == {path.name for path in STATIC.iterdir()}
    module = join_scripts()
    assert module.count("export default") == 1
    assert not [line for line in module.splitlines() if line.lstrip().startswith(("//", "/*", "* "))]
    assert "\n\n" not in join_styles()
    assert len(module) + len(join_styles()) < 80_000  # characters, which every chat sends to its browser


def test_the_module_is_javascript(node: str, tmp_path: Path) -> None:
    module = tmp_path / "chat.mjs"
    module.write_text(join_scripts(), "utf-8")
    subprocess.run([node, "--check", str(module)], check=True, capture_output=True)


def test_the_browser_takes_patches_as_the_reference_does(node: str) -> None:
    chance = random.Random(5)
    streams = [patches(answer, chance) for answer in ANSWERS for _ in range(4)]
    script = (STATIC / "store.js").read_text("utf-8") + RECEIVER
    done = subprocess.run(
        [node, "-e", script], input=json.dumps({"streams": streams}), check=True, capture_output=True, text=True
    )
    expected = [[asdict(block) for block in blocks(answer)] for answer in ANSWERS for _ in range(4)]
    assert json.loads(done.stdout) == expected


def test_the_browser_reads_the_codes_of_a_patch_as_the_reference_does(node: str) -> None:
    script = (STATIC / "store.js").read_text("utf-8") + "console.log(JSON.stringify(CODES))"
    done = subprocess.run([node, "-e", script], check=True, capture_output=True, text=True)
    assert tuple(json.loads(done.stdout)) == CODES


def patches(answer: str, chance: random.Random) -> list[Any]:
    """The patches of an answer that comes in pieces of 1 to 9 characters."""
    stream = BlockStream()
    made: list[Any] = []
    while answer:
        piece = chance.randint(1, 9)
        stream.add(answer[:piece])
        answer = answer[piece:]
        made.append(stream.patch())
    made.append(stream.end())
    return [patch for patch in made if patch is not None]


def test_a_view_gives_on_messages_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Mapping[str, Any]] = []
    view = ChatView(heard.append)
    with caplog.at_level(logging.WARNING):
        for content in ({"type": "hello", "ref": 1}, {"ref": 2}, {"type": 3}, ["hello"], None):
            view._handle_custom_msg(content, [])
    assert heard == [{"type": "hello", "ref": 1}]
    assert len(caplog.records) == 4
    view.close()
