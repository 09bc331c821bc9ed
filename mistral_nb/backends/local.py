"""The local engine as a backend: found or started at the first question, then asked over the Workers AI wire."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from mistral_nb import runtime
from mistral_nb.backends.base import DryRun
from mistral_nb.backends.engine_process import Running, ensure, require_local
from mistral_nb.backends.failures import Failure, to_error
from mistral_nb.backends.pump import Emit, Line, Pump
from mistral_nb.backends.wire import peer_failure
from mistral_nb.backends.workers_ai import NotListening, Timeouts, WorkersAI
from mistral_nb.config import Secret, Settings
from mistral_nb.engine_control import call, ended, is_gone, log_tail
from mistral_nb.errors import ConnectionFailed, EngineCrashed, StreamTruncated
from mistral_nb.models import EMBEDDED, canonical, find_known, locate
from mistral_nb.runtime import EngineRecord
from mistral_nb.types import Chunk, Description, GenerationRequest

__all__ = ["STANDS_IN_FOR", "Local"]

STANDS_IN_FOR = "Mistral-7B-Instruct"
_PEER = "the local engine"
_DYING = 1.0


class Local:
    """A `Backend`. `model` is a name in the store, an alias, or a checkpoint folder."""

    name = "local"

    def __init__(self, settings: Settings, model: str = EMBEDDED) -> None:
        self.model = canonical(model)
        self._settings = settings
        self._where = ""

    def check(self) -> None:
        """Raise `ModelError` or `MissingDependency` where it is plain beforehand that nobody will answer."""
        if runtime.read_record(self.model) is None:
            require_local()
            if self.model != EMBEDDED:
                locate(self.model)

    def stream(self, request: GenerationRequest) -> Pump:
        return Pump(lambda line, emit: self._answer(request, line, emit))

    def describe(self) -> Description:
        known = find_known(self.model)
        stands_in = STANDS_IN_FOR if known and known.stand_in else ""
        return Description(self.name, title(self.model), self._where, stands_in)

    def tokenize(self, request: GenerationRequest, say: Callable[[str], None] = lambda status: None) -> DryRun:
        """What `request` would give the model. Starts the engine if need be; `say` gets a line of status meanwhile."""
        running = ensure(self.model, self._settings, Line(), say)
        self._where = running.health.where
        try:
            status, data = call(
                running.record,
                "POST",
                "/engine/tokenize",
                request.to_dict(),
                timeout=self._settings.first_token_timeout,
            )
        except (OSError, http.client.HTTPException, ValueError) as error:
            crashed = self._crash(running.record)
            raise crashed or ConnectionFailed(f"{_PEER} did not answer ({error}). Ask again") from None
        failure = peer_failure(data)
        if failure:
            raise to_error(Failure(_PEER, title(self.model), request, failure.message, failure.code, status))
        return DryRun(data["prompt"], tuple(data["tokens"]), data["context"])

    def _answer(self, request: GenerationRequest, line: Line, emit: Emit) -> None:
        shown = ""

        def say(status: str) -> None:
            nonlocal shown
            if status != shown:
                shown = status
                emit(Chunk(status=status))

        def pass_on(chunk: Chunk) -> None:
            emit(replace(chunk, model=title(chunk.model)) if chunk.model else chunk)

        running = ensure(self.model, self._settings, line, say)
        try:
            self._ask(running, request, line, pass_on)
        except NotListening:
            # It ended, being idle, after it was found.
            self._ask(ensure(self.model, self._settings, line, say), request, line, pass_on)

    def _ask(self, running: Running, request: GenerationRequest, line: Line, emit: Emit) -> None:
        record = running.record
        self._where = running.health.where
        wire = WorkersAI(
            base_url=f"{record.base_url}/client/v4",
            account="local",
            token=Secret(record.token),
            model=record.model,
            name=self.name,
            peer=_PEER,
            engine=True,
            timeouts=Timeouts.from_settings(self._settings),
        )
        crashed = None
        try:
            wire.answer(request, line, emit)
        except NotListening:
            raise
        except (ConnectionFailed, StreamTruncated):
            crashed = None if line.hung_up else self._crash(record)
            if crashed is None:
                raise
        if crashed:
            raise crashed

    def _crash(self, record: EngineRecord) -> EngineCrashed | None:
        """The error for an engine that is gone, or goes within a second; None when it is still there."""
        deadline = time.monotonic() + _DYING
        while not is_gone(record):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.02)
        how = ended(record.pid)
        return EngineCrashed(
            f"the engine process ended in the middle of an answer{f' ({how})' if how else ''}. "
            f"Its log {record.log} ends with\n{log_tail(record.log)}\nAsk again to start it anew"
        )


def title(model: str) -> str:
    """The model's name as people write it: a known model's title, or its folder's name."""
    known = find_known(model)
    return known.title if known else Path(model).name or model
