"""From a request to pieces of text: tokenizer and engine joined, on the event loop's side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mistral_nb.errors import InvalidRequest
from mistral_nb.server.schemas import WireError
from mistral_nb.types import GenerationRequest, Message, Usage

if TYPE_CHECKING:  # torch takes seconds to import, and the process listens before that
    from mistral_nb.engine import Engine, Generation, Token
    from mistral_nb.engine.tokenizer import Tokenizer

__all__ = ["Answer", "Model", "Piece", "Prompt", "StopScanner"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is given: `text` shows the control tokens as they are written, `ids` are what counts."""

    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of an answer; the last piece has a finish reason, the usage and the calls as [{name, arguments}]."""

    text: str
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None
    usage: Usage | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model: an engine, and the tokenizer of the same checkpoint."""

    engine: Engine
    tokenizer: Tokenizer

    def encode(self, request: GenerationRequest) -> list[int]:
        """The prompt's ids. In `raw`, the contents of `messages` follow each other with nothing in between."""
        if request.raw:
            if request.functions:
                raise InvalidRequest("functions", len(request.functions), "needs the chat template; leave raw out")
            return self.tokenizer.encode_raw(_raw(request))
        return self.tokenizer.encode_chat(_messages(request), request.functions)

    def prompt(self, request: GenerationRequest) -> Prompt:
        """What `request` would give the model, without running it."""
        ids = self.encode(request)
        return Prompt(_raw(request) if request.raw else self.tokenizer.render_chat(_messages(request)), ids)

    async def start(self, request: GenerationRequest) -> Answer:
        """Queue `request`; on the event loop's thread. Raises `InvalidRequest` and `ContextOverflow`."""
        ids = await asyncio.to_thread(self.encode, request)
        answer = Answer(self.tokenizer, request.stop or ())
        answer.run(self.engine, ids, request)
        return answer


def _raw(request: GenerationRequest) -> str:
    return request.prompt or "".join(message.content for message in request.messages or ())


def _messages(request: GenerationRequest) -> Sequence[Message]:
    return request.messages or (Message("user", request.prompt or ""),)


class Answer:
    """One generation under way.

    The engine's thread puts tokens into an unbounded queue, so that a client which reads slowly holds up nobody; its
    length is bounded by `max_tokens`.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokens: asyncio.Queue[Token] = asyncio.Queue()
        self._detokenizer = tokenizer.stream()
        self._scanner = StopScanner(stops)
        self._eos_ids = tokenizer.eos_ids
        self._generation: Generation | None = None
        self._read = 0

    def run(self, engine: Engine, ids: list[int], request: GenerationRequest) -> None:
        from mistral_nb.engine import Sampling

        loop = asyncio.get_running_loop()

        def deliver(token: Token) -> None:
            loop.call_soon_threadsafe(self._tokens.put_nowait, token)

        sampling = Sampling.from_request(request)
        self._generation = engine.submit(ids, sampling, request.max_tokens, self._eos_ids, deliver)

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
        """The answer as it comes, one piece for all that came meanwhile. Raises `WireError` when the engine fails."""
        while True:
            tokens = [await self._tokens.get()]
            while not self._tokens.empty():
                tokens.append(self._tokens.get_nowait())
            text = ""
            for token in tokens:
                text += self._text(token)
                reason = "stop" if self._scanner.hit else token.finish_reason
                if reason == "stop" or reason == "length":
                    self.cancel()
                    yield Piece(text, reason, self._usage)
                    return
                if reason is not None:
                    if text:
                        yield Piece(text)
                    raise WireError(503, 3043, token.error or "the engine is stopping; try again")
            if text:
                yield Piece(text)

    @property
    def _usage(self) -> Usage:
        assert self._generation is not None
        return Usage(self._generation.prompt_tokens, self._read)

    def _text(self, token: Token) -> str:
        text = ""
        if token.id is not None:
            self._read += 1
            text = self._scanner.push(self._detokenizer.push(token.id))
        if token.finish_reason and not self._scanner.hit:
            text += self._scanner.push(self._detokenizer.flush())
            text += self._scanner.flush()
        return text


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
