"""What Tab offers in a cell of ours, and that it offers nothing elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core import completer
from IPython.core.interactiveshell import InteractiveShell

from mistral_nb.config import load_settings
from mistral_nb.finetunes import AdapterStore
from mistral_nb.finetunes.adapter import DEFAULT_MODEL
from mistral_nb.finetunes.cloudflare import list_adapters, push
from mistral_nb_magics.completion import candidates
from tests.finetunes.adapters import write_adapter
from tests.finetunes.finetunes_server import FinetunesServer
from tests.models.tiny_repos import sharded

NAMES = {"topic": "tides", "table": SimpleNamespace(columns=["a"], count=1), "_hidden": 1}
HUB_ID = "mistralai/Mistral-7B-Instruct-v0.3"
OPTIONS = ["--max-tokens", "--model", "--temperature"]


@pytest.mark.parametrize(
    ("before", "first", "word", "wanted"),
    [
        ("%%mistral --m", None, "--m", ["--max-tokens", "--model"]),
        ("%mistral Hi --te", None, "--te", ["--temperature"]),
        ("r = %mistral --te", None, "--te", ["--temperature"]),
        ("%mistral s", None, "s", ["status", "stop"]),
        ("%mistral stop --", None, "--", ["--model", "--force"]),
        ("%%mistral --backend l", None, "l", ["local"]),
        ("%%mistral --format ma", None, "ma", ["markdown", "math"]),
        ("%mistral pull emb", None, "emb", ["embedded"]),
        ("%mistral pull mistralai/Mistral-7B-Instruct-v0.3", None, "mistralai/Mistral-7B-Instruct-v0.3", [HUB_ID]),
        ("%mistral pull --", None, "--", ["--revision", "--name"]),
        ("%mistral pull org/name --r", None, "--r", ["--revision"]),
        ("%mistral models smollm2-", None, "smollm2-", ["smollm2-135m-instruct"]),
        ("%mistral lora pu", None, "pu", ["public", "push"]),
        ("%mistral lora check x --", None, "--", ["--local", "--fix"]),
        ("%mistral lora push x --", None, "--", ["--name", "--model", "--description"]),
        ("%mistral lora push x --model @", None, "@", [DEFAULT_MODEL]),
        ("%mistral lora list --", None, "--", []),
        ("%mistral lora adapters explained --te", None, "--te", ["--temperature"]),
        ("%%mistral --lora cf-public-m", None, "cf-public-m", ["cf-public-magicoder"]),
        ("Pull %mistral pull emb", None, "", []),
        ("%%mistral -o t", None, "t", ["table", "topic"]),
        ("Explain {{to", "%%mistral", "to", ["topic"]),
        ("Explain {{ table.co", "%%mistral --raw", "co", ["columns", "count"]),
        ("%mistral Explain {{t", None, "t", ["table", "topic"]),
        ("Explain {{topic}} {", "%%mistral", "", []),
        ("Explain to", "%%mistral", "", []),
        ("%%mistral s", None, "s", []),
        ("{{to", "x = 1", "", []),
        ("%%mistralx --te", None, "", []),
        ("Explain {{nobody.", "%%mistral", "", []),
    ],
)
def test_candidates(before: str, first: str | None, word: str, wanted: list[str]) -> None:
    assert candidates(before, first or before, NAMES, OPTIONS) == (word, wanted)


def test_what_is_in_the_store_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path))
    for name in ("own-model", ".staging-own-half"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        for file, content in sharded(1).items():
            (folder / file).write_bytes(content)
    for line in ("%mistral pull own", "%mistral models own", "%mistral Hi --model own"):
        assert candidates(line, line, NAMES, OPTIONS) == ("own", ["own-model"])


def test_folders_are_offered_for_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tone/inner", "tide", ".hidden", "two words"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tune.txt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for word, wanted in (
        ("", ["tide/", "tone/"]),
        ("to", ["tone/"]),
        ("./t", ["./tide/", "./tone/"]),
        ("~/tone/", ["~/tone/inner/"]),
        (f"{tmp_path}/.", [f"{tmp_path}/.hidden/"]),
        ("nobody/", []),
    ):
        lines = [f"%mistral lora {action} {word}" for action in ("add", "check", "push")]
        if word.startswith((".", "~", "/")):
            lines.append(f"%%mistral --lora {word}")
        for line in lines:
            assert candidates(line, line, NAMES, OPTIONS) == (word, wanted)
    assert candidates("%mistral lora list t", "", NAMES, OPTIONS) == ("t", [])


def test_adapters_that_are_known_here_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account is not asked: there is nobody at its address."""
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path))
    with FinetunesServer() as account:
        settings = load_settings(environ=account.environment)
        account.add("tide-elsewhere")
        account.add("tide in two words")
        push(write_adapter(tmp_path / "tide-pushed"), "tide-pushed", settings=settings)
        assert account.seen[1:]
        offered = ["tide-pushed"]
        AdapterStore().create("tide-here", "mine")
        offered = sorted([*offered, "tide-here"])
        line = "%%mistral --lora tide"
        assert candidates(line, line, NAMES, OPTIONS) == ("tide", offered)
        line = "%mistral lora remove t"
        assert candidates(line, line, NAMES, OPTIONS) == ("t", ["tide-here"]), "what is elsewhere is not removed here"
        list_adapters(settings)
    offered = sorted([*offered, "tide-elsewhere"])
    for line in ("%%mistral --lora tide", "%mistral Hi --lora tide"):
        assert candidates(line, line, NAMES, OPTIONS) == ("tide", offered)


def test_a_store_that_cannot_be_read_is_no_error_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "loop"))
    assert candidates("%mistral pull emb", "%mistral pull emb", NAMES, OPTIONS) == ("emb", ["embedded"])
    assert "cf-public-magicoder" in candidates("%%mistral --lora ", "%%mistral", NAMES, OPTIONS)[1]


def test_model_names_are_offered() -> None:
    _, found = candidates("%%mistral --model mistral-7b-instruct-v0.", "%%mistral", NAMES, OPTIONS)
    assert found == [f"mistral-7b-instruct-v0.{number}" for number in (1, 2, 3)]


@pytest.mark.skipif(not hasattr(completer, "context_matcher"), reason="this IPython has no matchers")
def test_the_shell_completes_while_the_extension_is_loaded(shell: InteractiveShell) -> None:
    matchers: list[Any] = shell.Completer.custom_matchers
    assert len(matchers) == 1
    shell.user_ns["topic"] = "tides"
    for code, wanted, word in (("%%mistral --temp", "--temperature", "--temp"), ("%%mistral\nOn {{to", "topic", "to")):
        with completer.provisionalcompleter():
            found = list(shell.Completer.completions(code, len(code)))
        assert [(each.text, code[each.start : each.end]) for each in found] == [(wanted, word)]
    shell.run_line_magic("unload_ext", "mistral_nb")
    assert not matchers
    shell.run_line_magic("load_ext", "mistral_nb")
