"""The client of `mistral-nb bench serve`: requests sent at their moments over HTTP, and when each piece of text came.

One thread and one event loop for all, so that many answers cost the machine little beside the engine that it measures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
from httpx_sse import EventSource

from mistral_nb.backends.adapter_paths import refuse_path, with_whole_path
from mistral_nb.backends.wire import DONE, PeerFailure, Reading, peer_failure
from mistral_nb.bench_workload import Ask, Load
from mistral_nb.engine_control import encode_json
from mistral_nb.errors import BackendError, ConnectionFailed
from mistral_nb.foreign import plain
from mistral_nb.runtime import PROOF_HEADER, is_loopback
from mistral_nb.secret import Secret
from mistral_nb.types import GenerationRequest, Usage

__all__ = ["Outcome", "Run", "Target", "measure"]

_CONNECT = 10.0
_TELL = 5.0
_REUSED = "cached_tokens"


@dataclass(frozen=True, slots=True)
class Target:
    """An engine at an address; `timeout` is in seconds, for a whole answer. The `proof` of its record lets requests
    name an adapter's folder.
    """

    base_url: str
    token: Secret
    timeout: float = 300.0
    proof: Secret | None = None

    def options(self) -> dict[str, Any]:
        """Of an httpx client."""
        proof = {PROOF_HEADER: self.proof.reveal()} if self.proof else {}
        return {
            "base_url": self.base_url,
            "headers": {"Authorization": f"Bearer {self.token.reveal()}", "Accept-Encoding": "identity", **proof},
            "timeout": httpx.Timeout(self.timeout, connect=_CONNECT),
            "trust_env": not is_loopback(urlsplit(self.base_url).hostname or ""),
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=None),
        }

    def health(self) -> dict[str, Any]:
        """What `/engine/health` says. `MistralError` where nobody does."""
        return self._call("GET", "/engine/health")

    def count(self, text: str) -> int:
        """Tokens of a raw prompt."""
        body = GenerationRequest(prompt=text, raw=True).to_dict()
        return int(self._call("POST", "/engine/tokenize", body)["count"])

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        content = None if body is None else encode_json(body)
        told: BackendError
        try:
            with httpx.Client(**self.options()) as client:
                answer = client.request(method, path, content=content)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            told = ConnectionFailed(f"nobody answers at {self.base_url} ({plain(str(error))}). Is an engine there?")
        else:
            if answer.status_code == 200:
                found: dict[str, Any] = answer.json()
                return found
            told = BackendError(
                f"{self.base_url} answered {_refusal(answer)[1]} (HTTP {answer.status_code}): is it an engine of "
                "mistral-nb, and MISTRAL_NB_SERVER_TOKEN its token?",
                status=answer.status_code,
            )
        raise told


@dataclass(slots=True)
class Outcome:
    """What became of a request. Moments are in seconds after the beginning of the run: when it was to be sent (`due`),
    when it was, when pieces of text came, and when all was over. `error` is its kind, empty for a whole answer;
    `reused` are the tokens of its prompt that the engine had from before, None where it does not tell.
    """

    ask: Ask
    due: float
    sent: float
    texts: list[float] = field(default_factory=list)
    ended: float = 0.0
    usage: Usage | None = None
    error: str = ""
    message: str = ""
    reused: int | None = None

    @property
    def tokens(self) -> int:
        """Of the answer."""
        return self.usage.completion_tokens if self.usage else 0

    @property
    def first(self) -> float | None:
        """TTFT: from the moment that it was due to its first text; a client that is late counts against the engine."""
        return self.texts[0] - self.due if self.texts else None

    @property
    def gaps(self) -> list[float]:
        """ITL: between one piece of text and the next. A token that completes no character brings none."""
        return [after - before for before, after in itertools.pairwise(self.texts)]

    @property
    def per_token(self) -> float | None:
        """TPOT: the mean time of a token after the first."""
        return (self.texts[-1] - self.texts[0]) / (self.tokens - 1) if self.texts and self.tokens > 1 else None

    @property
    def whole(self) -> float:
        """End to end."""
        return self.ended - self.due


@dataclass(frozen=True, slots=True)
class Run:
    """One load's outcomes, in seconds by the clock from its beginning to its last answer, and in processor's seconds
    that the client took.
    """

    load: Load
    outcomes: list[Outcome]
    seconds: float
    client_cpu: float


def measure(
    target: Target,
    model: str,
    load: Load,
    asks: Iterator[Ask],
    text: Callable[[Ask], str],
    seconds: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Run:
    """Send `asks` as `load` says, none after `seconds`, and wait for every answer. `text` makes a request's prompt.

    A request that fails is an outcome too; nothing is asked twice.
    """
    return asyncio.run(_Client(target, model, load, text, seconds).run(asks, tell))


class _Client:
    def __init__(
        self, target: Target, model: str, load: Load, text: Callable[[Ask], str], seconds: float | None
    ) -> None:
        self._target = target
        self._path = f"/client/v4/accounts/local/ai/run/{quote(model, safe='/@')}"
        self._load = load
        self._text = text
        self._seconds = seconds
        self._outcomes: list[Outcome] = []
        self._began = 0.0

    async def run(self, asks: Iterator[Ask], tell: Callable[[str], None]) -> Run:
        async with httpx.AsyncClient(**self._target.options()) as client:
            self._began, cpu = time.perf_counter(), time.process_time()
            watch = asyncio.create_task(self._watch(tell))
            try:
                await (self._at_rate(client, asks) if self._load.rate is not None else self._in_turn(client, asks))
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None
            finally:
                watch.cancel()
            return Run(self._load, self._outcomes, self._now(), time.process_time() - cpu)

    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def _watch(self, tell: Callable[[str], None]) -> None:
        while True:
            await asyncio.sleep(_TELL)
            over = sum(outcome.ended > 0 for outcome in self._outcomes)
            tell(f"{self._load}: {over} answered, {len(self._outcomes) - over} under way")

    async def _at_rate(self, client: httpx.AsyncClient, asks: Iterator[Ask]) -> None:
        """Each at its moment, whatever became of those before it."""
        async with asyncio.TaskGroup() as group:
            for ask in asks:
                body = self._body(ask)
                await asyncio.sleep(max(0.0, ask.at - self._now()))
                group.create_task(self._answer(client, ask, body, ask.at))

    async def _in_turn(self, client: httpx.AsyncClient, asks: Iterator[Ask]) -> None:
        """So many askers, each of whom begins the next as soon as one is over."""
        assert self._load.concurrency is not None

        async def asker() -> None:
            while self._seconds is None or self._now() < self._seconds:
                ask = next(asks, None)
                if ask is None:
                    return
                await self._answer(client, ask, self._body(ask), self._now())

        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.concurrency):
                group.create_task(asker())

    def _body(self, ask: Ask) -> bytes:
        request = GenerationRequest(
            prompt=self._text(ask),
            raw=True,
            max_tokens=ask.answer_tokens,
            seed=ask.number + 1,
            lora=ask.adapter,
        )
        if self._target.proof:
            request = with_whole_path(request)
        else:
            refuse_path(request, "`mistral-nb lora add FOLDER --name NAME` on its machine gives it a name there")
        return encode_json({**request.to_dict(), "stream": True})

    async def _answer(self, client: httpx.AsyncClient, ask: Ask, body: bytes, due: float) -> None:
        outcome = Outcome(ask, due, self._now())
        self._outcomes.append(outcome)
        try:
            async with (
                asyncio.timeout(self._target.timeout),
                client.stream("POST", self._path, content=body) as response,
            ):
                if response.status_code == 200:
                    await self._read(response, outcome)
                else:
                    await response.aread()
                    outcome.error, outcome.message = _refusal(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            outcome.error, outcome.message = "no connection", plain(str(error))
        except (TimeoutError, httpx.TimeoutException):
            outcome.error = f"over {self._target.timeout:g} s"
        except httpx.TransportError as error:
            outcome.error, outcome.message = "cut short", plain(str(error))
        except PeerFailure as failure:
            outcome.error, outcome.message = f"in the stream, code {failure.code}", plain(failure.message)
        outcome.ended = self._now()

    async def _read(self, response: httpx.Response, outcome: Outcome) -> None:
        reading, done = Reading(), False
        async for event in EventSource(response).aiter_sse():
            if event.data == DONE:
                done = True
                continue
            if reading.frame(event.data):
                outcome.texts.append(self._now())
            if _REUSED in event.data:
                outcome.reused = _reused(event.data, outcome.reused)
        outcome.usage = reading.usage
        if not done:
            outcome.error, outcome.message = "cut short", "the stream ended without its mark"


def _reused(frame: str, before: int | None) -> int | None:
    """Tokens of the prompt that were there, as the usage in a frame says, else as one did before."""
    details = (json.loads(frame).get("usage") or {}).get("prompt_tokens_details") or {}
    reused: int | None = details.get(_REUSED, before)
    return reused


def _refusal(response: httpx.Response) -> tuple[str, str]:
    """An error's kind, by status and code, and its words."""
    try:
        failure = peer_failure(response.json())
    except ValueError:
        failure = None
    if failure is None:
        return f"HTTP {response.status_code}", ""
    code = f", code {failure.code}" if failure.code is not None else ""
    return f"HTTP {response.status_code}{code}", plain(failure.message)
