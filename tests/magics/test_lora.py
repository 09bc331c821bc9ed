"""%mistral lora: lists, checks and pushes in a shell, and an interrupted push in a real kernel."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.error import UsageError

from mistral_nb.finetunes import AdapterStore
from mistral_nb.finetunes.adapter import CONFIG_FILE, WEIGHTS_FILE
from mistral_nb_magics.commands import find_command
from tests.finetunes.adapters import write_adapter
from tests.finetunes.finetunes_server import FinetunesServer
from tests.magics.kernels import Kernel, Output

FIRST = "11111111-0000-4000-8000-000000000001"


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FinetunesServer]:
    """The account of this process and of those that it starts, which have a store of the test's own."""
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    with FinetunesServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.parametrize(
    "line",
    [
        "lora adapters explained",
        "lora check the spelling of this",
        "lora push it to me",
        "lora remove the comma here",
        "lora adds parameters",
        "lora ram usage",
        "lora last question",
        "lora remote work",
        "lora delete tone",
        "lora helps everybody",
        "lora rank",
        "lora -- what is it?",
        "lora what is it? --name",
    ],
)
def test_a_prompt_about_adapters_is_a_prompt(account: FinetunesServer, line: str) -> None:
    assert find_command(line) is None


@pytest.mark.parametrize(
    ("line", "action"),
    [
        ("lora remov", "remove"),
        ("lora remov tone", "remove"),
        ("lora delete tone", "remove"),
        ("lora ls", "list"),
        ("lora lsit", "list"),
        ("lora chekc ./tone", "check"),
        ("lora chekc {folder} --local", "check"),
        ("lora pus {folder} --name mine", "push"),
        ("lora ad ~/tone", "add"),
    ],
)
def test_a_misspelt_action_is_no_prompt(account: FinetunesServer, tmp_path: Path, line: str, action: str) -> None:
    folder = write_adapter(tmp_path / "tone")
    AdapterStore().add(folder, "tone", "mine")
    with pytest.raises(UsageError, match=f"; did you mean {action}[?] After a lone -- everything is text"):
        find_command(line.format(folder=folder))


def test_lists_a_check_and_a_push(
    run: Any, account: FinetunesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "tone")
    assert run(f"%mistral lora check {folder}").success
    assert "Fit for Cloudflare" in capsys.readouterr().out
    assert run(f"%mistral lora push --name tone {folder}").success
    assert f"tone ({FIRST}) is on the account; use it with --lora tone" in capsys.readouterr().out
    assert run("%mistral lora list").success
    told = capsys.readouterr().out
    assert "No adapters on this machine" in told
    assert f"{FIRST}" in told
    assert run("%mistral lora public").success
    assert "cf-public-cnn-summarization" in capsys.readouterr().out
    untyped = write_adapter(tmp_path / "untyped", {"model_type": ...})
    assert run(f"%mistral lora check {untyped} --fix '{tmp_path}/fixed one'").success
    assert json.loads((tmp_path / "fixed one" / CONFIG_FILE).read_text())["model_type"] == "mistral"
    assert "Fit for Cloudflare" in capsys.readouterr().out
    bad = run(f"%mistral lora check {write_adapter(tmp_path / 'bad', {'use_dora': True})}").error_in_exec
    assert type(bad).__name__ == "AdapterError"
    assert len(bad._render_traceback_()) == 1


def test_one_is_added_and_removed(
    run: Any, account: FinetunesServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_adapter(tmp_path / "tone", {"model_type": ...})
    assert run(f"%mistral lora check {folder} --local").success
    assert "Fit to be added to this machine; none of the models here is one that it fits." in capsys.readouterr().out
    assert run(f"%mistral lora add {folder}").success
    assert run(f"%mistral lora add {folder} --name other --description 'like a pirate'").success
    assert "use it with --lora other, on the local engine" in capsys.readouterr().out
    (tone, other) = AdapterStore().list()
    assert (tone.name, other.name, other.description) == ("tone", "other", "like a pirate")
    assert run("%mistral lora remove tone").success
    assert capsys.readouterr().out == "Removed tone from this machine.\n"
    assert run(f"%mistral lora rm {other.id}").success
    assert AdapterStore().list() == []
    assert type(run("%mistral lora remove tone").error_in_exec).__name__ == "AdapterError"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("lora", "or push DIR"),
        ("lora help", "or push DIR"),
        ("lora -h", "or push DIR"),
        ("lora --local", "or push DIR"),
        ("lora rm", "which adapter"),
        ("lora check ./a --lora b", "unknown option --lora of %mistral lora"),
        ("lora check x --fix ~nobody-here/a", "~nobody-here/a: nobody here is called so"),
        ("lora add", "which folder"),
        ("lora remove", "which adapter"),
        ("lora remove x --local", "lora remove takes no --local; leave it out"),
        ("lora check", "which folder"),
        ("lora push x", "which name"),
        ("lora check ~nobody-here/a", "~nobody-here/a: nobody here is called so; give the folder by its path"),
        ("lora push ~nobody-here/a --name b", "nobody here is called so"),
        ("lora push --nam x", "unknown option --nam"),
        ("lora list everything", r"lora list takes no folder \(everything\)"),
        ("lora check x --name y", "lora check takes no --name; leave it out"),
    ],
)
def test_a_missing_word_is_bad_usage(run: Any, account: FinetunesServer, line: str, told: str) -> None:
    error = run(f"%mistral {line}").error_in_exec
    assert type(error) is UsageError
    assert re.search(told, str(error))


def test_an_interrupted_push_says_what_is_there(account: FinetunesServer, kernel: Kernel, tmp_path: Path) -> None:
    hold = threading.Event()
    passed = threading.Event()
    passed.set()
    account.faults[f"POST finetunes/{FIRST}/finetune-assets"] = [passed, hold]
    folder = write_adapter(tmp_path / "tone")
    sent: list[float] = []

    def watch(output: Output) -> None:
        if output.plain.startswith(f"Uploading {WEIGHTS_FILE}  100%") and not sent:
            sent.append(output.seconds)
            kernel.interrupt()

    result = kernel.run(f"%mistral lora push {folder} --name tone", watch)
    again = kernel.run(f"%mistral lora push {folder} --name tone")
    hold.set()
    assert again.reply["status"] == "ok", "the interrupted one waits for the service no more"
    assert result.reply["ename"] == "KeyboardInterrupt"
    (saved,) = result.saved
    assert saved.plain == (
        f"■ stopped here: On the account now: tone ({FIRST}) with {CONFIG_FILE} from this push; whether "
        f"{WEIGHTS_FILE} arrived is not known; to go on, push it again under that name"
    )
