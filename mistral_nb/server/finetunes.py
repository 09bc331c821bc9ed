"""Workers AI's endpoints for LoRA adapters, over the adapters on this machine."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, ParamSpec, TypeVar

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message

from mistral_nb.errors import AdapterError, InvalidRequest
from mistral_nb.finetunes import AdapterStore
from mistral_nb.finetunes.store import ASSET_LIMITS
from mistral_nb.server.adapters import Adapters, Named
from mistral_nb.server.answering import bounded, read_body
from mistral_nb.server.schemas import MAX_BODY, WireError, envelope, parse_json
from mistral_nb.types import GenerationRequest

__all__ = ["Finetunes"]

MAX_UPLOAD = max(ASSET_LIMITS.values()) + MAX_BODY
"""Bytes of an upload: the largest file, and the form around it."""

_PIECE = 1 << 20

P = ParamSpec("P")
T = TypeVar("T")


class Finetunes:
    """The handlers, and what a request's `lora` comes to. `working` marks the process as busy, for an upload."""

    def __init__(self, store: AdapterStore, working: Callable[[], AbstractContextManager[None]]) -> None:
        self._store = store
        self._adapters = Adapters(store)
        self._working = working

    async def knows(self, name: str) -> bool:
        """Whether an adapter has that id or name."""
        return await _stored(self._adapters.knows, name)

    async def usable(self, fits: Callable[[Named], bool]) -> tuple[str, ...]:
        """The names of those that have their files and fit."""
        return await _stored(self._adapters.usable, fits)

    async def resolve(self, request: GenerationRequest, *, paths: bool) -> Named | None:
        """The adapter that a request asks for, as `Adapters.find` has it."""
        if request.lora is None and request.lora_scale is None:
            return None
        return await _stored(self._adapters.find, request, paths=paths)

    async def list(self, request: Request) -> Response:
        adapters = await _stored(self._store.list)
        return JSONResponse(envelope([adapter.to_wire() for adapter in adapters]))

    async def public(self, request: Request) -> Response:
        """Cloudflare has adapters of its own; this machine has none."""
        return JSONResponse(envelope([]))

    async def create(self, request: Request) -> Response:
        """A new adapter from `name`, `model` and, if given, `description`; its files come after."""
        adapter = await _stored(self._store.create, *_new(parse_json(await read_body(request))))
        return JSONResponse(envelope(adapter.to_wire()))

    async def upload(self, request: Request) -> Response:
        """One file of an adapter, from a form with `file` and `file_name`."""
        with self._working():
            asked = request.path_params["finetune"]
            adapter = await _stored(self._store.find, asked)
            if adapter is None:
                raise WireError(404, 3037, f"no such finetune: {asked}; create it first, or list those that there are")
            form = await _form(request)
            try:
                file, file_name = form.get("file"), form.get("file_name")
                if not isinstance(file, UploadFile) or not isinstance(file_name, str):
                    raise WireError(400, 5006, "the body must be a form (multipart/form-data) with file and file_name")
                await _stored(self._store.put_asset, adapter, file_name, _pieces(file.file))
            finally:
                await form.close()
        return JSONResponse(envelope({}))


async def _form(request: Request) -> FormData:
    """The form in a body of at most `MAX_UPLOAD` bytes, its file on disk."""
    parts = bounded(request, MAX_UPLOAD, "a finetune's file cannot be that large")

    async def receive() -> Message:
        part = await anext(parts, None)
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    try:
        return await Request(request.scope, receive).form(max_files=1, max_fields=8)
    except HTTPException as error:
        raise WireError(400, 5006, f"the body is not the form that its Content-Type names: {error.detail}") from error
    except OSError as error:
        folder = tempfile.gettempdir()
        told = f"the upload cannot be kept in {folder} ({error.strerror}); make room there, or set TMPDIR"
        raise WireError(507, 3043, told) from error


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece


async def _stored(act: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What the store does, in a thread. `WireError` 5006 for what it refuses, 3043 where the disk fails it."""
    try:
        return await asyncio.to_thread(act, *arguments, **named)
    except AdapterError as error:
        status, code = (507, 3043) if isinstance(error.__cause__, OSError) else (400, 5006)
        raise WireError(status, code, str(error)) from error


def _new(data: Any) -> tuple[str, str, str]:
    """Name, model and description of a finetune that is to be created."""
    if not isinstance(data, dict):
        raise InvalidRequest("body", type(data).__name__, "must be a JSON object with name and model")
    if unknown := sorted(set(data) - {"name", "model", "description", "public"}):
        raise InvalidRequest("body", unknown, "holds only name, model, description and public")
    if data.get("public", False) is not False:
        raise InvalidRequest("public", data["public"], "must be false: an adapter here is this machine's own")
    texts = {"description": "", **data}
    for field in ("name", "model", "description"):
        if not isinstance(texts.get(field), str):
            raise InvalidRequest(field, texts.get(field), "must be a text")
    return texts["name"], texts["model"], texts["description"]
