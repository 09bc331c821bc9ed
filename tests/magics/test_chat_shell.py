"""A chat where there is no notebook, its settings, and its panel."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import mistral_nb
from mistral_nb.chat import Choice
from mistral_nb.errors import InvalidRequest
from mistral_nb_magics.chat.panel import Panel
from mistral_nb_magics.chat.transcript import MARK, MAX_PLAIN, bundle
from tests.backends.scripted import Peer, eventually
from tests.chat.conftest import says

ROOT = Path(__file__).resolve().parents[2]


def test_in_a_terminal_a_chat_prints_itself_and_asks_in_code(run: Any, cloud: Peer, capsys: Any) -> None:
    cloud.scripts = [says("Fo", "ur.")]
    before = set(threading.enumerate())
    done = run("import mistral_nb\nchat = mistral_nb.Chat()\nanswer = chat.ask('Two and two?')\nchat")
    assert done.success
    assert done.result.conversation.path[0].answer == "Four."
    printed = capsys.readouterr().out
    assert "You: Two and two?\n\nFour.\n" in printed
    assert "chat.ask(...) asks" in printed
    assert done.result._stage is None
    stays = set(threading.enumerate()) - before
    assert eventually(lambda: sum(thread.is_alive() for thread in stays) <= 1)


def test_in_a_terminal_the_magic_says_how_to_ask(run: Any) -> None:
    error = run("%mistral chat").error_in_exec
    assert "chat = mistral_nb.Chat(); chat.ask('...')" in str(error)


def test_a_chat_goes_on_with_a_saved_conversation(cloud: Peer, tmp_path: Path) -> None:
    cloud.scripts = [says("Yes.")]
    chat = mistral_nb.Chat(temperature=0, seed=4)
    chat.ask("Is it?")
    path = chat.save(tmp_path / "chat.json")
    again = mistral_nb.Chat.load(path, system="Be brief.")
    again.ask("Sure?")
    assert [turn.prompt for turn in again.conversation] == ["Is it?", "Sure?"]
    assert [message["role"] for message in cloud.seen[-1].json["messages"]] == ["system", "user", "assistant", "user"]
    again.clear()
    assert again.undo() == "clear"
    assert len(again.conversation) == 2


def test_a_chat_says_what_is_wrong_with_its_options() -> None:
    with pytest.raises(mistral_nb.ChatError, match="there is no preset 'none'; there are plain"):
        mistral_nb.Chat(preset="none")
    with pytest.raises(InvalidRequest, match="temperature"):
        mistral_nb.Chat(temperature=99)
    chat = mistral_nb.Chat(preset="precise", temperature=0.5)
    assert chat.choice.fields["temperature"] == 0.5
    assert chat.choice.system
    chat.choice = Choice(backend="local")
    assert "local" in repr(chat)


def test_without_an_account_the_repr_says_who_answers_and_asks_nobody(cloud: Peer) -> None:
    assert "cloudflare" in repr(mistral_nb.Chat())
    assert "nobody: " in repr(mistral_nb.Chat(backend="nowhere"))
    assert cloud.connections == 0


def test_a_transcript_holds_nothing_that_acts_and_stays_short_as_plain_text() -> None:
    chat = mistral_nb.Chat()
    hostile = "<script>alert(1)</script> [x](javascript:alert(1)) ![y](http://example.org/y.png)\n\n```\nopen"
    add_turn(chat, "<img src=x onerror=alert(1)> `", hostile)
    add_turn(chat, "After?", "word " * 2000)
    made = bundle(chat.conversation)
    assert made["text/markdown"].startswith(f"[Transcript of a chat](#{MARK})")
    assert "<script>" not in made["text/markdown"]
    assert "<img" not in made["text/markdown"]
    assert "](javascript:" not in made["text/markdown"]
    assert "![" not in made["text/markdown"]
    after = made["text/markdown"].split("**You**")[2]
    assert after.startswith("\n\n> After?")
    assert len(made["text/plain"]) < MAX_PLAIN + 100


def add_turn(chat: mistral_nb.Chat, prompt: str, answer: str) -> None:
    parent = chat.conversation.head
    turn = mistral_nb.chat.Turn(f"t{len(chat.conversation)}", parent, prompt, answer=answer, finish_reason="stop")
    chat.conversation.add(turn)


@pytest.fixture
def told() -> list[tuple[Choice, Choice | None]]:
    return []


@pytest.fixture
def panel(told: list[tuple[Choice, Choice | None]]) -> Panel:
    return Panel(
        Choice("local", None, "Be brief.", {"seed": 1}), None, lambda *choices: told.append(choices), threading.RLock()
    )


def test_the_panel_has_a_field_for_each_setting_of_a_chat(panel: Panel) -> None:
    fields = {**panel._who, **panel._numbers}
    assert set(fields) == {"backend", "model", *(field.name for field in mistral_nb.chat.CHAT_FIELDS)}
    assert fields["seed"].value == "1"
    assert "0 to 5" in fields["temperature"].placeholder


def test_the_panel_tells_what_is_valid_and_says_what_is_not(panel: Panel, told: list[Any]) -> None:
    panel._numbers["temperature"].value = "0.5"
    assert told == [(Choice("local", None, "Be brief.", {"seed": 1, "temperature": 0.5}), None)]
    for wrong in ("hot", "99", "nan", "<b>"):
        panel._numbers["temperature"].value = wrong
        assert "temperature" in panel._said.value
        assert "<b>" not in panel._said.value
    assert len(told) == 1
    panel._numbers["temperature"].value = ""
    assert panel._said.value == ""
    assert told[-1] == (Choice("local", None, "Be brief.", {"seed": 1}), None)


def test_stop_texts_are_read_and_shown_alike(panel: Panel, told: list[Any]) -> None:
    panel._numbers["stop"].value = "END|\\n\\n"
    assert told[-1][0].fields["stop"] == ("END", "\n\n")
    panel.show(told[-1][0], None)
    assert panel._numbers["stop"].value == "END|\\n\\n"


def test_who_is_compared_is_chosen_in_the_panel(panel: Panel, told: list[Any]) -> None:
    panel._other["backend"].value = "cloudflare"
    assert told[-1][1] is None
    panel._comparing.value = True
    assert told[-1][1] == Choice("cloudflare", None, "Be brief.", {"seed": 1})
    panel._numbers["seed"].value = "2"
    assert told[-1][1] == Choice("cloudflare", None, "Be brief.", {"seed": 2})


def test_what_the_panel_is_shown_is_told_to_nobody(panel: Panel, told: list[Any]) -> None:
    panel.show(Choice("cloudflare", "m", None, {"top_p": 0.5, "lora": "mine"}), Choice("local"))
    assert told == []
    assert panel._who["lora"].value == "mine"
    assert panel._comparing.value is True
    panel._numbers["top_p"].value = "0.25"
    assert told[-1][0] == Choice("cloudflare", "m", None, {"top_p": 0.25, "lora": "mine"})


def test_an_adapter_has_a_scale(panel: Panel, told: list[Any]) -> None:
    slider = panel._who["lora_scale"]
    assert (slider.value, slider.disabled) == (1, True), "there is nothing to weigh"
    panel._who["lora"].value = "mine"
    assert not slider.disabled
    assert "lora_scale" not in told[-1][0].fields, "a backend that knows no scale takes one as it is"
    slider.value = 0.15000000000000002
    assert told[-1][0].fields == {"seed": 1, "lora": "mine", "lora_scale": 0.15}
    slider.value = 0
    assert told[-1][0].fields["lora_scale"] == 0
    panel._who["lora"].value = ""
    assert told[-1][0].fields == {"seed": 1}
    assert slider.disabled


def test_the_scale_of_whom_to_compare_with_is_its_own(panel: Panel, told: list[Any]) -> None:
    panel._comparing.value = True
    panel._who["lora"].value = panel._other["lora"].value = "mine"
    panel._other["lora_scale"].value = 0.5
    choice, compare = told[-1]
    assert (choice.fields, compare.fields) == (
        {"seed": 1, "lora": "mine"},
        {"seed": 1, "lora": "mine", "lora_scale": 0.5},
    )


def test_a_scale_beyond_the_slider_is_shown(panel: Panel, told: list[Any]) -> None:
    panel.show(Choice(fields={"lora": "mine", "lora_scale": 7.5}), None)
    slider = panel._who["lora_scale"]
    assert (slider.value, slider.max, slider.disabled, told) == (7.5, 7.5, False, [])
    panel.show(Choice(fields={"lora": "mine"}), None)
    assert (slider.value, slider.max) == (1, 2)


EXIT = """
import mistral_nb
chat = mistral_nb.Chat(backend="cloudflare")
chat._on_stage()._view._receive({"type": "hello", "ref": 1})
chat.send("Tell a story.")
import sys
while not chat.conversation.path[0].answer:
    pass
print("leaving")
"""


def test_an_interpreter_ends_in_the_middle_of_an_answer(cloud: Peer) -> None:
    cloud.scripts = [[says("")[0], "drip"]]
    path = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "magics")]
    program = f"import sys\nsys.path[:0] = {path!r}\n{EXIT}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")
    assert cloud.gone.wait(180)
