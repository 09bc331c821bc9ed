"""What a LoRA adapter is made of, on Cloudflare as in the store here: its record, its two files, its name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mistral_nb.checkpoints.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.errors import AdapterError

__all__ = [
    "ASSETS",
    "CONFIG_FILE",
    "DEFAULT_MODEL",
    "WEIGHTS_FILE",
    "Adapter",
    "adapter_from_wire",
    "check_name",
    "is_adapter_id",
    "is_path",
    "is_wire_id",
]

ASSETS = (CONFIG_FILE, WEIGHTS_FILE)
DEFAULT_MODEL = "@cf/mistral/mistral-7b-instruct-v0.2-lora"
"""The model that an adapter is made for, unless it is said."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WIRE_ID = _NAME
"""Cloudflare publishes no form for its ids; those in its documents are UUIDs."""

_LONGEST_NAME = 256
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_PUBLIC = "cf-public-"
_TEXTS = ("id", "name", "model", "description", "created_at", "modified_at")


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, field by field as on the wire. `id` is a UUID; the times are ISO 8601."""

    id: str
    name: str
    model: str
    created_at: str
    modified_at: str
    description: str = ""
    public: bool = False

    def to_wire(self) -> dict[str, Any]:
        return asdict(self)


def adapter_from_wire(record: Mapping[str, Any]) -> Adapter:
    """The adapter that a record describes. Other keys are left out.

    `ValueError` for one without an id or a name, or with one that is not how they look. A name that others have given
    may be any printable text.
    """
    texts = {name: value for name in _TEXTS if isinstance(value := record.get(name), str)}
    name = texts.get("name", "")
    if not is_wire_id(texts.get("id", "")) or not name.strip() or len(name) > _LONGEST_NAME or not name.isprintable():
        raise ValueError("an adapter without an id or a name")
    unsaid = {"model": "", "created_at": "", "modified_at": ""}
    return Adapter(**{**unsaid, **texts}, public=record.get("public") is True)


def is_adapter_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def is_path(lora: str) -> bool:
    """Whether a text is a folder's path and no name or id: those have no slash, and begin with a letter or digit."""
    return lora.startswith((".", "~")) or "/" in lora or os.sep in lora


def is_wire_id(text: str) -> bool:
    """Whether an id from elsewhere stands in a URL, a file's name and a terminal as it is."""
    return _WIRE_ID.fullmatch(text) is not None


def check_name(name: str) -> None:
    """`AdapterError` unless a new adapter may be called that.

    Cloudflare publishes no rule: this one holds what stands in a URL and a shell as it is, and tells names from ids.
    """
    problem = ""
    if not _NAME.fullmatch(name):
        problem = "1 to 100 letters, digits, dots, dashes and underscores make a name, a letter or digit first"
    elif is_adapter_id(name.lower()):
        problem = "that is how ids look; choose a name"
    elif name.lower().startswith(_PUBLIC):
        problem = f"{_PUBLIC} begins the names of Cloudflare's own adapters; choose another"
    if problem:
        raise AdapterError(f"name = '{quoted(name)}': {problem}")
