"""A planted token: sent to its peer, and found nowhere else that a process keeps or shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.backends.workers_ai import WorkersAI
from tests.backends.keeping import Keeper
from tests.backends.scripted import TOKEN, Peer, Step, body, frame, head

Make = Callable[..., WorkersAI]

# Every object and frame of the process is looked through, at the places where "HERE" says; what it prints is
# where the token was found. The token comes on stdin and stays in a Secret alone.
SCAN = r"""
import gc, logging, os, pickle, sys, traceback
from mistral_nb.answer import Answer
from mistral_nb.backends.workers_ai import Timeouts, WorkersAI
from mistral_nb.secret import Secret
from mistral_nb.errors import MistralError
from mistral_nb.types import GenerationRequest

logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
planted = os.read(0, 1000).decode()
back, secret = planted[::-1], Secret(planted)
del planted
limits = Timeouts(60, 60, 60)
backend = WorkersAI(base_url=sys.argv[1], account="0" * 32, token=secret, model="@cf/a/b", timeouts=limits)

def holds(value):
    if isinstance(value, str):
        return back[::-1] in value
    return isinstance(value, (bytes, bytearray)) and back[::-1].encode() in value

def look(place):
    gc.collect()
    for thing in gc.get_objects():
        # Tuples and dicts of plain values are not tracked themselves.
        stack = [] if isinstance(thing, Secret) else [thing]
        while stack:
            holder = stack.pop()
            for value in gc.get_referents(holder):
                if holds(value):
                    print(place, type(holder).__name__, "in", type(thing).__name__)
                elif isinstance(value, (tuple, dict)) and not gc.is_tracked(value):
                    stack.append(value)
    for frame in sys._current_frames().values():
        while frame:
            print(*(f"{place} {name} in {frame.f_code.co_qualname}" for name, value in frame.f_locals.items()
                    if holds(value)), sep="\n", end="")
            frame = frame.f_back

look("before")
answer = Answer(backend, GenerationRequest(prompt="Hello"))
try:
    for chunk in answer:
        look("while")
        if chunk.text == "held":
            answer.close()
except MistralError as error:
    caught = error
    look("failed")
    told = traceback.TracebackException.from_exception(error, capture_locals=True)
    print("".join(told.format()), file=sys.stderr)
    print(vars(error), error.__context__, error.__cause__, file=sys.stderr)
    try:
        pickle.dumps(backend)
    except TypeError as refusal:
        print(refusal, file=sys.stderr)
answer.close()
look("after")
print(repr(backend), answer.result, answer.result.metadata(), file=sys.stderr)
print("looked")
"""


def scan(url: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", SCAN, url]
    return subprocess.run(command, input=TOKEN, env=env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    "script",
    [
        [head(), frame({"response": "a"}), frame({"response": "b"}), frame("[DONE]")],
        [head(), frame({"response": "held"}), "hold"],
        [head(), frame({"response": "a"}), "reset"],
        [head(), frame({"response": "a"}), frame({"error": "no"})],
        ["reset"],
        body({"errors": [{"message": "no", "code": 10000}]}, "401 Unauthorized"),
        [b"HTTP/1.1 banana\r\n\r\n"],
    ],
    ids=["whole", "held", "broken off", "error frame", "reset", "refused", "no HTTP"],
)
def test_no_object_of_the_process_holds_the_token_and_nothing_shows_it(peer: Peer, script: list[Step]) -> None:
    peer.scripts = [script]
    done = scan(peer.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "looked\n"
    assert TOKEN not in done.stderr
    assert "DEBUG:httpcore" in done.stderr
    assert peer.seen[0].headers["authorization"] == f"Bearer {TOKEN}"


def test_a_kept_connection_does_not_hold_it_either() -> None:
    keeper = Keeper()
    done = scan(keeper.url)
    keeper.close()
    assert (done.returncode, done.stdout) == (0, "looked\n"), done.stderr
    assert TOKEN not in done.stderr


def test_the_scan_finds_a_token_that_is_held(peer: Peer) -> None:
    peer.scripts = [[head(), frame("[DONE]")]]
    planted = SCAN.replace("def holds", "kept = [secret.reveal()]\ndef holds")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", planted, peer.url]
    done = subprocess.run(command, input=TOKEN, env=env, capture_output=True, text=True, timeout=240)
    assert "before list in list" in done.stdout


def test_a_notebook_with_a_failing_cell_does_not_hold_it(peer: Peer, tmp_path: Path, monkeypatch: Any) -> None:
    import nbformat
    from nbclient import NotebookClient

    peer.scripts = [body({"errors": [{"message": "no such token", "code": 10000}]}, "401 Unauthorized")]
    monkeypatch.setenv("CLOUDFLARE_ACCOUNT_ID", "0" * 32)
    monkeypatch.setenv("CLOUDFLARE_API_TOKEN", TOKEN)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_BASE_URL", peer.url)
    monkeypatch.setenv("MISTRAL_NB_CLOUDFLARE_TRUST_BASE_URL", "true")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    cells = [
        "%load_ext mistral_nb",
        "%%mistral --backend cloudflare\nHello",
        '%xmode Verbose\nimport mistral_nb\nmistral_nb.ask("Hello", backend="cloudflare")',
        "%mistral status",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=240, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = json.dumps(notebook)
    assert "no such token" in text
    assert "Verbose" in text
    assert peer.seen[0].headers["authorization"] == f"Bearer {TOKEN}"
    assert TOKEN not in text


def test_the_engine_has_no_token_in_its_arguments_or_environment(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mistral_nb import runtime

    record = runtime.read_record(engine.model)
    assert record is not None
    for name in ("cmdline", "environ"):
        path = Path(f"/proc/{record.pid}/{name}")
        if not path.exists():
            pytest.skip("needs /proc")
        assert record.token.encode() not in path.read_bytes()
