"""Broken checkpoints of every kind: each is refused soon, by name, with what to do; none of it is executed.

All are described in one process of its own, which watches what Python imports, compiles, opens and starts, with its
working directory in the folder, as a notebook's is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.cli import main
from tests.checkpoints import broken_folders, broken_weights, tiny
from tests.checkpoints.broken import PAYLOAD, Broken

ROOT = Path(__file__).resolve().parents[2]
TABLE = [*broken_weights.TABLE, *broken_folders.TABLE]
SECONDS = 60.0
"""Two hundred times what the slowest case takes: one that is read in the square of its length takes more."""
MEMORY = 128_000_000
"""Bytes that the hungriest case may take beyond the interpreter's own: a tokenizer.json of two million values."""

WATCHER = """
import json, os, sys, time
from contextlib import suppress
from pathlib import Path
sys.path[:0] = [ROOT]
from mistral_nb.checkpoints import describe
from mistral_nb.errors import ModelError

FORBIDDEN = ("import", "compile", "exec", "marshal.", "pickle.", "ctypes.", "os.system", "os.exec", "os.posix_spawn",
             "os.fork", "subprocess.", "socket.", "code.", "cpython.run")
seen, watching = [], False

def hook(event, arguments):
    by_name = event == "open" and not isinstance(arguments[0], int)
    if watching and (event.startswith(FORBIDDEN) or by_name):
        seen.append([event, str(arguments[0]) if arguments else ""])

def resident(line):
    text = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) * 1024 for row in text.splitlines() if row.startswith(line + ":"))

sys.addaudithook(hook)
sys.path.insert(0, "")
results = {}
for folder in map(Path, sys.argv[1:]):
    os.chdir(folder)
    seen.clear()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, start, message = resident("VmRSS"), time.process_time(), None
    watching = True
    try:
        describe(folder)
    except ModelError as error:
        message = str(error)
    except BaseException as error:
        message = f"NOT A ModelError: {error!r}"
    finally:
        watching = False
    seconds, grown = time.process_time() - start, resident("VmHWM") - before
    results[folder.name] = {"message": message, "seconds": seconds, "grown": grown, "events": list(seen)}
print(json.dumps(results))
"""


@dataclass(frozen=True)
class Refusal:
    """What became of one folder. `message` is None where it was accepted; `events` are Python's audit events.

    `seconds` are of CPU time, which does not depend on what else the machine does.
    """

    folder: Path
    message: str | None
    seconds: float
    grown: int
    events: list[tuple[str, str]]


def watched(folders: list[Path]) -> dict[str, Refusal]:
    """Describe the folders in a new process; by the folders' names."""
    program = WATCHER.replace("ROOT", repr(str(ROOT)), 1)
    command = [sys.executable, "-c", program, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Refusal(folder=_named(folders, name), **entry) for name, entry in json.loads(done.stdout).items()}


def _named(folders: list[Path], name: str) -> Path:
    return next(folder for folder in folders if folder.name == name)


def forbidden(refusal: Refusal) -> list[tuple[str, str]]:
    """Events that are none of opening a checkpoint's own files to read them."""
    kinds = (".json", ".safetensors", ".jinja", ".v3", "tokenizer.model", "LICENSE", "README.md")
    return [
        (event, what)
        for event, what in refusal.events
        if event != "open" or not what.endswith(kinds) or not Path(what).resolve().is_relative_to(refusal.folder.parent)
    ]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refusal]:
    top = tmp_path_factory.mktemp("broken")
    folders = [case.build(top / f"checkpoint-{number}") for number, case in enumerate(TABLE)]
    found = watched(folders)
    return {case.name: found[folder.name] for case, folder in zip(TABLE, folders, strict=True)}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_refused(case: Broken, refusals: dict[str, Refusal]) -> None:
    refusal = refusals[case.name]
    assert refusal.message is not None, "it was accepted"
    assert re.search(case.says, refusal.message), refusal.message
    assert case.names in refusal.message
    assert str(refusal.folder) in refusal.message
    assert re.search(r"[;:.] ((fetch|give|put|wait|run|choose|convert|rename|bring|its config must)\b[^;]*)$",
                     refusal.message, re.IGNORECASE), refusal.message  # fmt: skip
    assert len(refusal.message) < 600
    assert refusal.message.isprintable()
    assert refusal.seconds < SECONDS
    assert refusal.grown < MEMORY
    assert forbidden(refusal) == []


def test_each_has_a_message_of_its_own(refusals: dict[str, Refusal]) -> None:
    """Names and numbers aside, but for cases that differ only in which file or layout it is."""
    slowest = max(refusals.values(), key=lambda refusal: refusal.seconds)
    hungriest = max(refusals.values(), key=lambda refusal: refusal.grown)
    print(f"{len(refusals)} kinds; slowest {slowest.seconds:.2f} s; most memory {hungriest.grown / 1e6:.0f} MB")
    whole = Counter((refusal.message or "").replace(str(refusal.folder), "") for refusal in refusals.values())
    assert [message for message, times in whole.items() if times > 1] == []
    kinds = {re.sub(r"[\w./-]*\d[\w./-]*|\S+\.(json|safetensors|weight)\S*", "", message) for message in whole}
    assert len(kinds) >= 60


def plant_code(folder: Path) -> None:
    """All that some library would run: modules by the names that a reader imports, remote code, pickles, a template."""
    ran = folder / "PAYLOAD_RAN"
    code = f"open({str(ran)!r}, 'w')\n"
    modules = ("__init__", "json", "torch", "struct", "modeling_x", "configuration_x", "sitecustomize", "usercustomize",
               "encodings", "safetensors", "conftest", "setup", "mistral_nb", "codecs", "stat", "math")  # fmt: skip
    for name in modules:
        (folder / f"{name}.py").write_text(code)
    for name in ("pytorch_model.bin", "consolidated.00.pth", "training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (folder / name).write_bytes(PAYLOAD)
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**9) %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["modeling_x.X", None]}}))


@pytest.mark.parametrize("make", [tiny.hugging_face, tiny.sharded, tiny.mistral], ids=lambda make: make.__name__)
def test_code_in_the_folder_is_never_run(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "checkpoint")
    plant_code(folder)
    if (folder / "config.json").exists():
        auto_map = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
        tiny.change_json(folder / "config.json", auto_map=auto_map)
    (seen,) = watched([folder]).values()
    assert seen.message is None
    assert {Path(what).name for event, what in seen.events if event == "open"} >= {"chat_template.jinja"}
    assert forbidden(seen) == []
    assert not (folder / "PAYLOAD_RAN").exists()


def test_the_watcher_sees_what_is_run(tmp_path: Path) -> None:
    """So that a clean result means something."""
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    (folder / "planted.py").write_text("")
    program = WATCHER.replace(
        "        describe(folder)", "        import planted; import pickle; pickle.loads(b'cos\\ngetcwd\\n.')"
    )
    program = program.replace("ROOT", repr(str(ROOT)), 1)
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    events = {event for event, _ in json.loads(done.stdout)["checkpoint"]["events"]}
    assert events >= {"import", "compile", "exec", "open", "pickle.find_class"}


def test_a_terminal_obeys_nothing_in_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even in the folder's own name, which is the user's."""
    folder = tmp_path / "x\x1b]0;title\x07"
    folder.mkdir()
    assert main(["show", str(folder)]) == 1
    shown = capsys.readouterr().err
    assert "holds no weights" in shown
    assert shown.rstrip("\n").isprintable()
