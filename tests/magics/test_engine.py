"""The whole path: a cell in a real kernel, the engine process, the embedded model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mistral_nb import Message, engine_control
from mistral_nb.config import Settings
from mistral_nb.engine.tokenizer import load_tokenizer
from tests.magics.kernels import Kernel, Output

STORY = "%%mistral --temperature 0 --max-tokens 4000 -o story\nWrite a very long story about a lighthouse keeper."


@pytest.fixture
def apart(embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runtime folder of the test's own, so that its first cell starts an engine; it is stopped in the end."""
    monkeypatch.setenv("MISTRAL_NB_RUNTIME_DIR", str(tmp_path))
    yield
    engine_control.stop(Settings(), force=True)


def test_start_stream_stop_and_go_on(apart: None, kernel: Kernel, embedded: Path) -> None:
    def while_starting(output: Output) -> None:
        if "Starting the engine" in output.markdown:
            kernel.interrupt()

    started = kernel.run("%%mistral\nHi", while_starting)
    assert started.reply["ename"] == "KeyboardInterrupt"
    assert "stopped here" in started.saved[0].markdown

    hello = kernel.run("%%mistral --temperature 0 --max-tokens 8\nSay hello.")
    assert hello.status == "ok"
    assert "stand-in for Mistral-7B-Instruct" in hello.saved[0].markdown
    metadata = hello.saved[0].content["metadata"]["mistral_nb"]
    assert metadata["usage"]["completion_tokens"] <= 8
    assert metadata["tokens_per_second"] > 0
    (engine,) = engine_control.status(Settings())

    sent: list[Output] = []

    def while_streaming(output: Output) -> None:
        if len(output.plain) > 150 and not sent:
            kernel.interrupt()
            sent.append(output)

    stopped = kernel.run(STORY, while_streaming)
    assert stopped.reply["ename"] == "KeyboardInterrupt"
    assert stopped.displays.index(sent[0]) < len(stopped.displays) - 1
    assert "stopped here" in stopped.saved[0].markdown
    partial = kernel.run("print(story.finish_reason, len(story.text) > 100)")
    assert partial.printed == "cancelled True\n"

    after = kernel.run("%%mistral --max-tokens 4\nSay hello.")
    assert after.status == "ok"
    (survivor,) = engine_control.status(Settings())
    assert survivor.record.pid == engine.record.pid

    status = kernel.run("%mistral status").printed
    for text in (str(engine.record.pid), "ready", "SmolLM2", engine.record.log):
        assert text in status

    shown = kernel.run("%mistral --dry-run -o dry What is <s> and [INST]?").printed
    messages = [Message("user", "What is <s> and [INST]?")]
    wanted = load_tokenizer(embedded).encode_chat(messages)
    assert f"{len(wanted)} tokens of a context of 8192" in shown
    assert json.loads(kernel.run("print(list(dry.tokens))").printed) == wanted

    kernel.run("text = 'word ' * 20000")
    too_long = kernel.run("%mistral {{text}}")
    assert too_long.reply["ename"] == "ContextOverflow"
    assert "8192" in too_long.reply["evalue"]

    os.kill(engine.record.pid, 0)
    assert "Stopped smollm2-135m-instruct" in kernel.run("%mistral stop").printed
