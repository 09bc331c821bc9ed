"""A `mistral-nb serve` on another machine, reached by its address: the wire of Workers AI, with every field."""

from __future__ import annotations

import time
from dataclasses import replace
from urllib.parse import quote

from mistral_nb.backends.adapter_paths import refuse_path
from mistral_nb.backends.exchange import Exchange, Timeouts, said_by
from mistral_nb.backends.failures import Failure, seconds, to_error
from mistral_nb.backends.local import STANDS_IN_FOR, title
from mistral_nb.backends.lookup import Peer, check_address
from mistral_nb.backends.pump import Emit, Line, Pump
from mistral_nb.backends.retry import patiently
from mistral_nb.backends.wire import PeerFailure, peer_failure
from mistral_nb.config import Settings
from mistral_nb.engine_control import encode_json
from mistral_nb.errors import BackendError, ConfigurationError
from mistral_nb.foreign import plain
from mistral_nb.models import find_known
from mistral_nb.types import Chunk, Description, GenerationRequest

__all__ = ["Remote", "remote"]


class Remote:
    """A `Backend`. Without a model the one answers that the server holds, which is asked which that is, once."""

    name = "remote"

    def __init__(self, peer: Peer, host: str, model: str | None = None, retry_deadline: float = 0) -> None:
        self._peer = peer
        self._host = host
        self._model = model
        self._retry_deadline = retry_deadline
        self._where = ""

    def stream(self, request: GenerationRequest) -> Pump:
        refuse_path(request, "`mistral-nb lora add FOLDER --name NAME` on the server's machine gives it a name there")
        return Pump(lambda line, emit: self._answer(request, line, emit))

    def describe(self) -> Description:
        known = find_known(self._model or "")
        model = title(self._model) if self._model else "the model that it holds"
        where = f"{self._host}, {self._where}" if self._where else self._host
        return Description(self.name, model, where, STANDS_IN_FOR if known and known.stand_in else "")

    def _answer(self, request: GenerationRequest, line: Line, emit: Emit) -> None:
        started = time.monotonic()
        if self._model is None:
            self._model = patiently(lambda: self._held(request, line), self._retry_deadline, line, emit)

        def pass_on(chunk: Chunk) -> None:
            emit(replace(chunk, model=title(chunk.model)) if chunk.model else chunk)

        Exchange(
            peer=self._peer.name,
            url=f"{self._peer.base_url}/client/v4/accounts/local/ai/run/{quote(self._model, safe='/@')}",
            token=self._peer.token,
            body=encode_json(request.to_dict()),
            model=self._model,
            request=request,
            timeouts=self._peer.timeouts,
            retry_deadline=max(0.0, self._retry_deadline - (time.monotonic() - started)),
            engine=True,
            header_tells_model=True,
        ).run(line, pass_on)

    def _held(self, request: GenerationRequest, line: Line) -> str:
        """The model that the server holds. `MistralError` in its own words where it does not say."""
        status, data, retry_after = self._peer.get("/engine/health", line)
        if status == 200 and isinstance(data, dict) and isinstance(data.get("model"), str):
            self._where = ", ".join(plain(str(data[name])) for name in ("device", "precision") if data.get(name))
            return plain(data["model"])
        said = peer_failure(data) if isinstance(data, dict) else None
        if said is None and status in (401, 403):
            said = PeerFailure("it refuses the token; check MISTRAL_NB_SERVER_TOKEN")
        if said is None:
            raise BackendError(
                f"{self._peer.name} does not answer as `mistral-nb serve` does (HTTP {status}). Check its address",
                status=status,
                retry_after=seconds(retry_after),
            )
        words = said_by(said.message, self._peer.token, engine=True)
        raise to_error(
            Failure(self._peer.name, "its model", request, words, said.code, status, retry_after, engine=True)
        )


def remote(settings: Settings, address: str, origin: str, model: str | None = None) -> Remote:
    """The server at `address`, which was set in `origin`. `ConfigurationError` names what is missing or wrong."""
    host = check_address(address, origin)
    if settings.server_token is None:
        raise ConfigurationError(
            f"mistral-nb at {host} needs its token: set MISTRAL_NB_SERVER_TOKEN to the one that the server there was "
            "given, or that `mistral-nb serve` printed when it started"
        )
    peer = Peer(
        name=f"mistral-nb at {host}",
        base_url=address,
        token=settings.server_token,
        timeouts=Timeouts.from_settings(settings),
    )
    return Remote(peer, host, model, settings.retry_deadline)
