"""mistral-nb lora: what each command prints and changes, and an upload that is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_nb.cli import main
from mistral_nb.finetunes.adapter import CONFIG_FILE, DEFAULT_MODEL, WEIGHTS_FILE
from mistral_nb.finetunes.store import AdapterStore
from tests.finetunes.adapters import matrices, write_adapter
from tests.finetunes.finetunes_server import PATIENCE, PUBLIC, FinetunesServer, error
from tests.models.tiny_repos import DIM, HIDDEN, KV, sharded

FIRST = "11111111-0000-4000-8000-000000000001"
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command: its exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["lora", *map(str, arguments)])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.fixture
def account(server: FinetunesServer, monkeypatch: pytest.MonkeyPatch) -> FinetunesServer:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


def test_check(say: Say, folder: Path) -> None:
    status, told, _ = say("check", folder)
    assert status == 0
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in told.splitlines()[:-1])
    assert facts == {
        "adapter": "tone",
        "base model": "mistralai/Mistral-7B-Instruct-v0.2",
        "model type": "mistral",
        "rank": "8, alpha 16",
        "modules": "q_proj, v_proj",
        "weights": "212,992 in BF16, 427 kB",
    }
    assert told.endswith("\nFit for Cloudflare, by its published limits.\n")


def test_check_for_here_tells_which_models_it_fits(say: Say, home: Path, tmp_path: Path) -> None:
    for name in ("own-model", "no-model"):
        (home / "models" / name).mkdir(parents=True)
    for file, content in sharded(1).items():
        (home / "models" / "own-model" / file).write_bytes(content)
    features = {"dim": DIM, "q": DIM, "kv": KV, "hidden": HIDDEN}
    mine = write_adapter(tmp_path / "mine", {"model_type": ...}, matrices(features=features))
    status, told, _ = say("check", mine, "--local")
    assert (status, told.splitlines()[-1]) == (0, "Fit to be added to this machine; it fits own-model.")
    other = write_adapter(tmp_path / "other")
    assert say("check", other, "--local")[1].endswith("; none of the models here is one that it fits.\n")
    status, told, problem = say("check", mine)
    assert (status, told) == (1, "")
    assert "do not fit Mistral-7B" in problem
    assert problem.endswith(
        "\nFor an engine on this machine it is sound: check it with --local, which tells what models it fits\n"
    )


@pytest.mark.parametrize(
    ("rank", "setting", "told"),
    [
        (16, None, "."),
        (17, None, ". Of rank 17: on a GPU, start the engine with --lora-rank 17, or set lora_rank to 17."),
        (65, None, ". Of rank 65: start the engine with --lora-rank 65, or set lora_rank to 65."),
        (64, "64", "."),
        (64, "32", ". Of rank 64: start the engine with --lora-rank 64, or set lora_rank to 64."),
    ],
)
def test_a_rank_over_the_engines_is_told(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, setting: str | None, told: str
) -> None:
    if setting:
        monkeypatch.setenv("MISTRAL_NB_LORA_RANK", setting)
    wide = write_adapter(tmp_path / "wide", {"r": rank}, matrices(rank=rank))
    for words in (("check", wide, "--local"), ("add", wide)):
        assert say(*words)[1].endswith(f"one of the models here is one that it fits{told}\n")


@pytest.mark.parametrize(("rank", "status"), [(256, 0), (257, 1)])
def test_a_rank_that_no_engine_takes_is_unfit(say: Say, tmp_path: Path, rank: int, status: int) -> None:
    wide = write_adapter(tmp_path / "wide", {"r": rank}, matrices(rank=rank))
    for words in (("check", wide, "--local"), ("add", wide)):
        found, told, problem = say(*words)
        assert found == status
        assert ("set lora_rank to 256." in told) == (status == 0)
        assert ("r is 257, and 256 is the most; train it with less" in problem) == (status == 1)


@pytest.mark.parametrize("name", ["embedded", "SmolLM2-135M-instruct", "own-model"])
def test_a_models_name_is_none_for_an_adapter(say: Say, home: Path, folder: Path, name: str) -> None:
    """A request may name either in the same field."""
    (home / "models" / "own-model").mkdir(parents=True)
    for file, content in sharded(1).items():
        (home / "models" / "own-model" / file).write_bytes(content)
    status, _, problem = say("add", folder, "--name", name)
    assert (status, AdapterStore().list()) == (1, [])
    assert f"name = '{name}': that is a model's name" in problem


def test_check_tells_every_problem(say: Say, tmp_path: Path) -> None:
    bad = write_adapter(tmp_path / "bad", {"model_type": ..., "bias": "all", "r": 4})
    status, told, problems = say("check", bad)
    assert (status, told) == (1, "")
    assert problems.startswith(f"mistral-nb: {bad} has 3 problems:\n  - ")
    status, _, problems = say("check", bad, "--local")
    assert (status, problems.count("\n  - ")) == (1, 2)


def test_check_fix_makes_a_copy(say: Say, tmp_path: Path) -> None:
    folder, copy = write_adapter(tmp_path / "a", {"model_type": ...}), tmp_path / "copy"
    status, _, problem = say("check", folder)
    assert status == 1
    assert f"mistral-nb lora check {folder} --fix NEW_FOLDER" in problem
    status, told, _ = say("check", folder, "--fix", copy)
    assert status == 0
    assert told.startswith(f"{copy} is a copy whose adapter_config.json says model_type mistral.\n")
    bad = write_adapter(tmp_path / "bad", {"model_type": ..., "use_dora": True})
    assert say("check", bad, "--fix", tmp_path / "no")[0] == 1
    assert not (tmp_path / "no").exists(), "what is unfit otherwise is not copied"


def test_add_list_and_remove(say: Say, folder: Path) -> None:
    status, told, _ = say("list")
    assert status == 0
    assert told.startswith("No adapters on this machine (")
    status, told, _ = say("add", folder, "--description", "like a pirate\x1b[2J")
    assert status == 1, "a description is printable"
    status, told, _ = say("add", folder, "--description", "like a pirate")
    (adapter,) = AdapterStore().list()
    where = f"tone ({adapter.id}) is in {AdapterStore().path(adapter)}"
    fits = "None of the models here is one that it fits.\n"
    assert (status, told) == (0, f"{where}; use it with --lora tone, on the local engine\n{fits}")
    assert adapter.model == "mistralai/Mistral-7B-Instruct-v0.2"
    assert say("add", folder, "--name", "other", "--model", "mine")[0] == 0
    AdapterStore().create("half", "mine")
    (AdapterStore().folder / FIRST).mkdir()
    status, told, _ = say("list")
    rows = [re.split(r"  +", line.strip()) for line in told.splitlines()]
    assert [(row[0], row[4]) for row in rows if len(row) > 4][1:] == [
        ("tone", "nothing"),
        ("other", "nothing"),
        ("half", f"{CONFIG_FILE} and {WEIGHTS_FILE}"),
    ]
    assert f"{FIRST} has a record that cannot be read; remove that folder" in told
    assert told.endswith(
        "No Cloudflare account: set CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN to see its adapters\n"
    )
    assert say("remove", "tone") == (0, "Removed tone from this machine.\n", "")
    assert say("rm", "other")[0] == 0, "as for models"
    assert say("remove", "tone")[0] == 1


def test_what_is_unfit_is_not_added(say: Say, tmp_path: Path) -> None:
    bad = write_adapter(tmp_path / "bad", {"use_dora": True})
    assert say("add", bad)[0] == 1
    assert AdapterStore().list() == []
    odd = write_adapter(tmp_path / "an odd name", {"base_model_name_or_path": None})
    status, _, problem = say("add", odd)
    assert status == 1
    assert "name = 'an odd name'" in problem
    status, told, _ = say("add", odd, "--name", "odd")
    assert status == 0
    assert told.endswith("\nNone of the models here is one that it fits.\n")
    assert AdapterStore().list()[0].model == DEFAULT_MODEL


def test_lists_of_the_account(say: Say, account: FinetunesServer) -> None:
    assert say("list")[1].endswith(
        "No adapters on the Cloudflare account; put one there with: mistral-nb lora push FOLDER --name NAME\n"
    )
    record = account.add("tone")
    record["description"] = "\x1b]0;gotcha\x07"
    status, told, _ = say("list")
    assert status == 0
    assert re.search(rf"On the Cloudflare account:\n.*\ntone +{DEFAULT_MODEL} +2024-03-01 +{FIRST}", told)
    assert "\x1b" not in told
    status, told, _ = say("public")
    assert status == 0
    assert PUBLIC["name"] in told
    account.faults["GET finetunes"] = [(401, error(10000, "Authentication error"))]
    status, told, problem = say("list")
    assert status == 1
    assert "No adapters on this machine" in told, "what is here is told all the same"
    assert "Check the token" in problem


def test_push(say: Say, account: FinetunesServer, folder: Path) -> None:
    status, told, steps = say("push", folder, "--name", "tone", "--description", "like a pirate")
    assert (status, told) == (
        0,
        f"tone ({FIRST}) is on the account; use it with --lora tone --model {DEFAULT_MODEL}\n",
    )
    assert steps.splitlines() == [
        "Checking",
        "Looking at the account",
        "Creating tone",
        f"Uploading {CONFIG_FILE}",
        f"Uploading {WEIGHTS_FILE}",
        "Waiting until tone is found",
    ]
    assert account.adapters[FIRST]["name"] == "tone"
    account.faults[f"POST run/{DEFAULT_MODEL}"] = [(429, error(4006, "spent"))]
    status, told, _ = say("push", folder, "--name", "two")
    assert status == 0
    assert " is on the account, and was not tried: Cloudflare: spent (code 4006, HTTP 429)" in told


def test_a_file_that_was_not_replaced_is_told_loudly(say: Say, account: FinetunesServer, folder: Path) -> None:
    account.add("tone", files={CONFIG_FILE: b"{}"})
    status, told, _ = say("push", folder, "--name", "tone")
    assert status == 0
    assert f"\nWARNING: {CONFIG_FILE} of tone was on the account before this push and not replaced" in told


def test_a_list_tells_how_much_of_it_cannot_be_read(say: Say, account: FinetunesServer) -> None:
    account.add("one")
    account.add("odd\u200bname")
    account.adapters["none"] = {"id": "?"}
    status, told, _ = say("list")
    assert status == 0
    assert "one " in told
    assert told.endswith("\n2 of 3 in Cloudflare's list cannot be read: left out\n")
    account.faults["GET finetunes/public"] = [(200, {"success": True, "result": [{}]})]
    assert say("public")[1].endswith(
        "Cloudflare has none of its own.\n1 of 1 in Cloudflare's list cannot be read: left out\n"
    )


def test_what_the_service_calls_an_adapter_reaches_no_terminal(
    say: Say, account: FinetunesServer, folder: Path
) -> None:
    for record in ({"id": "\x1b[2J", "name": "tone"}, {"id": FIRST, "name": "\x1b]0;gotcha\x07"}):
        account.faults["POST finetunes"] = [(200, {"success": True, "result": record})]
        status, told, problem = say("push", folder, "--name", "tone")
        assert status == 1
        assert "Cloudflare described an adapter in a form that cannot be read" in problem
        assert "\x1b" not in told + problem


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_an_interrupted_push_says_what_is_there(account: FinetunesServer, folder: Path) -> None:
    hold = threading.Event()
    account.faults[f"POST finetunes/{FIRST}/finetune-assets"] = [hold]
    command = [sys.executable, "-m", "mistral_nb", "lora", "push", str(folder), "--name", "tone"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert account.reached.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        told, problem = process.communicate(timeout=PATIENCE)
        hold.set()
    assert (process.returncode, told) == (130, "")
    assert problem.endswith(
        f"mistral-nb: interrupted; On the account now: tone ({FIRST}); whether {CONFIG_FILE} arrived is not known; to "
        "go on, push it again under that name\n"
    )
    assert "Traceback" not in problem
    assert os.environ["CLOUDFLARE_API_TOKEN"] not in problem
