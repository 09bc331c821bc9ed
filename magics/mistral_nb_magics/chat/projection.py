"""What the chat's view shows of a conversation, as the JSON that goes over the wire."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from mistral_nb.chat import Choice, Conversation, Turn
from mistral_nb.config import Settings
from mistral_nb.errors import MistralError
from mistral_nb.rendering import Block, blocks
from mistral_nb_magics.chat.choosing import ADAPTER

__all__ = ["BlockCache", "block_view", "recent_prompts", "shown", "turn_view", "who_is_next"]

MAX_CACHED = 400
"""Answers whose blocks are kept: as many as a long chat shows."""

MAX_HISTORY = 50


def shown(conversation: Conversation) -> tuple[Turn, ...]:
    """The turns that stand on the page: those of the path, each with the ones that it is compared with."""
    with conversation.steady():
        return tuple(each for turn in conversation.path for each in conversation.compared(turn.id))


def recent_prompts(conversation: Conversation) -> list[str]:
    """The last questions, each once, the newest last."""
    prompts = dict.fromkeys(turn.prompt for turn in reversed(conversation.turns))
    return list(prompts)[:MAX_HISTORY][::-1]


def who_is_next(choice: Choice, settings: Callable[[], Settings]) -> str:
    """Who would answer the next question. Asks nobody."""
    from mistral_nb.backends import resolve

    try:
        who = resolve(settings(), backend=choice.backend, model=choice.model).backend.describe()
    except MistralError as error:
        return f"nobody: {error}"
    return " · ".join(part for part in (who.model, who.backend, choice.fields.get("lora")) if part)


def turn_view(turn: Turn, conversation: Conversation, parts: list[Block] | None = None) -> dict[str, Any]:
    """A turn as the page takes it; without `blocks` those that it has already stay."""
    view: dict[str, Any] = {
        "id": turn.id,
        "prompt": turn.prompt,
        "attachments": [{"kind": each.kind, "name": each.name} for each in turn.attachments],
        "running": turn.running,
        "finish": turn.finish_reason or "",
        "error": turn.error or "",
        "footer": turn.footer,
        "left_out": turn.left_out,
        "who": _who(turn),
        "settings": _settings(turn),
        **_place(turn, conversation),
    }
    return view if parts is None else {**view, "blocks": [block_view(part) for part in parts]}


def block_view(block: Block) -> dict[str, str]:
    return {"kind": block.kind, "body": block.body, "language": block.language, "marks": block.marks}


class BlockCache:
    """The blocks of answers that have ended, so that a snapshot does not render them again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], list[Block]] = OrderedDict()

    def blocks(self, turn: Turn) -> list[Block]:
        key = (turn.id, turn.answer)
        found = self._kept.pop(key, None)
        if found is None:
            found = blocks(turn.answer)
        self._kept[key] = found
        while len(self._kept) > MAX_CACHED:
            self._kept.popitem(last=False)
        return found


def _place(turn: Turn, conversation: Conversation) -> dict[str, Any]:
    """Which branch it is of how many, what it is compared with, and whether that what is asked next follows it.

    Of a turn that is gone nothing.
    """
    with conversation.steady():
        if turn.id not in conversation:
            return {"branch": [1, 1, [turn.id]], "group": [], "on_path": False}
        branches = [each.id for each in conversation.branches(turn.id)]
        group = [each.id for each in conversation.compared(turn.id)] if turn.group else []
        on_path = len(group) < 2 or any(each.id == turn.id for each in conversation.path)
    return {"branch": [branches.index(turn.id) + 1, len(branches), branches], "group": group, "on_path": on_path}


def _who(turn: Turn) -> str:
    """Who answers, as far as it is known: what was asked for until the answer has said more."""
    served, choice = turn.served or {}, turn.choice
    parts = (
        served.get("backend") or choice.backend or "",
        served.get("model") or choice.model or "",
        served.get("adapter") or choice.fields.get("lora") or "",
    )
    return " · ".join(str(part) for part in parts if part)


def _settings(turn: Turn) -> str:
    """What was set for this turn, in few words. The adapter and its scale stand in the footer."""
    named = {name: value for name, value in turn.choice.fields.items() if name not in ADAPTER}
    return ", ".join(f"{name} {_short(value)}" for name, value in named.items())


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(repr, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
