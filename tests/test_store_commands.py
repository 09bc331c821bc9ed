"""`mistral-nb pull`, `list`, `show` and `rm`: what they print and leave, with real files and a hub on loopback."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import models, runtime
from mistral_nb.checkpoints import ModelArgs, choices_that_fit, describe, estimate
from mistral_nb.checkpoints.memory import CONTEXT
from mistral_nb.cli import main
from mistral_nb.config import load_settings
from mistral_nb.hardware import Memory
from mistral_nb.model_report import memory_report
from mistral_nb.progress import amount
from mistral_nb.report import status_report
from mistral_nb.runtime import EngineRecord
from tests.models.hub_server import Fault, HubServer, Repo, use_hub
from tests.models.tiny_repos import sharded

SHARD = "model-00002-of-00003.safetensors"
PATIENCE = 180.0

Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "home" / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint that is not in the store."""
    folder = tmp_path / "my model"
    folder.mkdir()
    for name, content in sharded().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def hub(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer({"org/tiny": Repo(sharded(), tags=("v1",))}) as hub:
        use_hub(monkeypatch, hub.endpoint, tmp_path / "hf_home")
        yield hub


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `mistral-nb` with some arguments: the exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def facts(report: str) -> dict[str, str]:
    """The lines of a report that have a name and a value."""
    return dict(re.findall(r"^  (\S+(?: disk)?) +(.+)$", report, re.MULTILINE))


def test_from_pull_to_rm(store: Path, folder: Path, say: Say) -> None:
    here = store / "my-model"
    assert say("pull", folder) == (0, f"my-model is in {here}\n", "Copying\nSaving\n")
    assert say("pull", folder) == (0, f"my-model is in {here} already; nothing was to be done\n", "")
    size = amount(sum(path.stat().st_size for path in here.iterdir()))
    status, listed, _ = say("list")
    assert status == 0
    (line,) = [line for line in listed.splitlines() if line.startswith("my-model")]
    assert re.split(r"  +", line)[1:] == [size, str(folder), "apache-2.0"]
    assert say("models") == (0, listed, "")
    assert say("rm", "my-model") == (0, f"Removed my-model: {size} freed.\n", "")
    assert "my-model" not in say("list")[1]
    status, told, error = say("rm", "my-model")
    assert (status, told) == (1, "")
    assert error == "mistral-nb: 'my-model' is not in the store, which holds nothing; give one of those\n"


def test_a_path_may_get_another_name(store: Path, folder: Path, say: Say) -> None:
    assert say("pull", folder, "--name", "other")[0] == 0
    assert [model.name for model in models.installed()] == ["other"]


def test_show_tells_all(store: Path, folder: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    say("pull", folder)
    status, report, error = say("show", "my-model")
    assert (status, error) == (0, "")
    args = ModelArgs.from_folder(folder)
    size = sum(
        (store / "my-model" / name).stat().st_size for name in sharded() if name not in ("README.md", ".gitattributes")
    )
    assert facts(report.partition("\n\n")[0]) == {
        "name": "my-model",
        "folder": str(store / "my-model"),
        "source": str(folder),
        "architecture": "Mistral: 3 layers of 256, 4 heads, 2 of keys and values",
        "layout": "safetensors, 3 files",
        "parameters": f"{describe(folder).parameters / 1e6:.1f} million in BF16",
        "context": f"{args.context} tokens, full attention",
        "tokenizer": describe(folder).tokenizer,
        "template": describe(folder).template,
        "licence": "apache-2.0",
        "on disk": amount(size),
    }
    for precision in ("fp32", "bf16", "int8"):
        need = estimate(args, precision, args.context, "cpu")
        row = [precision, str(args.context), *map(amount, (need.weights, need.kv, need.workspace, need.total))]
        assert [*row, f"--precision {precision}"] in [re.split(r"  +", line.strip()) for line in report.splitlines()]
    assert re.search(r"^Memory on CPU: [\d.]+ GB free of [\d.]+ GB$", report, re.MULTILINE)
    assert "mistral-nb serve --model my-model" in report


def test_a_sliding_window_is_told(store: Path, folder: Path, say: Say) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 256}))
    assert facts(say("show", folder)[1])["context"] == (
        f"{config['max_position_embeddings']} tokens, each sees the last 256"
    )


def test_show_takes_a_folder(store: Path, folder: Path, say: Say) -> None:
    status, report, _ = say("show", folder)
    assert status == 0
    assert facts(report)["source"] == "placed by hand"
    assert f"mistral-nb serve --model '{folder}'" in report


def test_show_tells_how_to_get_what_is_not_here(store: Path, say: Say) -> None:
    status, report, _ = say("show", "mistral-7b")
    assert status == 0
    about = facts(report)
    assert about["source"] == "mistralai/Mistral-7B-Instruct-v0.2"
    assert "mistral-nb pull mistral-7b-instruct-v0.2" in about["here"]
    assert "%mistral pull" in about["here"]
    status, _, error = say("show", "org/tiny")
    assert status == 1
    assert error == "mistral-nb: org/tiny is not in the store, nor a folder here; run: mistral-nb pull org/tiny\n"


def test_a_licence_does_not_act_on_the_terminal(store: Path, folder: Path, say: Say) -> None:
    (folder / "LICENSE").write_text("\x1b]0;title\x07 Free\n")
    _, report, _ = say("show", folder)
    assert "\x1b" not in report
    assert "\x07" not in report
    assert facts(report)["licence"].endswith("Free")


SEVEN_B = ModelArgs(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    hidden_dim=14_336,
    vocab_size=32_000,
    norm_eps=1e-5,
    rope_theta=1e6,
    context=32_768,
)
GB = 1_000_000_000


def choices(*memories: Memory) -> tuple[list[list[str]], str]:
    """The rows of the report on a 7B model, and all of it."""
    report = memory_report(SEVEN_B, "seven", memories)
    found = [re.split(r"  +", line.strip()) for line in report.splitlines() if line.startswith("  ")]
    return [row for row in found if row[0] != "PRECISION"], report


@pytest.mark.parametrize(
    ("memory", "fit", "too_much"),
    [
        (Memory("cuda", "Card", 17_450_000_000, 24 * GB), ("bf16", "8192"), ("bf16", "32768")),
        (Memory("cpu", "CPU", 12 * GB, 16 * GB), ("int8", "8192"), ("bf16", "8192")),
    ],
)
def test_the_memory_of_a_large_model_and_what_fits(
    memory: Memory, fit: tuple[str, str], too_much: tuple[str, str]
) -> None:
    rows, report = choices(memory)
    options = {(row[0], row[1]): row[-1] for row in rows}
    device = "--device cuda " if memory.device == "cuda" else ""
    assert options[fit] == f"{device}--precision {fit[0]} --context {fit[1]}"
    assert options[too_much] == "does not fit"
    for precision, context in options:
        need = estimate(SEVEN_B, precision, int(context), memory.device).total  # type: ignore[arg-type]
        fits = need + CONTEXT[memory.device] <= memory.free
        assert fits == (options[precision, context] != "does not fit")
    for choice in choices_that_fit(SEVEN_B, memory.free - CONTEXT[memory.device], memory.device):
        assert (choice.precision, str(choice.context)) in options
    assert f"Memory on {memory.name}: {amount(memory.free)} free of {amount(memory.total)}" in report


def test_beside_a_gpu_the_device_is_named() -> None:
    _, report = choices(Memory("cuda", "Card", 80 * GB, 80 * GB), Memory("cpu", "CPU", 99 * GB, 99 * GB))
    assert "--device cuda --precision bf16\n" in report
    assert "--device cpu --precision int8\n" in report


def test_where_nothing_fits_no_command_is_given() -> None:
    rows, report = choices(Memory("cpu", "CPU", 2 * GB, 4 * GB))
    assert {row[-1] for row in rows} == {"does not fit"}
    assert "serve --model" not in report
    assert "free memory, or choose a smaller model" in report


def test_of_several_gpus_it_says_which_is_taken() -> None:
    _, report = choices(Memory("cuda", "Card", 80 * GB, 80 * GB), Memory("cuda", "Card", 80 * GB, 80 * GB))
    assert "CUDA_VISIBLE_DEVICES" in report
    assert "CUDA_VISIBLE_DEVICES" not in choices(Memory("cuda", "Card", 80 * GB, 80 * GB))[1]


def test_verify_reads_every_byte(store: Path, folder: Path, say: Say) -> None:
    say("pull", folder)
    status, told, steps = say("show", "my-model", "--verify")
    assert (status, steps) == (0, "Checking\n")
    assert told.endswith("\nEvery file has the SHA-256 that it was pulled with.\n")
    shard = store / "my-model" / SHARD
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, told, error = say("show", "my-model", "--verify")
    assert status == 1
    assert "SHA-256 that" not in told
    assert re.fullmatch(
        rf"Checking\nmistral-nb: my-model is damaged: {SHARD} has the SHA-256 \w+, not \w+; "
        "run: mistral-nb rm my-model, and pull it again\n",
        error,
    )
    status, _, error = say("show", folder, "--verify")
    assert status == 1
    assert "was not pulled, so there are no sums to compare" in error


def test_what_is_broken_is_listed_with_the_reason(store: Path, folder: Path, say: Say) -> None:
    say("pull", folder)
    os.truncate(store / "my-model" / SHARD, 1000)
    (store / "empty").mkdir()
    (store / ".staging-half").mkdir()
    shutil.copytree(folder, store / ".staging-half" / "checkpoint")
    status, listed, _ = say("list")
    assert status == 0
    lines = listed.splitlines()
    states = {line.split()[0]: re.split(r"  +", line)[1] for line in lines if re.match(r"(my-model|empty)  ", line)}
    assert states == {"my-model": "broken", "empty": "broken"}
    (problem,) = [line for line in lines if line.startswith("my-model is broken: ")]
    assert SHARD in problem
    assert "mistral-nb pull" in problem
    assert any(line.startswith("empty is broken: ") for line in lines)
    assert "half" not in listed
    status, told, error = say("show", "my-model")
    assert (status, told) == (1, "")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "name", "by_path"),
    [
        ("my-model", "my-model", False),
        ("my-model", "my-model", True),
        ("Mistral-7B-Instruct-v0.2", "mistral-7b-instruct-v0.2", True),
    ],
)
def test_rm_is_refused_while_an_engine_has_the_model(
    store: Path, folder: Path, say: Say, place: str, name: str, by_path: bool
) -> None:
    shutil.copytree(folder, store / place)
    loaded = str(store / place) if by_path else name
    waiting = [sys.executable, "-c", "input()", "mistral-nb", "serve"]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as engine:
        record = EngineRecord(engine.pid, 9, "token", loaded, "0", runtime.PROTOCOL, "log", 0.0)
        runtime.write_record(record)
        status, _, error = say("rm", name)
        assert status == 1
        assert error == (
            f"mistral-nb: {name} is loaded by an engine (process {engine.pid}); "
            f"end it with: mistral-nb stop {loaded}, then remove it\n"
        )
        assert (store / place).is_dir()
        engine.communicate(b"\n")
    assert say("rm", name)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pull", "nonsense"], "Known are"),
        (["pull", "gpt2"], "ORG/NAME of the Hugging Face hub"),
        (["pull", "n" * 300], "no model"),
        (["show", "n" * 300], "no model"),
        (["rm", "n" * 300], "is not in the store"),
        (["serve", "--model", "n" * 300], "no model"),
        (["pull", "{folder}", "--revision", "v1"], "leave it out"),
        (["pull", "org/tiny", "--name", "x"], "leave the name out"),
        (["pull", "embedded", "--revision", "v1"], "leave it out"),
        (["show", "embeded"], "did you mean 'embedded'"),
        (["show", "embedded", "--verify"], "run: mistral-nb pull embedded"),
        (["rm", "embedded"], "is not in the store"),
        (["rm", "{folder}"], "remove it yourself"),
    ],
)
def test_an_error_is_one_line_with_the_next_step(
    arguments: list[str], expected: str, store: Path, folder: Path, say: Say
) -> None:
    status, _, error = say(*(argument.format(folder=folder) for argument in arguments))
    assert status == 1
    assert error.startswith("mistral-nb: ")
    assert expected in error
    assert error.count("\n") == 1


def test_a_model_of_the_hub(hub: HubServer, store: Path, say: Say) -> None:
    status, told, steps = say("pull", "org/tiny", "--revision", "v1")
    assert (status, told) == (0, f"org--tiny is in {store / 'org--tiny'}\n")
    assert "Downloading" in steps
    commit = hub.repos["org/tiny"].commit
    assert f"org/tiny at {commit[:8]} " in say("list")[1]
    assert facts(say("show", "org/tiny")[1])["source"] == f"org/tiny at {commit}"


@pytest.fixture
def interrupted(hub: HubServer) -> tuple[int, str, str]:
    """A pull that was interrupted in its second shard: its exit status, stdout and stderr."""
    if sys.platform == "win32":
        pytest.skip("Windows has no SIGINT for one process")
    fault = hub.fail(SHARD, Fault("stalled", at=500_000))
    command = [sys.executable, "-m", "mistral_nb", "pull", "org/tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert fault.happened.wait(PATIENCE)
        process.send_signal(signal.SIGINT)
        told, error = process.communicate(timeout=PATIENCE)
    return process.returncode, told, error


def test_an_interrupt_keeps_what_was_fetched_and_says_so(
    interrupted: tuple[int, str, str], hub: HubServer, store: Path, say: Say
) -> None:
    status, told, error = interrupted
    assert (status, told) == (130, "")
    kept = sum(path.stat().st_size for path in (store / ".staging-org--tiny").rglob("*") if path.is_file())
    assert kept > 1_000_000
    assert error.endswith(
        f"mistral-nb: interrupted; what was fetched is kept ({amount(kept)}): the next pull goes on from there, and "
        "mistral-nb rm org--tiny drops it\n"
    )
    assert "Traceback" not in error
    assert "org--tiny" not in say("list")[1]
    before = hub.sent("model-00001-of-00003.safetensors")
    assert say("pull", "org/tiny")[0] == 0
    assert hub.sent("model-00001-of-00003.safetensors") == before, "a whole file is not fetched again"
    assert [model.name for model in models.installed()] == ["org--tiny"]


def test_an_unfinished_pull_is_told_but_not_listed(interrupted: tuple[int, str, str], store: Path, say: Say) -> None:
    size = sum(path.stat().st_size for path in (store / ".staging-org--tiny").rglob("*") if path.is_file())
    advice = f"{amount(size)}: pull it again, or drop it with: mistral-nb rm org--tiny"
    assert say("status") == (0, f"No engine is running.\nUnfinished pulls: org--tiny, {advice}\n", "")
    assert f"  Unfinished pulls: org--tiny, {advice}\n" in status_report(load_settings())
    for name in ("org/tiny", "org--tiny"):
        error = f"mistral-nb: {name} is not in the store, but an unfinished pull of it is there, {advice}\n"
        assert say("show", name) == (1, "", error)
    assert "tiny" not in say("list")[1]
    say("pull", "org/tiny")
    assert say("status")[1] == "No engine is running.\n"


def test_the_size_of_a_known_model_is_told_before_it_is_pulled(store: Path, say: Say) -> None:
    listed = say("list")[1]
    assert re.search(r"^smollm2-135m-instruct +embedded, smollm2 +no \(540 MB\)  ", listed, re.MULTILINE)
    assert len(re.findall(r"^mistral-7b-instruct-v0.\d .*  no \(14.5 GB\)  ", listed, re.MULTILINE)) == 3
    assert facts(say("show", "embedded")[1])["size"] == "540 MB on disk, from a download of 93 MB"
    assert facts(say("show", "mistral-7b")[1])["size"] == "14.5 GB on disk"
    (store / ".staging-smollm2-135m-instruct").mkdir(parents=True)
    assert facts(say("show", "embedded")[1])["besides"].startswith("unfinished pull of it is there, 0 B: pull it again")


def test_a_known_model_under_another_of_its_names_is_listed_once(store: Path, folder: Path, say: Say) -> None:
    shutil.copytree(folder, store / "Mistral-7B-Instruct-v0.2")
    listed = say("list")[1]
    assert len(re.findall(r"(?i)^mistral-7b-instruct-v0.2 ", listed, re.MULTILINE)) == 1
    assert re.search(r"^mistral-7b-instruct-v0.2 .*placed by hand", listed, re.MULTILINE)
    assert facts(say("show", "mistral-7b")[1])["folder"] == str(store / "Mistral-7B-Instruct-v0.2")
    assert say("rm", "Mistral-7B-Instruct-v0.2")[0] == 0


def test_an_unfinished_pull_can_be_dropped(interrupted: tuple[int, str, str], store: Path, say: Say) -> None:
    status, told, _ = say("rm", "org/tiny")
    assert status == 0
    assert re.fullmatch(r"Removed org--tiny: [\d.]+ MB freed\.\n", told)
    assert not [path for path in store.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_terminal_gets_a_bar_and_takes_an_interrupt(hub: HubServer, store: Path) -> None:
    pexpect: Any = pytest.importorskip("pexpect", reason="pexpect drives the terminal; it is not there on Windows")
    fault = hub.fail(SHARD, Fault("stalled", at=500_000))
    child = pexpect.spawn(
        sys.executable,
        ["-m", "mistral_nb", "pull", "org/tiny"],
        env={**os.environ, "TERM": "xterm"},
        encoding="utf-8",
        timeout=PATIENCE,
        dimensions=(24, 60),
    )
    child.expect(r"\rDownloading +\d+%  █[█░]{9}  [\d.]+ of [\d.]+ MB")
    assert fault.happened.wait(PATIENCE)
    child.sendintr()
    child.expect("interrupted; what was fetched is kept")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130
