"""From a request to pieces of text: tokenizer and engine joined, on the event loop's side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mistral_nb.errors import AdapterError, InvalidRequest
from mistral_nb.server.adapters import Named
from mistral_nb.server.calls import CallScanner
from mistral_nb.server.schemas import WireError, wire_error
from mistral_nb.types import GenerationRequest, Message, Usage

if TYPE_CHECKING:  # torch takes seconds to import, and the process listens before that
    from mistral_nb.engine import AdapterSource, Constraint, Engine, Generation, Token
    from mistral_nb.engine.tokenizer import Tokenizer

__all__ = ["Answer", "Model", "Piece", "Prompt", "StopScanner"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given: `text` shows the control tokens as they are written, `ids` are what counts."""

    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer.

    The last piece has a finish reason, the usage, the calls as [{name, arguments}], the adapter that was applied by the
    name that the request has for it, and how many tokens of the prompt were kept from before (`reused`).
    """

    text: str
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    usage: Usage | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    adapter: str | None = None
    reused: int = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: an engine, and the tokenizer of the same checkpoint."""

    engine: Engine
    tokenizer: Tokenizer

    def encode(self, request: GenerationRequest, choice: str = "auto") -> list[int]:
        """The prompt's ids. `choice` is for functions, as in `start`.

        In `raw`, the contents of `messages` follow each other with nothing in between.
        """
        if request.raw:
            if request.functions:
                raise InvalidRequest("functions", len(request.functions), "needs the chat template; leave raw out")
            return self.tokenizer.encode_raw(_raw(request))
        return self.tokenizer.encode_chat(_messages(request), request.functions, choice)

    def prompt(self, request: GenerationRequest, choice: str = "auto") -> Prompt:
        """What `request` would give the model, without running it."""
        ids = self.encode(request, choice)
        if request.raw:
            return Prompt(_raw(request), ids)
        return Prompt(self.tokenizer.render_chat(_messages(request), request.functions, choice), ids)

    def fits(self, adapter: Named) -> bool:
        """Whether the model takes an adapter, as far as its files' sizes tell."""
        try:
            self.engine.check_adapter(_source(adapter))
        except AdapterError:
            return False
        return True

    async def start(
        self, request: GenerationRequest, choice: str = "auto", *, single: bool = False, adapter: Named | None = None
    ) -> Answer:
        """Queue `request`, whose adapter `adapter` is; on the event loop's thread.

        `choice` says what to do with the request's functions: `auto` leaves it to the model, `required` takes calls
        only, a function's name one call of it, and `none` offers none; with `single` there is one call at most. Raises
        `InvalidRequest`, `ContextOverflow`, `AdapterError` for an adapter that the model does not take, and
        `MissingDependency` where functions need a package that is not there.
        """
        ids, constraint = await asyncio.to_thread(self._prepare, request, choice, single, adapter)
        answer = Answer(self.tokenizer, request.stop or (), functions=constraint is not None, adapter=adapter)
        answer.run(self.engine, ids, request, constraint)
        return answer

    def _prepare(
        self, request: GenerationRequest, choice: str, single: bool, adapter: Named | None
    ) -> tuple[list[int], Constraint | None]:
        if adapter is not None:
            self.engine.check_adapter(_source(adapter))
        ids = self.encode(request, choice)
        if request.raw:
            return ids, None
        return ids, self.tokenizer.constraint(request.functions, choice, self.engine.info.vocab_size, single=single)


def _source(adapter: Named) -> AdapterSource:
    from mistral_nb.engine import AdapterSource

    return AdapterSource(adapter.key, adapter.folder, adapter.looks)


def _raw(request: GenerationRequest) -> str:
    return request.prompt or "".join(message.content for message in request.messages or ())


def _messages(request: GenerationRequest) -> Sequence[Message]:
    return request.messages or (Message("user", request.prompt or ""),)


class Answer:
    """One generation under way.

    The engine's thread puts tokens into an unbounded queue, so that a client which reads slowly holds up nobody; its
    length is bounded by `max_tokens`. With `functions`, calls are taken out of the text; `stops` end free text only.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], *, functions: bool = False, adapter: Named | None = None
    ) -> None:
        self._adapter = adapter
        self._tokens: asyncio.Queue[Token] = asyncio.Queue()
        self._detokenizer = tokenizer.stream()
        self._scanner = StopScanner(stops)
        self._call_scanner = CallScanner() if functions else None
        self._calls: tuple[dict[str, Any], ...] = ()
        self._eos_ids = tokenizer.eos_ids
        self._generation: Generation | None = None
        self._read = 0
        self.finish_reason: str | None = None
        self.first_token_at: float | None = None
        """When the engine had the first token, by the monotonic clock."""

    def run(
        self, engine: Engine, ids: list[int], request: GenerationRequest, constraint: Constraint | None = None
    ) -> None:
        from mistral_nb.engine import Sampling

        loop = asyncio.get_running_loop()

        def deliver(token: Token) -> None:
            self.first_token_at = self.first_token_at or time.monotonic()
            loop.call_soon_threadsafe(self._tokens.put_nowait, token)

        self._generation = engine.submit(
            ids,
            Sampling.from_request(request),
            request.max_tokens,
            self._eos_ids,
            deliver,
            constraint,
            adapter=_source(self._adapter) if self._adapter else None,
            lora_scale=1.0 if request.lora_scale is None else request.lora_scale,
        )

    @property
    def adapter(self) -> str | None:
        """The adapter that is applied, as the request has it."""
        return self._adapter.name if self._adapter else None

    @property
    def prompt_tokens(self) -> int:
        return self._generation.prompt_tokens if self._generation else 0

    @property
    def reused(self) -> int:
        """Tokens of the prompt whose keys and values were there already."""
        return self._generation.reused if self._generation else 0

    @property
    def generated(self) -> int:
        """Tokens that the engine has computed, passed on or not."""
        return self._generation.completion_tokens if self._generation else 0

    @property
    def sent(self) -> int:
        """Tokens that were passed on."""
        return self._read

    async def settled(self) -> None:
        """Wait until the engine is done with it, which it is a token after `cancel`. For when nobody reads any more."""
        while self._generation is not None and self._generation.finish_reason is None:
            await self._tokens.get()

    def cancel(self) -> None:
        """Stop before the next token."""
        if self._generation is not None:
            self._generation.cancel()

    def abort(self, message: str) -> None:
        """Stop before the next token, and let the reader know why."""
        from mistral_nb.engine import Token

        self.cancel()
        self._tokens.put_nowait(Token(None, "error", message))

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer as it comes, one piece for all that came meanwhile.

        Raises `WireError` when the engine fails, or the adapter cannot be applied.
        """
        while True:
            tokens = [await self._tokens.get()]
            while not self._tokens.empty():
                tokens.append(self._tokens.get_nowait())
            text = ""
            for token in tokens:
                text += self._text(token)
                reason = "stop" if self._scanner.hit else token.finish_reason
                if reason == "stop" or reason == "length":
                    self.finish_reason = end = "tool_calls" if self._calls else reason
                    self.cancel()
                    yield Piece(text, end, self._usage, self._calls, self.adapter, self.reused)
                    return
                if reason is not None:
                    if text:
                        yield Piece(text)
                    raise self._failure(token)
            if text:
                yield Piece(text)

    def _failure(self, last: Token) -> WireError:
        refusal = self._generation.refusal if self._generation else None
        if refusal is not None and self._adapter is not None:
            return wire_error(self._adapter.refused(refusal))
        return WireError(503, 3043, last.error or "the engine is stopping; try again")

    @property
    def _usage(self) -> Usage:
        assert self._generation is not None
        return Usage(self._generation.prompt_tokens, self._read)

    def _text(self, token: Token) -> str:
        text = ""
        if token.id is not None:
            self._read += 1
            text = self._free_text(self._detokenizer.push(token.id))
        if token.finish_reason and not self._scanner.hit:
            text += self._free_text(self._detokenizer.flush())
            if self._call_scanner is not None:
                held, self._calls = self._call_scanner.finish()
                text += self._scanner.push(held)
            text += self._scanner.flush()
        return text

    def _free_text(self, text: str) -> str:
        return self._scanner.push(text if self._call_scanner is None else self._call_scanner.push(text))


class StopScanner:
    """Passes text through up to the first stop text, holding back an end that may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop text. Sets `hit` once a stop text has come."""
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.hit = True
            self._held = ""
            return held[: min(found)]
        keep = self._undecided(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The rest, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that some stop text starts with."""
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(tuple(s[:n] for s in self._stops))), 0)
