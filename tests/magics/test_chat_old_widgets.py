"""A chat under ipywidgets 7.7, which Colab has: it is made, answers, and leaves its transcript."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.scripted import Peer, frame, head
from tests.magics.kernels import Kernel

OLD = ("ipywidgets==7.7.5", "ipython_genutils==0.2.0")
MAKE = """import ipywidgets, mistral_nb
print(ipywidgets.__version__)
chat = mistral_nb.Chat(temperature=0)
chat"""
ASK = """chat.choice = mistral_nb.chat.Choice(fields={"temperature": 0.5})
print(chat.ask("Hello?").text)
chat.close()"""


@pytest.fixture(scope="module")
def old_widgets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ipywidgets7")
    fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLD]
    result = subprocess.run(fetch, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"ipywidgets 7.7 could not be fetched, so nothing is known of a chat under it: {reason}")
    return folder


@pytest.fixture
def old_kernel(old_widgets: Path, cloud: Peer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(old_widgets), os.environ.get("PYTHONPATH", "")]))
    kernel = Kernel()
    yield kernel
    kernel.close()


def test_a_chat_works_with_ipywidgets_7(old_kernel: Kernel, cloud: Peer) -> None:
    cloud.scripts = [[head(), frame({"response": "An **old** hello."}), frame("[DONE]")]]
    made = old_kernel.run(MAKE)
    assert made.status == "ok", made.reply
    assert made.printed.strip() == "7.7.5"
    widget, transcript = made.displays
    assert "application/vnd.jupyter.widget-view+json" in widget.content["data"]
    assert "Transcript of a chat" in transcript.markdown
    asked = old_kernel.run(ASK)
    assert asked.status == "ok", asked.reply
    assert asked.printed.strip() == "An **old** hello."
    (update,) = (each for each in asked.displays if "An **old** hello." in each.markdown)
    assert update.content["transient"] == transcript.content["transient"]
    assert cloud.seen[-1].json["temperature"] == 0.5
