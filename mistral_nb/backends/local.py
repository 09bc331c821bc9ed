"""The local engine as a backend: found or started at the first question, then asked over the Workers AI wire."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mistral_nb import runtime
from mistral_nb.backends.adapter_paths import with_whole_path
from mistral_nb.backends.base import DryRun
from mistral_nb.backends.engine_process import Running, ensure, find_served, require_local, served
from mistral_nb.backends.failures import Failure, to_error
from mistral_nb.backends.pump import Emit, HungUp, Line, Pump
from mistral_nb.backends.wire import peer_failure
from mistral_nb.backends.workers_ai import Timeouts, WorkersAI
from mistral_nb.config import MAX_REQUESTS, Settings
from mistral_nb.engine_control import call, check, ended, is_gone, is_hung, log_tail
from mistral_nb.errors import BackendError, ConnectionFailed, EngineCrashed, StreamTruncated
from mistral_nb.models import EMBEDDED, canonical, find_known, locate
from mistral_nb.runtime import EngineRecord
from mistral_nb.secret import Secret
from mistral_nb.types import Chunk, Description, GenerationRequest

__all__ = ["STANDS_IN_FOR", "Local"]

STANDS_IN_FOR = "Mistral-7B-Instruct"
_PEER = "the local engine"
_ENGINE_FAILED = 3043
_DYING = 1.0
_LEAVING = 20.0
_POLL = 0.02


class Local:
    """A `Backend`. `model` is a name in the store, an alias, a checkpoint folder, or a name that a running engine was
    told to answer for too. An engine that it starts answers `max_requests` at once.
    """

    name = "local"

    def __init__(self, settings: Settings, model: str = EMBEDDED, max_requests: int = MAX_REQUESTS) -> None:
        found = find_served(model)
        self._served_as = model if found else ""
        self.model = found.model if found else canonical(model)
        self._settings = settings
        self._max_requests = max_requests
        self._where = ""

    def check(self) -> None:
        """Raise `ModelError` or `MissingDependency` where it is plain beforehand that nobody will answer."""
        if runtime.read_record(self.model) is None:
            require_local()
            if self.model != EMBEDDED:
                locate(self.model)

    def stream(self, request: GenerationRequest) -> Pump:
        asked = with_whole_path(request)
        return Pump(lambda line, emit: self._answer(asked, line, emit))

    def describe(self) -> Description:
        known = find_known(self.model)
        stands_in = STANDS_IN_FOR if known and known.stand_in else ""
        return Description(self.name, title(self.model), self._where, self._served_as or stands_in)

    def tokenize(self, request: GenerationRequest, say: Callable[[str], None] = lambda status: None) -> DryRun:
        """What `request` would give the model. Starts the engine if need be; `say` gets a line of status meanwhile.

        An interrupt, or an exception that `say` raises, ends it.
        """
        found: list[DryRun] = []
        asked = with_whole_path(request)

        def produce(line: Line, emit: Emit) -> None:
            found.append(self._tokenize(asked, line, lambda status: emit(Chunk(status=status))))

        stream = Pump(produce)
        try:
            for chunk in stream:
                say(chunk.status)
        finally:
            stream.close()
        return found[0]

    def _tokenize(self, request: GenerationRequest, line: Line, say: Callable[[str], None]) -> DryRun:
        running = self._running(line, say)
        failed = ""
        try:
            status, data = call(
                running.record,
                "POST",
                "/engine/tokenize",
                request.to_dict(),
                timeout=self._settings.first_token_timeout,
                attach=line.attach,
            )
        except (OSError, http.client.HTTPException, ValueError) as error:
            failed = str(error)
        if line.hung_up:
            raise HungUp
        if failed:
            broken = ConnectionFailed(f"{_PEER} did not answer ({failed}). Ask again")
            raise _crash(running.record, "before it answered") or broken
        failure = peer_failure(data)
        if failure:
            raise to_error(
                Failure(_PEER, title(self.model), request, failure.message, failure.code, status, engine=True)
            )
        return DryRun(data["prompt"], tuple(data["tokens"]), data["context"])

    def _running(self, line: Line, say: Callable[[str], None]) -> Running:
        if self._served_as:
            running = served(self._served_as, self._settings, line, say)
        else:
            running = ensure(self.model, self._settings, line, say, self._max_requests)
        self._where = running.health.where
        return running

    def _answer(self, request: GenerationRequest, line: Line, emit: Emit) -> None:
        shown, begun = "", False

        def say(status: str) -> None:
            nonlocal shown
            if status != shown:
                shown = status
                emit(Chunk(status=status))

        def pass_on(chunk: Chunk) -> None:
            nonlocal begun
            begun = begun or bool(chunk.text)
            emit(replace(chunk, model=title(chunk.model)) if chunk.model else chunk)

        running = self._running(line, say)
        broken = self._ask(running.record, request, line, pass_on)
        if broken and not begun and not line.hung_up and self._may_go_on(running.record, broken, line):
            running = self._running(line, say)
            broken = self._ask(running.record, request, line, pass_on)
        if broken is None:
            return
        crashed = None
        if not line.hung_up and broken.code != _ENGINE_FAILED:
            crashed = _crash(running.record, "in the middle of an answer" if begun else "before it answered")
        raise crashed or broken

    def _ask(self, record: EngineRecord, request: GenerationRequest, line: Line, emit: Emit) -> BackendError | None:
        """Pass the answer on. The error, instead of raising it, where the engine may have ended or be about to."""
        wire = WorkersAI(
            base_url=f"{record.base_url}/client/v4",
            account="local",
            token=Secret(record.token),
            model=record.model,
            name=self.name,
            peer=_PEER,
            engine=True,
            timeouts=Timeouts.from_settings(self._settings),
            proof=Secret(record.proof) if record.proof else None,
        )
        try:
            wire.answer(request, line, emit)
        except (ConnectionFailed, StreamTruncated) as error:
            return error
        except BackendError as error:
            if error.code != _ENGINE_FAILED:
                raise
            return error
        return None

    def _may_go_on(self, record: EngineRecord, broken: BackendError, line: Line) -> bool:
        """Whether to ask once more. Waits for an engine that is on its way out, which may hold the GPU's memory."""
        health = check(record, self._settings.connect_timeout)
        if health and health.state != "stopping":
            return broken.code != _ENGINE_FAILED
        deadline = time.monotonic() + _LEAVING
        while is_hung(record) and not line.wait(_POLL) and time.monotonic() < deadline:
            continue
        return not line.hung_up


def _crash(record: EngineRecord, when: str) -> EngineCrashed | None:
    """The error for an engine that is gone, or goes within a second; None when it is still there."""
    deadline = time.monotonic() + _DYING
    while not is_gone(record) and time.monotonic() < deadline:  # its port is closed before it has a status
        time.sleep(_POLL)
    if not is_gone(record) and runtime.is_running(record):
        return None
    how = ended(record)
    return EngineCrashed(
        f"the engine process ended {when}{f' ({how})' if how else ''}. "
        f"Its log {record.log} ends with\n{log_tail(record.log)}\nAsk again to start it anew"
    )


def title(model: str) -> str:
    """The model's name as people write it: a known model's title, or its folder's name."""
    known = find_known(model)
    return known.title if known else Path(model).name or model
