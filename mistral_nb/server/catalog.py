"""Under which names a process answers, and the lists of models that clients ask for."""

from __future__ import annotations

import difflib
import math
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mistral_nb.errors import InvalidRequest
from mistral_nb.models import find_known
from mistral_nb.server.finetunes import Finetunes
from mistral_nb.server.holder import Holder
from mistral_nb.server.schemas import WireError, envelope, shortened

__all__ = ["Catalog", "Identity"]

MODEL_HEADER = "x-mistral-nb-model"
MAX_PER_PAGE = 100

_PRINTABLE = "".join(chr(code) for code in range(33, 127) if chr(code) != "%")
_TASK = {
    "id": "c329a1f9-323d-4e91-b2aa-582dd4188d34",
    "name": "Text Generation",
    "description": "Models that continue a text or a conversation.",
}
"""The task of every model here, under Cloudflare's own id."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Under which names a process answers: the model it holds, that model's other names, and those of `--serve-as`."""

    model: str
    aliases: tuple[str, ...]
    serve_as: tuple[str, ...]
    log: str

    @property
    def header(self) -> dict[str, str]:
        return {MODEL_HEADER: quote(self.model, safe=_PRINTABLE)}

    def answers_to(self, asked: str) -> bool:
        """Whether `asked` is one of the names, in any case of letters, with or without a slash last."""
        names = (self.model, *self.aliases, *self.serve_as)
        return asked.rstrip("/").lower() in {name.lower() for name in names}

    def check(self, asked: str, adapters: Sequence[str] = ()) -> None:
        """`WireError` 5007 unless it answers to `asked`; `adapters` are those that could be meant."""
        if self.answers_to(asked):
            return
        asked = shortened(asked.rstrip("/"))
        names = {name.lower(): name for name in (*adapters, self.model, *self.aliases, *self.serve_as)}
        near = [names[name] for name in difflib.get_close_matches(asked.lower(), names, n=1)]
        hint = f" (did you mean {near[0]}?)" if near else ""
        held = self.model + (f", which also answers for {', '.join(self.serve_as)}" if self.serve_as else "")
        serve = f"mistral-nb serve --model {shlex.quote(self.model)} --serve-as {shlex.quote(asked)}"
        advice = f"To let it answer for that name, start it with: {serve}"
        if near and near[0] in adapters:
            advice = "`mistral-nb lora list` shows the adapters here"
        raise WireError(400, 5007, f"No such model {asked}{hint}: this engine holds {held}. {advice}", "model")


class Catalog:
    """The lists: Workers AI's `models/search` and OpenAI's `models`, which has the adapters too. The model held comes
    first.
    """

    def __init__(self, holder: Holder, identity: Identity, finetunes: Finetunes) -> None:
        self._holder = holder
        self._identity = identity
        self._finetunes = finetunes
        self._created = datetime.now(UTC)

    async def search(self, request: Request) -> Response:
        """Workers AI's: the names that contain `search`, of a `task` and an `author`, page by page."""
        query = request.query_params
        if "format" in query:
            raise InvalidRequest("format", query["format"], "is not supported here; leave it out")
        page, per_page = _number(request, "page", 1, 1, 1_000_000), _number(request, "per_page", 20, 1, MAX_PER_PAGE)
        words, task, author = (query.get(name, "").lower() for name in ("search", "task", "author"))
        found = [
            name
            for name in self._names
            if words in name.lower()
            and task in ("", _TASK["name"].lower())
            and author in ("", *name.lower().split("/"))
        ]
        shown = found[(page - 1) * per_page : page * per_page]
        info = {"count": len(shown), "page": page, "per_page": per_page, "total_count": len(found)}
        pages = {"total_pages": math.ceil(len(found) / per_page)}
        body = {**envelope([self._listed(name) for name in shown]), "result_info": {**info, **pages}}
        return JSONResponse(body, headers=self._identity.header)

    async def models(self, request: Request) -> Response:
        """OpenAI's: the model held, each name that stands for it, and each adapter that can be named in its place.

        The model is the `parent` of the others.
        """
        data = [self._model(name) for name in (*self._names, *await self.adapters())]
        return JSONResponse({"object": "list", "data": data}, headers=self._identity.header)

    async def model(self, request: Request) -> Response:
        """OpenAI's: one model by any of its names, or an adapter."""
        asked = request.path_params["model"].rstrip("/")
        if not self._identity.answers_to(asked):
            adapters = await self.adapters()
            if asked not in adapters:
                self._identity.check(asked, adapters)
        return JSONResponse(self._model(asked), headers=self._identity.header)

    async def adapters(self) -> tuple[str, ...]:
        """Those that fit, and whose names are not the model's; none while it loads, since nothing tells which fit."""
        model = self._holder.model
        found = await self._finetunes.usable(model.fits) if model else ()
        return tuple(name for name in found if not self._identity.answers_to(name))

    @property
    def _names(self) -> tuple[str, ...]:
        return self._identity.model, *self._identity.serve_as

    def _listed(self, name: str) -> dict[str, Any]:
        known = find_known(self._identity.model)
        told = {"info": f"https://huggingface.co/{known.hub_id}" if known else "", "context_window": self._context}
        title = known.title if known else self._identity.model
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
            "source": 1,
            "name": name,
            "description": f"{title}, on this machine.",
            "task": _TASK,
            "created_at": self._created.isoformat(sep=" ", timespec="milliseconds").removesuffix("+00:00"),
            "tags": [],
            "properties": [{"property_id": key, "value": str(value)} for key, value in told.items() if value],
        }

    def _model(self, name: str) -> dict[str, Any]:
        identity = {"id": name, "object": "model", "created": int(self._created.timestamp()), "owned_by": "mistral-nb"}
        held = self._identity.model
        return {**identity, "root": held, "parent": None if name == held else held, "max_model_len": self._context}

    @property
    def _context(self) -> int | None:
        """In tokens; None until the model is loaded."""
        model = self._holder.model
        return model.engine.info.context if model else None


def _number(request: Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise InvalidRequest(name, text, f"must be a whole number from {low} to {high}")
    return int(text)
