"""The magic in a real InteractiveShell: loading, settings, errors, results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from IPython.core.error import UsageError
from IPython.core.interactiveshell import ExecutionResult, InteractiveShell

from mistral_nb import Result
from mistral_nb.errors import MistralError
from tests.backends.scripted import TOKEN, Peer, body, frame, head
from tests.models.tiny_repos import sharded

RunCell = Callable[[str], ExecutionResult]
ANSWER: list[Any] = [head(), frame({"response": "Blue "}), frame({"response": "light."}), frame("[DONE]")]


def test_loading_is_light() -> None:
    """Beside IPython's it imports our own modules, as few as a cell needs, platformdirs, and parts of Python."""
    script = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
before = set(sys.modules)
shell.run_line_magic("load_ext", "mistral_nb")
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, loaded = json.loads(done.stdout)
    assert not {"torch", "ipywidgets", "anywidget", "httpx", "transformers", "markdown_it"} & {*before, *loaded}
    ours = [name for name in loaded if name.startswith("mistral_nb")]
    others = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert others <= {"IPython", "mistral_nb", "mistral_nb_magics", "platformdirs", "traitlets"}
    assert len(ours) <= 90
    assert len(loaded) <= 180


def test_loading_twice_and_unloading(shell: InteractiveShell) -> None:
    from mistral_nb import load_ipython_extension, unload_ipython_extension

    manager = shell.magics_manager
    first = manager.registry["Mistral"]
    load_ipython_extension(shell)
    assert manager.registry["Mistral"] is first
    assert [type(each).__name__ for each in shell.configurables].count("Mistral") == 1
    unload_ipython_extension(shell)
    assert "mistral" not in {*manager.magics["line"], *manager.magics["cell"]}
    assert "Mistral" not in {type(each).__name__ for each in shell.configurables}
    assert "Mistral" not in manager.registry
    unload_ipython_extension(shell)
    shell.run_line_magic("reload_ext", "mistral_nb")
    assert manager.registry["Mistral"] is not first
    assert "mistral" in manager.magics["cell"]


def test_an_answer_in_a_plain_shell(run: RunCell, cloud: Peer, shell: InteractiveShell, capsys: Any) -> None:
    cloud.scripts = [ANSWER]
    shell.user_ns["topic"] = "the sky"
    done = run("%%mistral -o reply --max-tokens 9\nAbout {{topic}}.")
    printed = capsys.readouterr().out
    assert printed.startswith("Blue light.\n")
    assert printed.count("Blue light.") == 1
    assert isinstance(done.result, Result)
    assert shell.user_ns["reply"] is done.result is shell.user_ns["_"]
    assert cloud.seen[0].json["prompt"] == "About the sky."
    assert cloud.seen[0].json["max_tokens"] == 9
    assert TOKEN not in printed + repr(done.result)
    run("reply")
    assert "Blue light." in capsys.readouterr().out
    run("%mistral last")
    assert capsys.readouterr().out.count("Blue light.") == 1


def test_a_line_gives_its_result(run: RunCell, cloud: Peer, shell: InteractiveShell, capsys: Any) -> None:
    cloud.scripts = [ANSWER]
    assert run("answer = %mistral Why? --temperature 0").success
    assert shell.user_ns["answer"].text == "Blue light."
    printed = capsys.readouterr().out
    assert "Blue light." in printed
    assert "Out[" not in printed


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("%mistral Hi --max-tokns 3", "--max-tokens"),
        ("%mistral Hi --temperature 9", "0 to 5"),
        ("%mistral Hi {{nobody}}", "nobody"),
        ("%%mistral\n   \n", "empty"),
        ("%mistral last", "no answer yet"),
        ("%mistral pull", "pull embedded"),
        ("%mistral stop --frce", "--force"),
        ("%mistral pull x --revison=v1", "--revision"),
    ],
)
def test_bad_usage_is_exactly_a_usage_error(run: RunCell, capsys: Any, code: str, told: str) -> None:
    done = run(code)
    assert type(done.error_in_exec) is UsageError
    shown = capsys.readouterr()
    assert told in shown.err
    assert "Traceback" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("%mistral Hi --backend clodflare", "ConfigurationError"),
        ("%mistral Hi --backend cloudflare", "ConfigurationError"),
        ("%mistral Hi --model no-such-model", "UnknownModel"),
        ("%mistral pull no-such-model", "UnknownModel"),
        ("%mistral models no-such-model", "UnknownModel"),
        ("%mistral pull embedded --revision v1", "ModelError"),
    ],
)
def test_other_errors_are_short(run: RunCell, capsys: Any, code: str, name: str) -> None:
    done = run(code)
    assert isinstance(done.error_in_exec, MistralError)
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{name}: ")
    assert len(shown.out.splitlines()) <= 2


def test_an_error_of_the_peer_is_short_too(run: RunCell, cloud: Peer, capsys: Any) -> None:
    cloud.scripts = [body({"errors": [{"message": "no", "code": 10000}], "success": False}, "403 Forbidden")]
    assert not run("%mistral Hi").success
    shown = capsys.readouterr().out
    assert shown.startswith("AuthenticationError: ")
    assert TOKEN not in shown


def test_an_unwritable_log_folder_is_named(run: RunCell, capsys: Any, tmp_path: Any, monkeypatch: Any) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MISTRAL_NB_LOG_DIR", str(blocked / "logs"))
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path))
    assert not run("%mistral Hi").success
    shown = capsys.readouterr().out
    assert "ConfigurationError" in shown
    assert "MISTRAL_NB_LOG_DIR" in shown


def test_config_lists_and_sets(
    run: RunCell, cloud: Peer, shell: InteractiveShell, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cloud.scripts = [ANSWER]
    run("%config Mistral")
    listed = capsys.readouterr().out
    for name in ("backend", "model", "system", "temperature", "max_tokens", "lora", "footer"):
        assert f"Mistral.{name}=" in listed
    assert "Randomness; 0 is greedy." in listed
    assert run("%config Mistral.temperature = 0.25").success
    assert run("%config Mistral.system = 'Be brief.'").success
    run("%mistral Hi")
    run("%mistral Hi --temperature 0.5")
    assert [seen.json["temperature"] for seen in cloud.seen] == [0.25, 0.5]
    assert cloud.seen[0].json["messages"][0] == {"role": "system", "content": "Be brief."}
    run("%config Mistral.backend = 'local'")
    run("%mistral status")
    assert "%config Mistral.backend" in capsys.readouterr().out
    run("%config Mistral.temperature = 7")
    assert "should not be greater than 5" in caplog.text
    assert shell.magics_manager.registry["Mistral"].temperature == 0.25


def test_the_footer_can_be_left_out(run: RunCell, cloud: Peer, capsys: Any) -> None:
    cloud.scripts = [ANSWER]
    run("%config Mistral.footer = False")
    run("x = %mistral Hi")
    assert capsys.readouterr().out == "Blue light.\n"


def test_status_tells_who_and_why(
    run: RunCell, cloud: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path))
    assert run("%mistral status").success
    shown = capsys.readouterr().out
    assert "a Cloudflare account and token are set" in shown
    assert "No engine is running." in shown
    assert "CLOUDFLARE_API_TOKEN" in shown
    assert TOKEN not in shown
    run("%mistral")
    shown = capsys.readouterr().out
    assert "Who answers" in shown
    assert "--max-tokens" in shown
    run("%mistral models")
    assert "smollm2-135m-instruct" in capsys.readouterr().out
    run("%mistral stop")
    assert "No engine is running." in capsys.readouterr().out


def test_models_are_pulled_and_told_about(run: RunCell, capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MISTRAL_NB_HOME", str(tmp_path / "home"))
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, content in sharded().items():
        (folder / name).write_bytes(content)
    here = tmp_path / "home" / "models" / "mine"
    assert run(f"%mistral pull {folder} --name mine").success
    assert capsys.readouterr().out == f"mine is in {here}\n"
    assert run(f"%mistral pull {folder} --name mine").success
    assert capsys.readouterr().out == f"mine is in {here} already; nothing was to be done\n"
    run("%mistral models")
    assert re.search(rf"^mine  +[\d.]+ MB +{folder}", capsys.readouterr().out, re.MULTILINE)
    run("%mistral models mine")
    report = capsys.readouterr().out
    assert f"source        {folder}" in report
    assert "Memory on CPU" in report
    run("%mistral models embedded")
    assert "%mistral pull smollm2-135m-instruct" in capsys.readouterr().out
    os.truncate(here / "model-00001-of-00003.safetensors", 10)
    run("%mistral status")
    status = capsys.readouterr().out
    assert "Models\n  none\n  mine is broken: " in status
    assert f"in {here.parent}" in status


def test_the_manual(shell: InteractiveShell) -> None:
    manual = shell.find_line_magic("mistral").__doc__
    for text in ("%mistral stop", "--max-tokens N", "{{topic}}", "0 to 5", "--no-stream", "%config Mistral"):
        assert text in manual
    assert "{{{{" not in manual


def test_a_dry_run_needs_a_backend_that_tells_its_tokens(run: RunCell, cloud: Peer, capsys: Any) -> None:
    assert not run("%mistral Hi --dry-run").success
    assert "--backend local" in capsys.readouterr().out
    assert not cloud.seen


def test_json_that_is_none_fails_and_keeps_the_text(run: RunCell, cloud: Peer, capsys: Any) -> None:
    cloud.scripts = [ANSWER]
    assert not run("%mistral Hi --format json -o").success
    assert not run("%mistral Hi --format json -o kept").success
    shown = capsys.readouterr().out
    assert "Blue light." in shown
    assert "the answer holds no JSON" in shown


def test_capture_keeps_one_answer(run: RunCell, cloud: Peer, shell: InteractiveShell) -> None:
    cloud.scripts = [ANSWER]
    assert run("%%capture caught\n%mistral Hi").success
    assert shell.user_ns["caught"].stdout.count("Blue light.") == 1
