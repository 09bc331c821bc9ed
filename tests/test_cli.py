"""The command `mistral-nb`: what it prints and how it ends. The store's commands have a file of their own.

Commands that need a running engine: tests/server.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from mistral_nb import __version__, cli
from mistral_nb.cli import main
from tests.models.tiny_repos import sharded

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, options: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m mistral_nb` in a process of its own."""
    command = [sys.executable, *options, "-m", "mistral_nb", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=300)


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"mistral-nb {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "COMMAND"),
        (["pull"], "model"),
        (["pull", "a", "b"], "unrecognized arguments: b"),
        (["show"], "model"),
        (["rm"], "model"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["serve", "--port", "65536"], "'65536' is not a port: a whole number from 0 to 65535"),
        (["serve", "--port", "-1"], "'-1' is not a port"),
        (["serve", "--idle-timeout", "soon"], "'soon' is not a time: seconds, 0 or more"),
        (["serve", "--idle-timeout", "nan"], "'nan' is not a time"),
        (["serve", "--quantize", "int2"], "invalid choice: 'int2'"),
        (["serve", "--quantize", "int8", "--precision", "bf16"], "not allowed with argument"),
        (["bench", "--runs", "0"], "'0' is not a count"),
    ],
)
def test_bad_usage(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a closed pipe is another error")
@pytest.mark.parametrize("command", ["list", "status"])
def test_it_ends_quietly_when_nobody_reads_it(command: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "mistral_nb", command],
            stdout=nobody,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"MISTRAL_NB_HOME": str(tmp_path), "MISTRAL_NB_RUNTIME_DIR": str(tmp_path)},
            timeout=300,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_quantize_is_another_word_for_a_precision() -> None:
    asked = [cli._parser().parse_args(["serve", *words]).precision for words in ([], ["--quantize", "int4"])]
    assert asked == [None, "int4"]


@pytest.mark.parametrize("command", ["serve", "pull", "list", "show", "rm", "status", "stop", "bench", "demo"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"mistral-nb {command}" in shown
    assert "--managed" not in shown
    assert re.search(r"^\w.*\.$", shown, re.MULTILINE), "a sentence says what it does"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "--model", "embeded"], "did you mean 'embedded'"),
        (["serve"], "run: mistral-nb pull embedded"),
        (["serve", "--model", "{folder}"], "holds no weights"),
        (["stop", "nonsense"], "Known are"),
    ],
)
def test_an_error_is_one_line_with_the_next_step(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path))
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mistral-nb: ")
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("place", ["no-such-folder/out.json", "."])
def test_a_benchmark_that_could_not_be_written_is_not_begun(
    place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    assert main(["bench", "--model", "mistral-7b", "--json", str(tmp_path / place)]) == 1
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "--json" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--precision", "int4"], "--precision is of bench engine and serve, not of bench answer: leave it out, or"),
        (["load", "--contexts", "512"], "--contexts is of bench engine, not of bench load"),
        (["--size-gb", "9"], "--size-gb is of bench load, not of bench answer"),
        (["engine", "--folder", "x"], "--folder is of bench load, not of bench engine"),
        (["frames", "--model", "embedded"], "--model is of bench answer, engine and serve, not of bench frames"),
        (["load", "--peer-python", "x"], "--peer-python is of bench engine, not of bench load"),
        (["engine", "--rate", "2"], "--rate is of bench serve, not of bench engine: leave it out, or begin with"),
        (["serve", "--runs", "2"], "--runs is of bench answer, engine, load and frames, not of bench serve"),
    ],
)
def test_options_of_another_benchmark_are_not_dropped(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_without_engines_there_is_nothing_to_show_or_stop(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path))
    assert main(["status"]) == 0
    assert main(["stop"]) == 0
    assert capsys.readouterr().out == "No engine is running.\n" * 2


def test_a_log_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name, content in sharded(1).items():
        (checkpoint / name).write_bytes(content)
    done = run("serve", "--model", str(checkpoint), MISTRAL_NB_LOG_DIR=str(tmp_path / "file" / "logs"))
    assert done.returncode == 1
    assert f"{tmp_path}/file/logs cannot be written" in done.stderr
    assert "MISTRAL_NB_LOG_DIR" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("serve", "torch", "local"), ("bench", "torch", "local"), ("demo", "nbclient", "demo")],
)
def test_without_its_packages_a_command_tells_how_to_install_them(
    command: str, package: str, extra: str, tmp_path: Path
) -> None:
    """An interpreter without site-packages, and of the dependencies only the one that the command line needs."""
    (tmp_path / "platformdirs").symlink_to(Path(platformdirs.__file__).parent)
    done = run(command, options=("-S",), PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]))
    assert done.returncode == 1
    assert done.stderr.endswith(f': pip install "mistral-nb[{extra}]"\n')
    assert package in done.stderr
    assert done.stderr.count("\n") == 1
