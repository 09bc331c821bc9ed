"""Who answers in a chat and how: from what a call says, and from one choice to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_nb.chat import ChatError, ChatSession, Choice, presets

__all__ = ["choice_of", "choose", "compared", "followed"]

ADAPTER = ("lora", "lora_scale")
"""Fields that say who answers, in which two who are compared differ, and not how."""


def choice_of(
    backend: str | None, model: str | None, system: str | None, preset: str | None, fields: Mapping[str, Any]
) -> Choice:
    """What is given goes before what the preset says. Raises `InvalidRequest`; `ChatError` for an unknown preset."""
    if preset is None:
        return Choice(backend, model, system, fields)
    known = presets()
    if preset not in known:
        raise ChatError(f"there is no preset {preset!r}; there are {', '.join(known)}")
    chosen = known[preset].applied(Choice(backend, model))
    return Choice(backend, model, system or chosen.system, {**chosen.fields, **fields})


def compared(choice: Choice, given: Mapping[str, Any]) -> Choice:
    """Whom to compare with: as `choice`, but for who answers and for what is given."""
    kept = {name: value for name, value in choice.fields.items() if name not in ADAPTER}
    fields = {name: value for name, value in given.items() if name not in ("backend", "model", "system")}
    system = given.get("system", choice.system)
    return Choice(given.get("backend"), given.get("model"), system, {**kept, **fields})


def followed(other: Choice, old: Choice, new: Choice) -> Choice:
    """`other` after `old`, with which it is compared, became `new`: but for who answers, what was the same stays so."""
    fields = {name: other.fields.get(name) for name in (*other.fields, *old.fields, *new.fields)}
    for name in fields:
        if name not in ADAPTER and fields[name] == old.fields.get(name):
            fields[name] = new.fields.get(name)
    return Choice(other.backend, other.model, new.system if other.system == old.system else other.system, fields)


def choose(session: ChatSession, choice: Choice) -> None:
    """Have the next question answered so."""
    if session.compare is not None:
        session.compare = followed(session.compare, session.choice, choice)
    session.choice = choice
