"""`AI().run(model, inputs)`: the binding of a Cloudflare Worker, for Python and for every backend."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from mistral_nb.answer import Answer, Result
from mistral_nb.asking import read_to_end
from mistral_nb.backends.wire import mended
from mistral_nb.config import load_settings
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import Chunk, GenerationRequest

__all__ = ["AI", "EventStream"]


class AI:
    """`env.AI` of a Worker: `AI().run("@hf/mistral/mistral-7b-instruct-v0.2", {"prompt": "Hi"})["response"]`.

    `backend` is as in `ask`. `model` is who answers, whatever model `run` names: so code that was written for
    Cloudflare runs on another model unchanged. `settings` are those of `config.SETTINGS`, before the environment and
    the file; `ConfigurationError` for a wrong one.
    """

    def __init__(self, backend: str | None = None, model: str | None = None, **settings: Any) -> None:
        self._backend = backend
        self._model = model
        self._settings = load_settings(settings, source="AI")

    def __repr__(self) -> str:
        return f"AI(backend={self._backend!r}, model={self._model!r})"

    def run(self, model: str, inputs: Mapping[str, Any]) -> Any:
        """Ask `model` with the fields of `GenerationRequest`; `stream` is false where the inputs do not say.

        Gives {"response": text, "tool_calls": [{"name", "arguments"}], "usage": {"prompt_tokens", "completion_tokens",
        "total_tokens"}}, the latter two where the peer told them; with `"stream": true` an `EventStream` of the same.
        Raises what `ask` does.
        """
        from mistral_nb.backends import resolve

        if not isinstance(inputs, Mapping):
            raise InvalidRequest("inputs", type(inputs).__name__, 'must be an object such as {"prompt": "Hello"}')
        request = GenerationRequest.from_dict({"stream": False, **inputs})
        answer = Answer(resolve(self._settings, backend=self._backend, model=self._model or model).backend, request)
        if request.stream:
            return EventStream(answer)
        with answer:
            result = read_to_end(answer)
        return {"response": result.text, **_told(result)}


class EventStream:
    """An answer as the bytes of server-sent events, one event each time; the last one is `data: [DONE]`.

    `close()`, which leaving a `with` block calls too, cancels the answer from any thread; there is no `[DONE]` then. A
    failure raises `MistralError`, after the text so far.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._done = False

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> bytes:
        for chunk in self._answer:
            if chunk.text:
                return _event({"response": chunk.text})
            if chunk.finish_reason in ("stop", "length", "tool_calls"):
                self._done = True
                return _event({"response": "", **_told(chunk)})
        if self._done:
            self._done = False
            return b"data: [DONE]\n\n"
        raise StopIteration

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._answer.close()


def _told(end: Chunk | Result) -> dict[str, Any]:
    """The calls and the usage of an answer, where there are any."""
    calls = {"tool_calls": list(end.tool_calls)} if end.tool_calls else {}
    return {**calls, **({"usage": end.usage.to_dict()} if end.usage else {})}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + mended(json.dumps(data, ensure_ascii=False, separators=(",", ":"))).encode() + b"\n\n"
