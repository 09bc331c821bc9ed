"""An answer being read, and the `Result` that it leaves behind."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mistral_nb.config import FALLBACK_MODEL
from mistral_nb.errors import MistralError
from mistral_nb.types import Chunk, Description, FinishReason, GenerationRequest, Usage

if TYPE_CHECKING:
    from mistral_nb.backends.base import Backend
    from mistral_nb.calling import CallRecord

__all__ = ["Answer", "Result", "Timings"]

# What Cloudflare calls the one checkpoint of Mistral-7B-Instruct v0.2 that it has.
SAME_WEIGHTS = frozenset({"@hf/mistral/mistral-7b-instruct-v0.2", FALLBACK_MODEL})
_FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})[^\n]*\n(?P<code>.*?)^(?P=fence)[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from asking to the first text (`ttft`) and to the end; tokens per second after the first.

    `ttft` and the speed are None where the text came in one piece: when its first token was there, nobody saw.
    """

    ttft: float | None
    total: float
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """What a cell leaves behind: the text, what it cost, and who answered. Shows itself as Markdown with a footer.

    `tool_calls` are the calls that the model asks for, {name, arguments}; `calls` those that were run on the way.
    """

    text: str
    request: GenerationRequest
    served_by: Description
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings = field(default_factory=lambda: Timings(None, 0.0, None))
    tool_calls: tuple[dict[str, Any], ...] = ()
    calls: tuple[CallRecord, ...] = ()
    neurons: float | None = None
    request_id: str | None = None

    @property
    def backend(self) -> str:
        return self.served_by.backend

    @property
    def model(self) -> str:
        return self.served_by.model

    @property
    def adapter(self) -> str | None:
        return self.served_by.adapter

    @property
    def device(self) -> str:
        return self.served_by.device

    @property
    def code(self) -> list[str]:
        """The fenced code blocks of the text, in order, without their fences."""
        return [match["code"] for match in _FENCE.finditer(self.text)]

    @property
    def json(self) -> Any:
        """The text, or its first code block that parses, as JSON. Raises `ValueError` when nothing parses."""
        for candidate in (self.text, *self.code):
            try:
                return json.loads(candidate)
            except ValueError:
                continue
        raise ValueError("the answer holds no JSON: ask for JSON in the prompt, or lower the temperature")

    @property
    def calls_as_json(self) -> str:
        """The calls that the model asks for, as text that is safe to show; empty where there are none."""
        from mistral_nb.safe_markdown import plain_text

        if not self.tool_calls:
            return ""
        try:
            text = json.dumps(self.tool_calls, indent=2, ensure_ascii=False)
        except RecursionError:
            return "(calls that are nested too deeply to be shown)"
        return plain_text(text.encode("utf-8", "replace").decode())

    @property
    def footer(self) -> str:
        """Who answered and how fast, in one line: what is not known is left out."""
        served, timings = self.served_by, self.timings
        parts = [
            f"{served.model}{_relation(served)}",
            f"adapter {served.adapter}{_scale(self.request.lora_scale)}" if served.adapter else "",
            f"{served.backend} on {served.device}" if served.device else served.backend,
            _count(self.usage.completion_tokens) if self.usage else "",
            f"first token {_seconds(timings.ttft)}" if timings.ttft is not None else _in_all(timings.total),
            f"{timings.tokens_per_second:.3g} tokens/s" if timings.tokens_per_second is not None else "",
            self.finish_reason or "",
        ]
        return " · ".join(part for part in parts if part)

    def metadata(self) -> dict[str, Any]:
        """What answered and how fast, as plain JSON: for an output's metadata and for logs."""
        return {
            "backend": self.backend,
            "model": self.model,
            "stand_in_for": self.served_by.stand_in_for or None,
            "instead_of": self.served_by.instead_of or None,
            "device": self.device,
            "adapter": self.adapter,
            "lora_scale": self.request.lora_scale,
            "seed": self.request.seed,
            "finish_reason": self.finish_reason,
            "usage": self.usage.to_dict() if self.usage else None,
            "ttft_s": self.timings.ttft,
            "total_s": self.timings.total,
            "tokens_per_second": self.timings.tokens_per_second,
            "neurons": self.neurons,
            "request_id": self.request_id,
        }

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        start = self.text if len(self.text) <= 60 else f"{self.text[:57]}..."
        return f"<Result {start!r} · {self.footer}>"

    def _repr_markdown_(self) -> str:
        from mistral_nb.safe_markdown import fenced, literal, safe_markdown

        run, asked = self._calls_run(), self.calls_as_json
        text = safe_markdown(self.text) if self.text.strip() else ""
        footer = f"<small>{literal(self.footer)}</small>"
        parts = (run and fenced(run, "text"), text, asked and fenced(asked, "json"), footer)
        return "\n\n".join(part for part in parts if part)

    def _calls_run(self) -> str:
        from mistral_nb.safe_markdown import plain_text

        return "\n".join(plain_text(str(call)) for call in self.calls)

    def _repr_mimebundle_(
        self, include: Iterable[str] | None = None, exclude: Iterable[str] | None = None
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """Markdown and plain text for a front end, and the metadata under `mistral_nb`."""
        plain = "\n\n".join(part for part in (self._calls_run(), self.text, self.calls_as_json, self.footer) if part)
        data = {"text/markdown": self._repr_markdown_(), "text/plain": plain}
        wanted = set(data) if include is None else set(include)
        kept = {kind: text for kind, text in data.items() if kind in wanted - set(exclude or ())}
        return kept, {"mistral_nb": self.metadata()}


class Answer:
    """Reads one generation: iterate for chunks, look at `result` at any time, `close()` from any thread to cancel.

    A `MistralError` that the iteration raises carries the partial `result`. As a context manager it closes at the end.
    """

    def __init__(self, backend: Backend, request: GenerationRequest) -> None:
        self._backend = backend
        self._request = request
        self._parts: list[str] = []
        self._last = Chunk()
        self._model: str | None = None
        self._instead_of: str | None = None
        self._request_id: str | None = None
        self._started = time.perf_counter()
        self._first: float | None = None
        self._ended: float | None = None
        self._stream = backend.stream(request)

    def __iter__(self) -> Answer:
        return self

    def __next__(self) -> Chunk:
        try:
            chunk = next(self._stream)
        except MistralError as error:
            self._end("error")
            error.result = self.result
            raise
        if chunk.text:
            self._first = self._first or time.perf_counter()
            self._parts.append(chunk.text)
        self._model = chunk.model or self._model
        self._instead_of = chunk.instead_of or self._instead_of
        self._request_id = chunk.request_id or self._request_id
        if chunk.finish_reason:
            self._last = chunk
            self._end(chunk.finish_reason)
        return chunk

    def __enter__(self) -> Answer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is still to come; what has arrived can still be read, and the text so far stays."""
        self._stream.close()
        self._end("cancelled")

    def _end(self, reason: FinishReason) -> None:
        """The first reason that is given stays, and so does its time."""
        if self._ended is None:
            self._ended = time.perf_counter()
            self._last = replace(self._last, finish_reason=reason)

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def result(self) -> Result:
        """What is there so far; complete once the iteration has ended."""
        return Result(
            text=self.text,
            request=self._request,
            served_by=self._served_by(),
            finish_reason=self._last.finish_reason,
            usage=self._last.usage,
            timings=self._timings(self._last.usage),
            tool_calls=self._last.tool_calls,
            neurons=self._last.neurons,
            request_id=self._request_id,
        )

    def _served_by(self) -> Description:
        """A peer that names another model than was asked has a stand-in for it, if it has not withdrawn it."""
        asked = self._backend.describe()
        model = self._model or asked.model
        if self._instead_of:
            return replace(asked, model=model, instead_of=self._instead_of, adapter=self._request.lora)
        stands_in = asked.stand_in_for if model == asked.model else asked.stand_in_for or asked.model
        return replace(asked, model=model, stand_in_for=stands_in, adapter=self._request.lora)

    def _timings(self, usage: Usage | None) -> Timings:
        """Decoding speed counts the tokens after the first over the time after the first."""
        ended = self._ended or time.perf_counter()
        if self._first is None or len(self._parts) < 2:
            return Timings(None, ended - self._started, None)
        ttft = self._first - self._started
        rate = None
        if usage and usage.completion_tokens > 1 and ended > self._first:
            rate = (usage.completion_tokens - 1) / (ended - self._first)
        return Timings(ttft, ended - self._started, rate)


def _relation(served: Description) -> str:
    """What the model that answered has to do with the one that was asked for; empty where it is the same."""
    if served.instead_of:
        same = ": the same weights" if {served.model, served.instead_of} <= SAME_WEIGHTS else ""
        return f" (in place of {served.instead_of}, which {served.backend.capitalize()} has withdrawn{same})"
    return f" (stand-in for {served.stand_in_for})" if served.stand_in_for else ""


def _scale(scale: float | None) -> str:
    return "" if scale in (None, 1) else f" at {scale:g}"


def _count(tokens: int) -> str:
    return f"{tokens} token" if tokens == 1 else f"{tokens} tokens"


def _in_all(total: float) -> str:
    return f"{_seconds(total)} in all" if total else ""


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
