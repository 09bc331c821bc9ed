"""Conversations in files: JSON loses nothing; what is broken, hostile or newer is refused and changes nothing."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.chat import Attachment, ChatError, ChatSession, Choice, Conversation, TextAdded, Turn
from tests.backends.scripted import PATIENCE, Peer, head
from tests.chat.conftest import Heard


@pytest.fixture
def full() -> Conversation:
    """Every kind of turn."""
    choice = Choice("local", "embedded", "Sei kurz.", {"seed": 1, "stop": ["x", "\n"], "temperature": 0.5, "lora": "a"})
    pinned = Attachment("error", "ValueError", "`\u202e\x1b[31m```")
    conversation = Conversation()
    conversation.add(Turn("a", None, "Grüezi 🦊\r\n", choice, "sent", (pinned,), "x" * 5000, "stop", None, "foot · er"))
    conversation.add(
        Turn("b", "a", "Q", error="it broke", finish_reason="truncated", answer="\u2028\x00half", left_out=3)
    )
    conversation.add(*(Turn(name, "a", "R", group="g", finish_reason="length") for name in ("c", "d")))
    conversation.change(
        "b", served={"usage": {"prompt_tokens": 3}, "ttft_s": 0.25, "seed": None}, asked_at="2026-01-02"
    )
    conversation.select("d")
    return conversation


def test_json_loses_nothing(full: Conversation, tmp_path: Path) -> None:
    again = Conversation.from_json(full.to_json())
    assert (again.turns, again.head) == (full.turns, "d")
    path = full.save(tmp_path / "chat.json")
    loaded = Conversation.load(str(path))
    assert (loaded.turns, loaded.head, loaded.undoable) == (full.turns, "d", "")
    assert loaded.to_json() == full.to_json()
    assert Conversation.from_json(Conversation().to_json()).turns == ()


def test_what_was_answered_comes_back_and_goes_on(
    session: ChatSession, peer: Peer, heard: Heard, tmp_path: Path
) -> None:
    peer.scripts = [[head(), "drip"]]
    (turn,) = session.send("Go on")
    heard.until(TextAdded, 2)
    path = session.conversation.save(tmp_path / "running.json")
    session.stop()
    loaded = Conversation.load(path)
    assert (loaded.turn(turn.id).finish_reason, loaded.turn(turn.id).answer[:5]) == ("cancelled", "drip ")
    done = session.conversation.save(tmp_path / "stopped.json")
    session.conversation.replace_with(Conversation.load(done))
    assert session.wait(PATIENCE)
    assert heard.whys == ["load"]
    assert session.conversation.undo() == "load"


def valid() -> dict[str, Any]:
    conversation = Conversation()
    conversation.add(Turn("a", None, "Q", attachments=(Attachment("cell", "In [1]", "1"),), finish_reason="stop"))
    conversation.add(Turn("b", "a", "R", finish_reason="stop"))
    data: dict[str, Any] = json.loads(conversation.to_json())
    return data


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


BROKEN: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (put("format", value="other"), "no conversation"),
    (put("version", value=2), "version 2; this mistral-nb reads 1: upgrade it"),
    (put("version", value=True), "the version True, which there is not"),
    (put("version", value="1"), "the version '1', which there is not"),
    (drop("version"), "the version None"),
    (drop("head"), "the conversation lacks 'head'"),
    (put("more", value=1), "holds 'more', which is not known"),
    (put("head", value="zz"), "the head 'zz' is none of its turns"),
    (put("head", value=["a"]), "the head of type list"),
    (put("turns", value={}), "turns is no list"),
    (put("turns", 0, value=7), "turn 1 is no object"),
    (put("turns", 0, "parent", value="b"), "turn 1: its parent b is not before it"),
    (put("turns", 1, "parent", value="b"), "turn 2: its parent b is not before it"),
    (put("turns", 1, "id", value="a"), "there is a turn a before it already"),
    (put("turns", 1, "id", value="<img>"), "turn 2, id = '<img>' is no id"),
    (put("turns", 1, "id", value=""), "is no id"),
    (put("turns", 1, "id", value=10**4000), "is no id"),
    (put("turns", 1, "group", value={}), "turn 2, group = of type dict is no id"),
    (put("turns", 1, "prompt", value=None), "turn 2, prompt = None is no text"),
    (put("turns", 1, "prompt", value="x" * 200_000), "holds more than 131072 characters"),
    (put("turns", 1, "sent", value=3), "turn 2, sent = 3 is no text"),
    (put("turns", 1, "answer", value=["x"]), "turn 2, answer = of type list is no text"),
    (put("turns", 1, "answer", value="\ud800"), "half of a surrogate pair"),
    (put("turns", 1, "served", value={"x": "\udfff"}), "half of a surrogate pair"),
    (put("turns", 1, "served", value=[]), "served is no object"),
    (put("turns", 1, "finish_reason", value="great"), "finish_reason 'great' is not one of stop"),
    (put("turns", 1, "finish_reason", value=[]), "finish_reason of type list"),
    (put("turns", 1, "left_out", value=-1), "left_out -1 is no number"),
    (put("turns", 1, "left_out", value=True), "left_out True is no number"),
    (put("turns", 1, "asked_at", value=5), "asked_at = 5 is no text"),
    (drop("turns", 1, "footer"), "turn 2 lacks 'footer'"),
    (put("turns", 1, "html", value="<b>"), "turn 2 holds 'html', which is not known"),
    (put("turns", 1, "attachments", value="x"), "turn 2, attachments is no list"),
    (put("turns", 0, "attachments", 0, "kind", value="file"), "variable, cell, error, and not 'file'"),
    (put("turns", 0, "attachments", 0, "kind", value=[]), "and not of type list"),
    (put("turns", 0, "attachments", 0, "text", value=1), "attachment, text = 1 is no text"),
    (put("turns", 1, "choice", value=None), "turn 2, choice is no object"),
    (put("turns", 1, "choice", "fields", value=[]), "fields of its choice are no object"),
    (put("turns", 1, "choice", "fields", value={"temperature": 99}), "turn 2, choice: temperature = 99"),
    (put("turns", 1, "choice", "fields", value={"rm": 1}), "is not a field"),
    (put("turns", 1, "choice", "backend", value=7), "backend = 7: must be a text"),
]


@pytest.mark.parametrize(("change", "told"), BROKEN, ids=[told for _, told in BROKEN])
def test_a_bad_file_is_refused_and_says_why(change: Callable[[Any], None], told: str, tmp_path: Path) -> None:
    data = copy.deepcopy(valid())
    change(data)
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ChatError) as caught:
        Conversation.load(path)
    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "null", "[]", "\x00", '"x"', "NaN", '{"format": "mistral-nb chat", "version": NaN}', "1" * 5000),
        *("[" * 100_000, '{"a":' * 100_000),
        json.dumps(valid()).replace('"served": null', '"served": {"x": 1e999}', 1),
        json.dumps(valid()).replace('"served": null', '"served": {"x": ' + "[" * 5000 + "]" * 5000 + "}", 1),
    ],
    ids=range(13),
)
def test_what_is_no_conversation_is_refused(text: str) -> None:
    with pytest.raises(ChatError, match=r"save\(\) wrote"):
        Conversation.from_json(text)


def test_groups_hold_turns_of_one_parent() -> None:
    data = valid()
    for turn in data["turns"]:
        turn["group"] = "g"
    with pytest.raises(ChatError, match="another parent than the rest of its group"):
        Conversation.from_json(json.dumps(data))


def test_a_file_that_is_no_text_or_too_big_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chat.json"
    with pytest.raises(ChatError, match="No such file"):
        Conversation.load(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ChatError, match="no text in UTF-8"):
        Conversation.load(path)
    with path.open("wb") as file:
        file.truncate(300 << 20)
    monkeypatch.setattr("mistral_nb.chat.files.MAX_BYTES", 1 << 20)
    with pytest.raises(ChatError, match="has more than 1 MiB"):
        Conversation.load(path)
    for name in ("chat.md", "chat.ipynb"):
        with pytest.raises(ChatError, match=r"load what was saved as \.json"):
            Conversation.load(tmp_path / name)


def test_a_file_is_written_whole_or_not_at_all(
    full: Conversation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chat.json"
    full.save(path)
    path.chmod(0o664)
    before = path.read_bytes()

    def broken(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(ChatError, match=r"chat\.json cannot be written: No space left"):
            Conversation().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["chat.json"]
    link = tmp_path / "link.json"
    link.symlink_to(path)
    Conversation().save(link)
    assert link.is_symlink()
    assert Conversation.load(path).turns == ()
    assert path.stat().st_mode & 0o777 == 0o664
    for bad in (tmp_path / "none" / "chat.json", tmp_path):
        with pytest.raises(ChatError, match=r"cannot be written|what is it to be"):
            full.save(bad)
    with pytest.raises(ChatError, match=r"Name it \*\.json, \*\.md, \*\.ipynb"):
        full.save(tmp_path / "chat.txt")


def test_saving_while_it_changes_gives_a_whole_conversation(tmp_path: Path) -> None:
    conversation = Conversation()
    over = threading.Event()

    def change() -> None:
        number = 0
        while not over.is_set():
            conversation.add(Turn(f"t{number}", conversation.head, "Q", finish_reason="stop"))
            if number % 7 == 6 and f"t{number - 3}" in conversation:
                conversation.delete(f"t{number - 3}")
            if number % 50 == 49:
                conversation.clear()
            number += 1

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(60):
            assert Conversation.from_json(conversation.to_json()) is not None
            conversation.to_markdown()
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(switch)
