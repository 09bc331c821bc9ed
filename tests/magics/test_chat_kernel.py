"""A chat in a real kernel: what a cell shows, what a page gets while cells run, and what ends with what."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.backends.scripted import PATIENCE, TOKEN, Peer, environment_of, frame, head
from tests.chat.conftest import says
from tests.magics.kernels import Kernel, Output
from tests.magics.pages import KernelPage, open_chat

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def shared(own_settings: None) -> Iterator[tuple[Kernel, Peer]]:
    """One kernel for the tests that change nothing which another would see, and the peer that it asks."""
    with closing(Peer()) as peer, pytest.MonkeyPatch.context() as patch:
        for name, value in environment_of(peer.url).items():
            patch.setenv(name, value)
        patch.setenv("MISTRAL_NB_RETRY_DEADLINE", "0")
        with closing(Kernel()) as kernel:
            assert kernel.run("import mistral_nb\n%load_ext mistral_nb").status == "ok"
            yield kernel, peer


@pytest.fixture
def chat_kernel(shared: tuple[Kernel, Peer]) -> Kernel:
    return shared[0]


@pytest.fixture
def scripted(shared: tuple[Kernel, Peer]) -> Peer:
    """The peer; a script is played for each question from now on, the last one again and again."""
    peer = shared[1]
    peer.scripts = [["hold"]] * len(peer._connections)
    peer.gone.clear()
    return peer


@pytest.fixture
def page(chat_kernel: Kernel, scripted: Peer) -> KernelPage:
    page = open_chat(chat_kernel, "chat = mistral_nb.Chat()\nchat")
    assert page.ask(type="hello", writes=False)["type"] == "done"
    return page


def kinds(outputs: list[Output]) -> list[str]:
    return ["widget" if WIDGET in each.content["data"] else "transcript" for each in outputs]


def held(*texts: str) -> list[Any]:
    return [head(), *(frame({"response": text}) for text in texts), "hold"]


def running(page: KernelPage) -> dict[str, Any] | None:
    """The turn that is being written and has text."""
    return next((turn for turn in page.turns.values() if turn["running"] and turn["blocks"]), None)


@pytest.mark.parametrize(
    "code",
    [
        "mistral_nb.Chat()",
        "%mistral chat",
        "c = %mistral chat",
        "c = %mistral chat\nx = 1\nc",
        "%mistral chat --temperature 0\nx = 1",
        "c = mistral_nb.Chat(); display(c); c",
    ],
)
def test_a_cell_shows_the_chat_once_with_its_transcript_below(chat_kernel: Kernel, code: str) -> None:
    run = chat_kernel.run(code)
    assert run.status == "ok"
    assert kinds(run.displays) == ["widget", "transcript"]
    assert not [each for each in run.outputs if each.kind in ("execute_result", "error", "stream")]
    assert run.displays[1].markdown == "[Transcript of a chat](#mistral-nb-transcript)"
    assert run.displays[1].content["transient"]["display_id"]
    assert "<Chat " in run.displays[0].plain


def test_out_has_the_chat(chat_kernel: Kernel) -> None:
    assert chat_kernel.run("mistral_nb.Chat()").status == "ok"
    assert chat_kernel.run("print(type(_).__name__, type(Out[max(Out)]).__name__)").printed == "Chat Chat\n"


def test_a_chat_that_is_not_shown_costs_nothing(chat_kernel: Kernel, scripted: Peer) -> None:
    scripted.scripts += [says("Yes.")]
    run = chat_kernel.run(
        "import threading\nbefore = threading.active_count()\nc = mistral_nb.Chat()\n"
        "print(threading.active_count() - before)\nprint(c.ask('Is it?'))\nprint(c._stage)"
    )
    assert run.printed == "0\nYes.\nNone\n"
    assert [each.kind for each in run.outputs if each.kind != "stream"] == []


def test_an_answer_streams_to_the_page_and_its_transcript_is_saved(page: KernelPage, scripted: Peer) -> None:
    scripted.scripts += [says("Hello ", "*world*", ".")]
    assert page.ask(type="send", text="Greet.")["type"] == "done"
    page.read_until(lambda: len(page.updates()) == 1)
    (turn,) = page.turns.values()
    assert turn["blocks"][0]["body"] == "<p>Hello <em>world</em>.</p>"
    assert turn["finish"] == "stop"
    assert page.state["busy"] is False
    saved = page.updates()[0]["text/markdown"]
    assert "> Greet." in saved
    assert "Hello *world*." in saved


def test_the_first_text_is_there_before_any_more_comes(page: KernelPage, scripted: Peer) -> None:
    more = threading.Event()
    start, first, *rest = says("Hello ", "world.")
    scripted.scripts += [[start, first, more, *rest]]
    page.send(type="send", text="Greet.")
    page.read_until(lambda: running(page) is not None)
    more.set()
    page.read_until(lambda: len(page.updates()) == 1)


def test_stop_ends_an_answer_and_keeps_its_text(page: KernelPage, scripted: Peer) -> None:
    """The service, which says no more, does not."""
    scripted.scripts += [held("Once ", "upon ")]
    page.send(type="send", text="Tell.")
    page.read_until(lambda: running(page) is not None)
    assert page.ask(type="stop")["type"] == "done"
    page.read_until(lambda: running(page) is None)
    (turn,) = page.turns.values()
    assert turn["finish"] == "cancelled"
    assert page.text(turn["id"]).startswith("<p>Once")
    assert scripted.gone.wait(PATIENCE)


def test_a_second_page_in_the_middle_of_an_answer_shows_the_same(
    chat_kernel: Kernel, page: KernelPage, scripted: Peer
) -> None:
    more = threading.Event()
    start, first, *rest = says("One, ", "two, ", "three.")
    scripted.scripts += [[start, first, more, *rest]]
    page.send(type="send", text="Count.")
    page.read_until(lambda: running(page) is not None)
    other = KernelPage(chat_kernel, page.comm)
    other.send(type="hello", writes=True)

    def both() -> bool:
        for message in page.wire[len(other.wire) :]:
            other.read(message)
        return bool(other.turns)

    other.wire = list(page.wire)
    page.read_until(both)
    more.set()
    page.read_until(lambda: both() and len(page.updates()) == 1)
    assert other.shows == page.shows
    (turn,) = page.turns.values()
    assert page.text(turn["id"]) == "<p>One, two, three.</p>"


def test_ask_in_a_cell_streams_to_the_page_and_prints_the_answer(
    chat_kernel: Kernel, page: KernelPage, scripted: Peer
) -> None:
    scripted.scripts += [says("Four.")]
    run = chat_kernel.run("print(chat.ask('Two and two?'))")
    assert run.printed == "Four.\n"
    assert page.ask(type="hello", writes=False)["type"] == "done"
    (turn,) = page.turns.values()
    assert page.text(turn["id"]) == "<p>Four.</p>"


def test_a_question_while_an_answer_runs_is_refused(page: KernelPage, scripted: Peer) -> None:
    scripted.scripts += [held("Once ")]
    page.send(type="send", text="Tell.")
    page.read_until(lambda: running(page) is not None)
    refused = page.ask(type="send", text="And?")
    assert refused["type"] == "refused"
    assert "stop it first" in refused["error"]
    assert page.ask(type="stop")["type"] == "done"


def test_a_value_in_a_question_and_an_attached_one(chat_kernel: Kernel, page: KernelPage, scripted: Peer) -> None:
    scripted.scripts += [says("Yes.")]
    assert chat_kernel.run("price = 7; names = ['ada', 'bob']").status == "ok"
    attach = [{"kind": "variable", "name": "names"}, {"kind": "cell", "name": "In[1]"}]
    assert page.ask(type="send", text="Is {{price}} much, in \\{{x}}?", attach=attach)["type"] == "done"
    page.read_until(lambda: len(page.updates()) == 1)
    asked = scripted.seen[-1].json["messages"][-1]["content"]
    assert asked.startswith("Is 7 much, in {{x}}?\n\nThe variable names:\n```\n['ada', 'bob']\n```\n\nThe cell In[1]:")
    (turn,) = page.turns.values()
    assert turn["prompt"] == "Is {{price}} much, in \\{{x}}?"
    assert turn["attachments"] == [{"kind": "variable", "name": "names"}, {"kind": "cell", "name": "In[1]"}]


def test_the_panel_is_made_when_it_is_opened_and_changes_the_next_question(
    page: KernelPage, chat_kernel: Kernel, scripted: Peer
) -> None:
    scripted.scripts += [says("Yes.")]
    assert page.ask(type="panel", open=True)["type"] == "done"
    assert page.state["panel"] is True
    fields = {
        message["content"]["data"]["state"].get("description"): message["content"]["comm_id"]
        for message in page.wire
        if message["msg_type"] == "comm_open"
    }
    client = chat_kernel.client
    update = {"method": "update", "state": {"value": "0.25"}, "buffer_paths": []}
    client.shell_channel.send(client.session.msg("comm_msg", {"comm_id": fields["temperature"], "data": update}))
    assert page.ask(type="send", text="Is it?")["type"] == "done"
    page.read_until(lambda: len(page.updates()) == 1)
    assert scripted.seen[-1].json["temperature"] == 0.25
    (turn,) = page.turns.values()
    assert turn["settings"] == "temperature 0.25"


def test_a_page_that_was_loaded_again_is_sent_the_transcript(page: KernelPage, scripted: Peer) -> None:
    scripted.scripts += [says("Yes.")]
    assert page.ask(type="send", text="Is it?")["type"] == "done"
    page.read_until(lambda: len(page.updates()) == 1)
    assert page.of("transcript") == []
    assert page.ask(type="hello", writes=True)["type"] == "done"
    assert page.of("transcript")[-1]["data"] == page.updates()[-1]


def test_a_captured_chat_is_shown_later_and_then_written_again(chat_kernel: Kernel, scripted: Peer) -> None:
    scripted.scripts += [says("Yes.")]
    assert not chat_kernel.run("%%capture kept\nc = mistral_nb.Chat()\ndisplay(c)").displays
    run = chat_kernel.run("kept.show()")
    assert kinds(run.displays) == ["widget", "transcript"]
    run = chat_kernel.run("c.ask('Is it?'); c")
    assert kinds(run.displays[:2]) == ["widget", "transcript"]


def test_closing_ends_the_answer_and_the_widgets(chat_kernel: Kernel, page: KernelPage, scripted: Peer) -> None:
    scripted.scripts += [held("Once ")]
    assert page.ask(type="panel", open=True)["type"] == "done"
    page.send(type="send", text="Tell.")
    page.read_until(lambda: running(page) is not None)
    run = chat_kernel.run(
        "import threading\nchat.close()\nchat.close()\nprint(chat.conversation.path[0].finish_reason)"
    )
    assert run.printed == "cancelled\n"
    opened = {each["content"]["comm_id"] for each in page.wire if each["msg_type"] == "comm_open"}
    closed = {each.content["comm_id"] for each in run.outputs if each.kind == "comm_close"}
    assert opened | {page.comm} <= closed
    again = chat_kernel.run("chat")
    assert kinds(again.displays) == ["widget", "transcript"]
    assert "Once" in again.displays[1].markdown


def test_a_chat_outlives_the_extension(page: KernelPage, chat_kernel: Kernel, scripted: Peer) -> None:
    scripted.scripts += [says("Yes.")]
    assert chat_kernel.run("%unload_ext mistral_nb").status == "ok"
    assert page.ask(type="send", text="Is it?")["type"] == "done"
    page.read_until(lambda: len(page.updates()) == 1)
    assert chat_kernel.run("%load_ext mistral_nb").status == "ok"


def test_no_secret_leaves_the_kernel(page: KernelPage, chat_kernel: Kernel, scripted: Peer) -> None:
    """Neither in what the page is sent, the widgets' state and the transcript, nor in the files and the repr."""
    scripted.scripts += [says("Yes.")]
    for message in (
        {"type": "panel", "open": True},
        {"type": "send", "text": "Is it?"},
        {"type": "names", "prefix": ""},
    ):
        page.ask(**message)
    page.read_until(lambda: len(page.updates()) == 1)
    for form in ("json", "md", "cells"):
        assert page.ask(type="export", format=form)["type"] == "done"
    state = chat_kernel.run("import ipywidgets, json\nprint(json.dumps(ipywidgets.Widget.get_manager_state()), chat)")
    assert "_esm" in state.printed
    assert TOKEN not in state.printed
    assert TOKEN not in json.dumps(page.wire, default=str)


def test_a_page_is_answered_while_a_cell_runs(page: KernelPage, chat_kernel: Kernel, scripted: Peer) -> None:
    """In a subshell, as JupyterLab asks where the kernel has them."""
    client, session = chat_kernel.client, chat_kernel.client.session
    info = client.kernel_info(reply=True, timeout=PATIENCE)["content"]
    if "kernel subshells" not in info.get("supported_features", []):
        pytest.skip("this ipykernel has no subshells")
    client.control_channel.send(session.msg("create_subshell_request"))
    subshell = client.get_control_msg(timeout=PATIENCE)["content"]["subshell_id"]
    scripted.scripts += [says("Yes, ", "meanwhile.")]
    code = "import threading\nprint('waiting', flush=True)\nthreading.Event().wait(600)"
    request = client.execute(code, stop_on_error=False)
    page.read_until(lambda: any(each["msg_type"] == "stream" for each in page.wire))
    message = session.msg(
        "comm_msg",
        {"comm_id": page.comm, "data": {"method": "custom", "content": {"type": "send", "text": "Now?", "ref": 99}}},
    )
    message["header"]["subshell_id"] = subshell
    client.shell_channel.send(message)
    page.read_until(lambda: any(not turn["running"] for turn in page.turns.values()))
    (turn,) = page.turns.values()
    assert page.text(turn["id"]) == "<p>Yes, meanwhile.</p>"
    chat_kernel.interrupt()
    reply = client.get_shell_msg(timeout=PATIENCE)
    while reply["parent_header"]["msg_id"] != request:
        reply = client.get_shell_msg(timeout=PATIENCE)
    assert reply["content"]["ename"] == "KeyboardInterrupt"


def test_a_page_is_answered_that_names_a_subshell_of_another_kernel(
    page: KernelPage, chat_kernel: Kernel, scripted: Peer
) -> None:
    """As that of a kernel which somebody else restarted."""
    session = chat_kernel.client.session
    data = {"method": "custom", "content": {"type": "hello", "ref": 99}}
    message = session.msg("comm_msg", {"comm_id": page.comm, "data": data})
    message["header"]["subshell_id"] = "gone"
    chat_kernel.client.shell_channel.send(message)
    page.read_until(lambda: any(each.get("ref") == 99 for each in page.of("done")))


def test_a_chat_is_closed_whose_cell_shows_another(chat_kernel: Kernel, scripted: Peer) -> None:
    scripted.scripts += [held("Once ")]
    code = "old = globals().get('chat')\nchat = mistral_nb.Chat()\nchat"
    page = open_chat(chat_kernel, code, "c1")
    assert page.ask(type="hello", writes=False)["type"] == "done"
    page.send(type="send", text="Tell.")
    page.read_until(lambda: running(page) is not None)
    open_chat(chat_kernel, code, "c1")
    assert scripted.gone.wait(PATIENCE)
    told = chat_kernel.run("print(old._stage, old.conversation.path[0].finish_reason, chat._stage is not None)")
    assert told.printed == "None cancelled True\n"


@pytest.mark.parametrize(
    "elsewhere",
    ["chat", "first = chat.widget", "%%capture kept\ndisplay(chat)"],
    ids=["another cell", "a layout", "captured"],
)
def test_a_chat_that_is_shown_elsewhere_too_stays(chat_kernel: Kernel, scripted: Peer, elsewhere: str) -> None:
    open_chat(chat_kernel, "chat = mistral_nb.Chat()\nchat", "d1")
    assert chat_kernel.run(elsewhere).status == "ok"
    open_chat(chat_kernel, "old = chat\nchat = mistral_nb.Chat()\nchat", "d1")
    assert chat_kernel.run("print(old._stage is not None)").printed == "True\n"


def test_chats_that_a_cell_shows_again_stay_whatever_their_order(chat_kernel: Kernel, scripted: Peer) -> None:
    open_chat(chat_kernel, "one = mistral_nb.Chat()\none", "e1")
    open_chat(chat_kernel, "display(one)\ntwo = mistral_nb.Chat()\ntwo", "e1")
    stages = "print(one._stage is not None, two._stage is not None, three._stage is not None)"
    open_chat(chat_kernel, "three = mistral_nb.Chat()\ndisplay(three)\ntwo", "e1")
    assert chat_kernel.run(stages).printed == "False True True\n"


def test_the_embedded_model_answers_side_by_side(chat_kernel: Kernel, embedded: Path) -> None:
    page = open_chat(
        chat_kernel,
        "chat = mistral_nb.Chat(backend='local', temperature=0, max_tokens=12, compare={'temperature': 1, 'seed': 3})\n"
        "chat",
    )
    assert page.ask(type="hello", writes=False)["type"] == "done"
    assert page.state["compare"] is True
    assert page.ask(type="send", text="Name a colour.", compare=True)["type"] == "done"
    page.read_until(lambda: len(page.updates()) == 1)
    first, second = page.turns.values()
    assert first["group"] == second["group"] == [first["id"], second["id"]]
    assert (first["settings"], second["settings"]) == (
        "temperature 0, max_tokens 12, seed 3",
        "temperature 1, max_tokens 12, seed 3",
    )
    for turn in (first, second):
        assert turn["finish"] in ("stop", "length")
        assert "tokens" in turn["footer"]
        assert page.text(turn["id"])


def test_the_magic_takes_the_settings_of_the_session_and_of_its_line(
    chat_kernel: Kernel, scripted: Peer, tmp_path: Path
) -> None:
    run = chat_kernel.run(
        "%config Mistral.max_tokens = 77\n%config Mistral.temperature = 0.9\n"
        "c = %mistral chat --preset precise --seed 4\nprint(c.choice.fields, c.choice.system[:6])"
    )
    assert run.printed == "{'temperature': 0.0, 'seed': 4, 'max_tokens': 77} Answer\n"
    chat_kernel.run("%config Mistral.max_tokens = 256\n%config Mistral.temperature = 0.6")
    scripted.scripts += [says("Yes.")]
    path = tmp_path / "chat.json"
    loaded = chat_kernel.run(f"c.ask('Is it?')\nc.save({str(path)!r})\nc = %mistral chat --load {path}")
    assert "> Is it?" in loaded.displays[-1].markdown
    for line, error in (
        ("--preset none", "there is no preset 'none'"),
        ("--temperature 99", "--temperature"),
        (f"--load {path}.md", "chat.json.md"),
    ):
        failed = chat_kernel.run(f"%mistral chat {line}")
        assert error in json.dumps([each.content for each in failed.outputs]), failed.outputs
        assert failed.displays == []


def test_the_transcript_is_written_before_the_cell_ends(page: KernelPage, chat_kernel: Kernel, scripted: Peer) -> None:
    """As a program that runs notebooks needs it, which hears nothing after that."""
    scripted.scripts += [says("Yes."), held("No"), says("Well.")]
    run = chat_kernel.run("answer = chat.ask('Is it?')")
    assert [each.kind for each in run.outputs if "Yes." in each.markdown] == ["update_display_data"]
    assert page.ask(type="send", text="Is it not?")["type"] == "done"
    page.read_until(lambda: running(page) is not None)
    run = chat_kernel.run("chat.stop()\nchat.wait()\nanswer = chat.ask('Then?')")
    assert "Well." in [each for each in run.outputs if each.kind == "update_display_data"][-1].markdown
