"""Any server of the OpenAI wire: vLLM on one machine or on a Ray cluster, SGLang, llama.cpp's, a gateway."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from mistral_nb.backends.exchange import Exchange, Timeouts, said_by
from mistral_nb.backends.failures import Failure
from mistral_nb.backends.lookup import Peer, check_address
from mistral_nb.backends.openai_wire import assemble, body_of, explain, path_of
from mistral_nb.backends.pump import Emit, Line, Pump
from mistral_nb.backends.retry import patiently
from mistral_nb.backends.wire import mended, peer_failure
from mistral_nb.config import USE_LOCAL, Settings
from mistral_nb.engine_control import encode_json
from mistral_nb.errors import BackendError, ConfigurationError, InvalidRequest
from mistral_nb.foreign import plain
from mistral_nb.types import Chunk, Description, GenerationRequest

__all__ = ["OpenAICompatible", "openai_compatible"]


class OpenAICompatible:
    """A `Backend`. Without a model the only one answers that the server lists; adapters on it do not count."""

    name = "openai"

    def __init__(self, peer: Peer, host: str, model: str | None = None, retry_deadline: float = 0) -> None:
        self._peer = peer
        self._host = host
        self._model = model
        self._retry_deadline = retry_deadline

    def stream(self, request: GenerationRequest) -> Pump:
        body_of(request, "")
        return Pump(lambda line, emit: self._answer(request, line, emit))

    def describe(self) -> Description:
        return Description(self.name, _title(self._model) if self._model else "the only model there", self._host)

    def _answer(self, request: GenerationRequest, line: Line, emit: Emit) -> None:
        started = time.monotonic()
        if self._model is None:
            self._model = patiently(lambda: self._only(request, line), self._retry_deadline, line, emit)

        model = self._model

        def pass_on(chunk: Chunk) -> None:
            chunk = self._named(chunk, request, model) if chunk.model else chunk
            emit(_whole(chunk, request) if chunk.tool_calls else chunk)

        Exchange(
            peer=self._peer.name,
            url=f"{self._peer.base_url}/{path_of(request)}",
            token=self._peer.token,
            body=encode_json(body_of(request, model)),
            model=_title(model),
            request=request,
            timeouts=self._peer.timeouts,
            retry_deadline=max(0.0, self._retry_deadline - (time.monotonic() - started)),
            explain=explain,
            frames_tell_model=True,
        ).run(line, pass_on)

    def _named(self, chunk: Chunk, request: GenerationRequest, model: str) -> Chunk:
        """The chunk with the name of a model only where another one answers than was asked.

        llama.cpp's server answers for every name. Gateways add a version or a vendor to a name. An adapter is often
        called after its model, which is not the adapter.
        """
        told, asked, base = chunk.model or "", plain(request.lora or model), plain(model)
        if request.lora is None:
            heeded = told in asked or asked in told
        else:
            heeded = _last(told) == _last(asked) or (asked in told and _last(told) != _last(base))
        if heeded:
            return replace(chunk, model=None)
        if request.lora is not None:
            problem = f"{self._peer.name} has no such adapter and answers with {_title(told)}; check the name"
            raise InvalidRequest("lora", request.lora, problem)
        return replace(chunk, model=_title(told))

    def _only(self, request: GenerationRequest, line: Line) -> str:
        """The one model of the server's list. `ConfigurationError` names them where there are more."""
        status, data, retry_after = self._peer.get("/models", line)
        said = peer_failure(data) if isinstance(data, dict) else None
        if status != 200 or said:
            told = said_by(said.message, self._peer.token, engine=False) if said else "it does not list its models"
            raise explain(Failure(self._peer.name, "", request, told, None, status, retry_after))
        listed = data.get("data") if isinstance(data, dict) else None
        names = [
            mended(entry["id"])
            for entry in (listed if isinstance(listed, list) else [])
            if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"] and not _adapter(entry)
        ]
        if len(names) == 1:
            return names[0]
        if not names:
            raise BackendError(f"{self._peer.name} lists no model. Start it with one, or name one: --model NAME")
        shown = ", ".join(map(plain, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise ConfigurationError(f"{self._peer.name} serves several models. Name one with --model: {shown}")


def _title(model: str) -> str:
    """A model as it is shown: by its file's name, where it is called by the path of its file."""
    return plain(model.rpartition("/")[2] if model.startswith("/") else model)


def _last(model: str) -> str:
    return model.rpartition("/")[2]


def _adapter(entry: dict[str, Any]) -> bool:
    """vLLM lists LoRA adapters as models whose parent is the model."""
    return bool(entry.get("parent"))


def _whole(chunk: Chunk, request: GenerationRequest) -> Chunk:
    """The last chunk with its calls put together. A call that the measure of tokens has cut off is none."""
    calls = assemble(chunk.tool_calls)
    full = chunk.usage is not None and chunk.usage.completion_tokens >= request.max_tokens
    if full and not all(isinstance(call["arguments"], dict) for call in calls):
        return replace(chunk, tool_calls=(), finish_reason="length")
    return replace(chunk, tool_calls=calls)


def openai_compatible(settings: Settings, model: str | None = None) -> OpenAICompatible:
    """The server that the settings name. `ConfigurationError` says what is missing or wrong."""
    address, key = settings.openai_base_url, settings.openai_api_key
    if address is None:
        raise ConfigurationError(
            "the backend openai needs the address of its server: set MISTRAL_NB_OPENAI_BASE_URL to "
            f"https://host:port/v1, or {USE_LOCAL}"
        )
    host = check_address(address, settings.source("openai_base_url"), token=key is not None)
    peer = Peer(name=f"the server at {host}", base_url=address, token=key, timeouts=Timeouts.from_settings(settings))
    return OpenAICompatible(peer, host, model, settings.retry_deadline)
