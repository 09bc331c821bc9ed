"""What the page asks for: done, refused, and never believed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import pytest

from mistral_nb.chat import ChatSession, Choice, Conversation, Turn
from mistral_nb_magics.chat.choosing import choose, compared, followed
from mistral_nb_magics.chat.desk import MAX_ERROR, Desk
from tests.backends.scripted import PATIENCE
from tests.chat.conftest import says


class Screen:
    """Where a desk shows a session; keeps what it was told."""

    def __init__(self, session: ChatSession) -> None:
        self.said: list[Mapping[str, Any]] = []
        self.greetings: list[bool] = []
        self.is_open = False
        self._session = session

    def put(self, message: Mapping[str, Any]) -> None:
        json.dumps(message)
        self.said.append(message)

    def choose(self, choice: Choice) -> None:
        choose(self._session, choice)

    def open_panel(self, is_open: bool) -> None:
        self.is_open = is_open

    def greeted(self, writes: bool) -> None:
        self.greetings.append(writes)


class Page:
    """Asks a desk, and has its last answer."""

    def __init__(self, session: ChatSession, namespace: Mapping[str, Any]) -> None:
        self.session = session
        self.screen = Screen(session)
        self.desk = Desk(session, self.screen, lambda: namespace)

    def ask(self, kind: str, **more: Any) -> Mapping[str, Any]:
        before = len(self.screen.said)
        self.desk.receive({"type": kind, "ref": 7, **more})
        answers = [each for each in self.screen.said[before:] if each["type"] not in ("file", "cells")]
        assert len(answers) == 1
        assert answers[0]["ref"] == 7
        return answers[0]


@pytest.fixture
def page(session: ChatSession) -> Page:
    return Page(session, {"price": 7, "names": ["ada"], "In": ["", "x = 1"], "_ih": ["", "x = 1"]})


def grown(page: Page, *prompts: str) -> list[str]:
    """Answered turns in the conversation; their ids."""
    for number, prompt in enumerate(prompts):
        parent = f"t{number - 1}" if number else None
        page.session.conversation.add(Turn(f"t{number}", parent, prompt, answer="Yes.", finish_reason="stop"))
    return [f"t{number}" for number in range(len(prompts))]


HOSTILE = [
    {"type": "send"},
    {"type": "send", "text": 5},
    {"type": "send", "text": ""},
    {"type": "send", "text": "\ud800"},
    {"type": "send", "text": "x" * 2_000_000},
    {"type": "send", "text": "{{" * 100_000},
    {"type": "send", "text": "{{__import__('os').system('true')}}"},
    {"type": "send", "text": "x", "attach": {"kind": "cell"}},
    {"type": "send", "text": "x", "attach": "cell"},
    {"type": "send", "text": "x", "attach": [None]},
    {"type": "send", "text": "x", "attach": [{"kind": "cell", "name": ["1"]}]},
    {"type": "send", "text": "x", "attach": [{"kind": "file", "name": "/etc/passwd"}]},
    {"type": "send", "text": "x", "attach": [{"kind": "variable", "name": "print('x')"}]},
    {"type": "send", "text": "x", "attach": [{"kind": "cell", "name": "In[99]"}]},
    {"type": "send", "text": "x", "attach": [{"kind": "cell", "name": "In[" + "9" * 5000 + "]"}]},
    {"type": "send", "text": "x", "attach": [{"kind": "variable", "name": "price"}] * 21},
    {"type": "send", "text": "x", "compare": True},
    {"type": "edit", "id": "t9", "text": "x"},
    {"type": "regenerate"},
    {"type": "retry", "id": None},
    {"type": "delete", "id": "x" * 1_000_000},
    {"type": "select", "id": {}},
    {"type": "text", "id": "t9"},
    {"type": "export", "format": "../../x"},
    {"type": "export", "format": 3},
    {"type": "names", "prefix": {}},
    {"type": "names", "prefix": "", "kinds": 5},
    {"type": "preset", "name": "no such"},
    {"type": "system", "text": 3},
    {"type": "system", "text": "x" * 2_000_000},
    {"type": "__class__"},
    {"type": "x" * 1_000_000},
]


@pytest.mark.parametrize("message", HOSTILE, ids=lambda message: str(message)[:50])
def test_a_message_that_makes_no_sense_is_refused(
    page: Page, message: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    grown(page, "One?")
    before = page.session.conversation.to_json()
    answer = page.ask(message.pop("type"), **message)
    assert answer["type"] == "refused"
    assert 0 < len(answer["error"]) <= MAX_ERROR + 100
    assert page.session.conversation.to_json() == before
    assert not page.session.busy
    assert caplog.records == []


@pytest.mark.parametrize("ref", [None, {"a": 1}, ["x"], "x" * 1000])
def test_only_a_short_number_or_name_comes_back(page: Page, ref: object) -> None:
    page.desk.receive({"type": "panel", "open": True, "ref": ref})
    assert page.screen.said[-1] == {"type": "done", "ref": None}


def test_an_error_of_our_own_is_told_and_logged(page: Page, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Mapping[str, Any]):
        def __getitem__(self, name: str) -> Any:
            raise RuntimeError("the namespace is gone")

        def __iter__(self) -> Any:
            raise RuntimeError("the namespace is gone")

        def __len__(self) -> int:
            return 1

    with caplog.at_level(logging.ERROR):
        answer = Page(page.session, Broken()).ask("names", prefix="")
    assert answer["type"] == "refused"
    assert "the namespace is gone" in answer["error"]
    assert len(caplog.records) == 1


def test_values_attachments_and_braces_go_into_what_is_sent(page: Page, peer: Any) -> None:
    peer.scripts = [says("Yes.")]
    attach = [{"kind": "cell", "name": "1"}]
    assert page.ask("send", text="Is {{price}} in \\{{price}} or {{names[0]}}?", attach=attach)["type"] == "done"
    assert page.session.wait(PATIENCE)
    (turn,) = page.session.conversation
    assert turn.prompt == "Is {{price}} in \\{{price}} or {{names[0]}}?"
    assert turn.question == "Is 7 in {{price}} or ada?\n\nThe cell In[1]:\n```python\nx = 1\n```"


def test_an_unknown_name_says_how_to_write_braces(page: Page) -> None:
    answer = page.ask("send", text="{{prise}}")
    assert answer["error"].endswith("no variable 'prise'; did you mean 'price'?; \\{{name}} leaves braces as they are")


def test_an_edit_keeps_the_attachments_and_fills_the_names(page: Page, peer: Any) -> None:
    peer.scripts = [says("Yes.")]
    assert page.ask("send", text="One?", attach=[{"kind": "cell", "name": "1"}])["type"] == "done"
    assert page.session.wait(PATIENCE)
    (turn,) = page.session.conversation
    assert page.ask("edit", id=turn.id, text="Is it {{price}}?")["type"] == "done"
    assert page.session.wait(PATIENCE)
    (edited,) = page.session.conversation
    assert edited.question == "Is it 7?\n\nThe cell In[1]:\n```python\nx = 1\n```"
    assert len(page.session.conversation.turns) == 2


def test_delete_select_clear_and_undo(page: Page) -> None:
    first, second = grown(page, "One?", "Two?")
    assert page.ask("delete", id=first)["type"] == "done"
    assert [turn.id for turn in page.session.conversation] == [second]
    assert page.ask("undo")["type"] == "done"
    assert page.ask("select", id=first)["type"] == "done"
    assert page.ask("clear")["type"] == "done"
    assert len(page.session.conversation) == 0
    assert page.ask("undo")["type"] == "done"
    assert len(page.session.conversation) == 2


def test_exports_and_the_source_of_an_answer(page: Page) -> None:
    (turn,) = grown(page, "One?")
    assert page.ask("text", id=turn) == {"type": "text", "text": "Yes.", "ref": 7}
    for form in ("md", "json", "cells"):
        assert page.ask("export", format=form)["type"] == "done"
    markdown, data, cells = (each for each in page.screen.said if each["type"] in ("file", "cells"))
    assert markdown["name"] == "chat.md"
    assert "Yes." in markdown["text"]
    assert [turn.prompt for turn in Conversation.from_json(data["text"])] == ["One?"]
    assert [cell["cell_type"] for cell in cells["cells"]] == ["markdown", "markdown"]


def test_a_preset_and_a_system_text_are_chosen(page: Page) -> None:
    assert page.ask("preset", name="precise")["type"] == "done"
    assert page.session.choice.fields["temperature"] == 0
    assert page.session.choice.backend == "cloudflare"
    assert page.ask("system", text="Be brief.")["type"] == "done"
    assert page.session.choice.system == "Be brief."
    assert page.ask("system", text="")["type"] == "done"
    assert page.session.choice.system is None


def test_names_are_found_by_their_start_and_kind(page: Page) -> None:
    found = page.ask("names", prefix="p")["names"]
    assert found == [{"kind": "variable", "name": "price", "detail": "int"}]
    assert [each["name"] for each in page.ask("names", prefix="", kinds=["cell"])["names"]] == ["In[1]"]


def test_who_is_compared_follows_but_in_what_differs() -> None:
    old = Choice("cloudflare", None, "Be brief.", {"temperature": 0.5, "seed": 1, "lora": "mine"})
    other = compared(old, {"backend": "local", "temperature": 1.5})
    assert other == Choice("local", None, "Be brief.", {"temperature": 1.5, "seed": 1})
    new = Choice("cloudflare", None, "Be kind.", {"temperature": 0, "top_p": 0.5, "lora": "other"})
    assert followed(other, old, new) == Choice("local", None, "Be kind.", {"temperature": 1.5, "top_p": 0.5})


def test_choosing_changes_the_comparison_too(session: ChatSession) -> None:
    session.compare = compared(session.choice, {"model": "another"})
    choose(session, session.choice.with_fields(seed=3))
    assert session.compare == Choice(None, "another", None, {"seed": 3})


def test_hello_says_whether_the_page_can_write(page: Page) -> None:
    page.desk.receive({"type": "hello", "ref": 1, "writes": True})
    page.desk.receive({"type": "hello", "ref": 2, "writes": "yes"})
    assert page.screen.greetings == [True, False]
    assert page.screen.said == [{"type": "snapshot", "ref": 1}, {"type": "snapshot", "ref": 2}]
