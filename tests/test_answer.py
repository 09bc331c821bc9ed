"""`ask`, `stream`, and the `Result` that they leave, over a real socket."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mistral_nb
from mistral_nb.answer import Answer, Result, Timings
from mistral_nb.errors import BackendError, InvalidRequest, StreamTruncated
from mistral_nb.types import Chunk, Description, GenerationRequest, Message, Usage
from tests.backends.scripted import PATIENCE, TOKEN, Peer, body, frame, head, interrupt

ROOT = Path(__file__).resolve().parent.parent
HELLO = GenerationRequest(prompt="Hello")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3}
MODEL = "@hf/mistral/mistral-7b-instruct-v0.2"


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    """A peer that the environment names as Cloudflare."""
    peer = Peer()
    for name, value in account(peer).items():
        monkeypatch.setenv(name, value)
    yield peer
    peer.close()


def account(peer: Peer) -> dict[str, str]:
    return {
        "CLOUDFLARE_ACCOUNT_ID": "0123456789abcdef0123456789abcdef",
        "CLOUDFLARE_API_TOKEN": TOKEN,
        "MISTRAL_NB_CLOUDFLARE_BASE_URL": peer.url,
        "MISTRAL_NB_CLOUDFLARE_TRUST_BASE_URL": "1",
    }


def good(*texts: str) -> list[Any]:
    return [head(), *(frame({"response": text}) for text in texts), frame({"usage": USAGE}), frame("[DONE]")]


def test_ask_gives_the_whole_answer_and_who_gave_it(peer: Peer) -> None:
    peer.scripts = [good("Hel", "lo")]
    result = mistral_nb.ask("Hi", temperature=0, seed=None)
    assert str(result) == result.text == "Hello"
    assert (result.backend, result.model, result.device) == ("cloudflare", MODEL, f"127.0.0.1:{peer.port}")
    assert (result.finish_reason, result.usage, result.adapter) == ("stop", Usage(7, 3), None)
    assert result.timings.ttft
    assert 0 < result.timings.ttft <= result.timings.total
    assert result.request == GenerationRequest(prompt="Hi", temperature=0)
    assert peer.seen[0].json["prompt"] == "Hi"


def test_stream_gives_chunks_and_a_result_at_any_time(peer: Peer) -> None:
    more = threading.Event()
    peer.scripts = [[*good("Hel", "lo")[:2], more, *good("lo")[1:]]]
    with mistral_nb.stream("Hi") as answer:
        assert next(answer).text == "Hel"
        assert (answer.result.text, answer.result.finish_reason) == ("Hel", None)
        more.set()
        assert [chunk.text for chunk in answer] == ["lo", ""]
    assert (answer.text, answer.result.finish_reason) == ("Hello", "stop")


@pytest.mark.parametrize(
    ("prompt", "system", "sent"),
    [
        ("Hi", "Be brief.", [("system", "Be brief."), ("user", "Hi")]),
        ([{"role": "user", "content": "Hi"}], None, [("user", "Hi")]),
        ([Message("user", "Hi")], "Be brief.", [("system", "Be brief."), ("user", "Hi")]),
        (
            ({"role": "user", "content": "a"}, Message("assistant", "b"), {"role": "user", "content": "c"}),
            None,
            [("user", "a"), ("assistant", "b"), ("user", "c")],
        ),
    ],
)
def test_a_conversation_and_a_system_text(peer: Peer, prompt: Any, system: str | None, sent: Any) -> None:
    peer.scripts = [good("Hi")]
    mistral_nb.ask(prompt, system=system)
    assert peer.seen[0].json["messages"] == [{"role": role, "content": content} for role, content in sent]
    assert "prompt" not in peer.seen[0].json


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": " ", "system": "Be brief."}, "empty"),
        ({"prompt": []}, "at least one"),
        ({"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}]}, "^messages = .*exactly one"),
        ({"prompt": "Hi", "messages": []}, "^messages = .*exactly one"),
        ({"prompt": [Message("user", "a")], "messages": [Message("user", "b")]}, "^messages = .*exactly one"),
        ({"prompt": 5}, "^prompt = 5: must be a text, or a conversation"),
        ({"prompt": None}, "^prompt = None: must be a text"),
        ({"prompt": {"role": "user", "content": "Hi"}}, "^prompt = .*must be a text"),
        ({"prompt": "Hi", "temprature": 1}, "did you mean 'temperature'"),
        ({"prompt": "Hi", "temperature": 9}, "0 to 5"),
        ({"prompt": "Hi", "stop": "x"}, "--backend local"),
    ],
)
def test_a_wrong_question_is_refused_before_anything_is_sent(peer: Peer, arguments: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        mistral_nb.ask(**arguments)
    assert not peer.accepted.is_set()


def test_an_error_carries_what_was_answered_before(peer: Peer) -> None:
    peer.scripts = [[head(), frame({"response": "Hel"})]]
    with pytest.raises(StreamTruncated) as caught:
        mistral_nb.ask("Hi")
    assert caught.value.result
    assert (caught.value.result.text, caught.value.result.finish_reason) == ("Hel", "truncated")


def test_an_error_before_any_text_carries_an_empty_result(peer: Peer) -> None:
    peer.scripts = [body({"errors": [{"message": "no", "code": 1}]}, "400 Bad Request")]
    with pytest.raises(BackendError) as caught:
        mistral_nb.ask("Hi")
    assert caught.value.result
    assert (caught.value.result.text, caught.value.result.finish_reason) == ("", "error")


def test_an_interrupt_cancels_and_carries_the_partial_answer(peer: Peer) -> None:
    def pace() -> None:
        peer.gone.wait(0.01)

    peer.scripts = [[head(), *[frame({"response": "drip "}), pace] * 50, interrupt, "hold"]]
    with pytest.raises(KeyboardInterrupt) as caught:
        mistral_nb.ask("Hi")
    result = caught.value.result  # type: ignore[attr-defined]
    assert result.text.startswith("drip ")
    assert result.finish_reason == "cancelled"
    assert peer.gone.wait(PATIENCE)


def test_closing_keeps_the_text_and_says_cancelled(peer: Peer) -> None:
    peer.scripts = [[head(), frame({"response": "Hel"}), "hold"]]
    answer = mistral_nb.stream("Hi")
    assert next(answer).text == "Hel"
    answer.close()
    assert (answer.result.text, answer.result.finish_reason) == ("Hel", "cancelled")
    assert peer.gone.wait(PATIENCE)
    assert [chunk.finish_reason for chunk in answer] == ["cancelled"]


def test_leaving_the_block_early_cancels(peer: Peer) -> None:
    peer.scripts = [[head(), "drip"]]
    with mistral_nb.stream("Hi") as answer:
        next(answer)
    assert peer.gone.wait(PATIENCE)
    assert answer.result.finish_reason == "cancelled"


def test_the_model_that_answered_is_the_one_that_the_peer_names(peer: Peer) -> None:
    peer.scripts = [[head("200 OK", "text/event-stream", "x-mistral-nb-model: stand-in"), *good("Hi")[1:]]]
    answer = mistral_nb.stream("Hi", lora="mine")
    assert [chunk.model for chunk in answer] == ["stand-in", "stand-in"]
    assert (answer.result.model, answer.result.adapter) == ("stand-in", "mine")
    assert answer.result.served_by.stand_in_for == MODEL


def test_without_ipython(peer: Peer) -> None:
    peer.scripts = [good("Hello")]
    script = (
        "import sys\nsys.modules['IPython'] = sys.modules['ipywidgets'] = None\n"
        "import mistral_nb\nprint(mistral_nb.ask('Hi'))\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "Hello\nFalse\n"


def made(text: str = "Hello", **changes: Any) -> Result:
    values: dict[str, Any] = {
        "request": HELLO.with_(seed=5),
        "served_by": Description("local", "SmolLM2 135M", "CPU, int8", "Mistral-7B-Instruct"),
        "finish_reason": "stop",
        "usage": Usage(7, 61),
        "timings": Timings(0.2, 1.2, 60.04),
    }
    return Result(text, **{**values, **changes})


def test_the_footer_is_one_line_of_what_is_known() -> None:
    assert made().footer == (
        "SmolLM2 135M (stand-in for Mistral-7B-Instruct) · local on CPU, int8 · 61 tokens · first token 200 ms · "
        "60 tokens/s · stop"
    )
    served = Description("cloudflare", "@cf/m", adapter="mine")
    bare = made(served_by=served, usage=None, timings=Timings(None, 1.0, None), finish_reason=None)
    assert bare.footer == "@cf/m · adapter mine · cloudflare · 1.0 s in all"
    assert made(timings=Timings(None, 0.0, None)).footer.endswith("61 tokens · stop")
    assert "1 token ·" in made(usage=Usage(1, 1)).footer
    assert "first token 2.5 s" in made(timings=Timings(2.5, 3.0, None)).footer


def test_a_result_shows_itself() -> None:
    result = made("# Title\n\nIt is **so**.")
    data, metadata = result._repr_mimebundle_()
    assert data["text/markdown"].startswith("# Title\n\nIt is **so**.\n\n<small>SmolLM2")
    assert data["text/plain"] == f"# Title\n\nIt is **so**.\n\n{result.footer}"
    assert metadata == {"mistral_nb": result.metadata()}
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["mistral_nb"]["stand_in_for"] == "Mistral-7B-Instruct"
    assert metadata["mistral_nb"]["seed"] == 5
    assert metadata["mistral_nb"]["usage"] == {"prompt_tokens": 7, "completion_tokens": 61, "total_tokens": 68}
    assert set(result._repr_mimebundle_(include=["text/plain"])[0]) == {"text/plain"}
    assert set(result._repr_mimebundle_(exclude=["text/plain"])[0]) == {"text/markdown"}


def test_what_a_result_shows_is_never_empty_and_never_acts() -> None:
    assert made("")._repr_markdown_().startswith("<small>SmolLM2")
    assert "<script>" not in made("<script>alert(1)</script>")._repr_markdown_()
    named = made(served_by=Description("local", "<b>x</b>"))
    assert "<b>" not in named._repr_markdown_()
    half = made("```python\nprint(1)")._repr_markdown_()
    assert half.index("```python") < half.rindex("```") < half.index("<small>")


def test_the_plain_repr_is_short() -> None:
    assert repr(made()).startswith("<Result 'Hello' · SmolLM2 135M")
    assert len(repr(made("x" * 10_000))) < 300


def test_code_and_json() -> None:
    text = 'Here:\n```python\nprint(1)\n```\nand\n~~~json\n{"a": [1]}\n~~~\n'
    assert made(text).code == ["print(1)\n", '{"a": [1]}\n']
    assert made(text).json == {"a": [1]}
    assert made("[1, 2]").json == [1, 2]
    assert made("none").code == []
    with pytest.raises(ValueError, match="no JSON"):
        _ = made("none").json


def test_speed_counts_what_comes_after_the_first_token(peer: Peer) -> None:
    peer.scripts = [good("a", "b", "c")]
    timings = mistral_nb.ask("Hi").timings
    assert timings.ttft
    assert timings.tokens_per_second == pytest.approx(2 / (timings.total - timings.ttft))


@pytest.mark.parametrize(
    "script", [good("a b c"), body({"result": {"response": "a b c", "usage": USAGE}, "success": True})]
)
def test_an_answer_in_one_piece_has_no_speed(peer: Peer, script: Any) -> None:
    """Nobody saw when its first token was there."""
    peer.scripts = [script]
    result = mistral_nb.ask("Hi", stream=len(script) > 1)
    assert (result.timings.ttft, result.timings.tokens_per_second) == (None, None)
    assert result.timings.total > 0
    assert "first token" not in result.footer
    assert "tokens/s" not in result.footer
    assert "in all" in result.footer


def test_a_status_is_no_text(peer: Peer) -> None:
    answer = Answer(Statuses(), HELLO)
    assert [str(chunk) for chunk in answer] == ["", "Hi", ""]
    assert answer.text == "Hi"


class Statuses:
    """A backend whose chunks are given: the smallest that there can be."""

    name = "given"

    def stream(self, request: GenerationRequest) -> Any:
        return iter([Chunk(status="Loading"), Chunk(text="Hi"), Chunk(finish_reason="stop")])

    def describe(self) -> Description:
        return Description("given", "none")


@pytest.mark.parametrize(("scale", "told"), [(None, "mine"), (1, "mine"), (0, "mine at 0"), (0.25, "mine at 0.25")])
def test_the_footer_tells_an_adapters_scale(scale: float | None, told: str) -> None:
    request = GenerationRequest(prompt="Hi", lora="mine", lora_scale=scale)
    result = Result("", request, Description("local", "m", adapter="mine"), "stop", None, Timings(None, 1.0, None))
    assert f" · adapter {told} · " in result.footer
    assert result.metadata()["lora_scale"] == scale
