"""The public names: what they are, that they come late, and what importing them costs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import mistral_nb
from mistral_nb import errors

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = {
    "AI",
    "AdapterError",
    "Answer",
    "AuthenticationError",
    "BackendError",
    "Chat",
    "ChatBusy",
    "ChatError",
    "Choice",
    "Chunk",
    "ConfigurationError",
    "ConnectionFailed",
    "ContextOverflow",
    "Conversation",
    "Description",
    "EngineBusy",
    "EngineCrashed",
    "EngineError",
    "EngineStartError",
    "Function",
    "GenerationRequest",
    "InvalidRequest",
    "Message",
    "MissingDependency",
    "MistralError",
    "ModelError",
    "PullError",
    "RateLimited",
    "RequestTimeout",
    "Result",
    "StreamTruncated",
    "Timings",
    "UnknownModel",
    "Usage",
    "__version__",
    "ask",
    "load_ipython_extension",
    "stream",
    "unload_ipython_extension",
}


def test_the_public_names_are_these() -> None:
    assert sorted(mistral_nb.__all__) == sorted(PUBLIC)
    assert set(dir(mistral_nb)) >= PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(mistral_nb, name)
    assert value is getattr(mistral_nb, name)
    assert name == "__version__" or value.__doc__


def test_every_error_is_public_and_in_the_drawn_tree() -> None:
    assert set(errors.__all__) <= set(mistral_nb.__all__)
    drawn = errors.__doc__ or ""
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.MistralError)
        assert name in drawn


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="xyzzy"):
        _ = mistral_nb.xyzzy
    assert importlib.import_module("mistral_nb.types").GenerationRequest is mistral_nb.GenerationRequest


def test_names_come_when_they_are_used() -> None:
    script = "import sys, mistral_nb\nprint(sorted(name for name in sys.modules if name.startswith('mistral_nb')))"
    assert run(script).strip() == "['mistral_nb']"


@pytest.mark.parametrize(
    "use",
    [
        "AI",
        "GenerationRequest",
        "ask",
        "Result",
        "MistralError",
        "ask.__doc__; from mistral_nb.backends import resolve",
    ],
)
def test_httpx_waits_for_the_first_request(use: str) -> None:
    script = f"import sys, mistral_nb\nmistral_nb.{use}\nprint('\\n'.join(sys.modules))"
    assert not {"httpx", "torch", "IPython", "ipywidgets"} & set(run(script).split())


def test_importing_brings_one_module_of_ours_and_next_to_none_of_others() -> None:
    script = "import sys\nbefore = set(sys.modules)\nimport mistral_nb\nprint(*(set(sys.modules) - before))"
    loaded = set(run(script).split())
    assert {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names == {"mistral_nb"}
    assert len(loaded) <= 10


def run(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
