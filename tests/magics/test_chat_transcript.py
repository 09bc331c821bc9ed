"""The transcript under a chat: what one answer defines is its own."""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from mistral_nb.chat import Conversation, Turn
from mistral_nb_magics.chat.transcript import bundle


def test_each_answer_has_the_link_targets_that_it_defines() -> None:
    conversation = Conversation()
    for name in ("one", "two"):
        answer = f"See [docs][1].\n\n[1]: https://{name}/\n"
        conversation.add(Turn(name, conversation.head, "Where?", answer=answer, finish_reason="stop"))
    text = MarkdownIt().render(bundle(conversation)["text/markdown"])
    assert re.findall('href="(http[^"]*)"', text) == ["https://one/", "https://two/"]
