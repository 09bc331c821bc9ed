"""`%mistral chat`: a chat with what the line says, and where it says nothing with what `%config Mistral` does."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

from mistral_nb.chat import Choice, presets
from mistral_nb.config import Settings
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import FIELDS
from mistral_nb_magics.chat.widget import Chat

__all__ = ["open_chat"]

_OWN = ("backend", "model", "system", "preset", "load")
_UNSET = {field.name: field.default for field in FIELDS}


def open_chat(options: Namespace, defaults: Mapping[str, Any], settings: Callable[[], Settings]) -> Chat:
    """The chat, not yet shown. `defaults` are the system text and the fields of the magic. Raises `MistralError`."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    fields = {name: value for name, value in given.items() if name not in _OWN}
    own = {name: value for name, value in given.items() if name in _OWN and name != "load"}
    chosen = presets().get(own.get("preset", ""), Choice())
    for name, value in defaults.items():
        if value is None or value == _UNSET.get(name) or name in chosen.fields or (name == "system" and chosen.system):
            continue
        (own if name == "system" else fields).setdefault(name, value)
    try:
        if "load" in given:
            return Chat.load(given["load"], settings=settings, **own, **fields)
        return Chat(settings=settings, **own, **fields)
    except InvalidRequest as error:
        name = f"--{error.field.replace('_', '-')}"
        raise InvalidRequest(name, error.value, error.problem) from None
