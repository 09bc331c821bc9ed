"""Conversations and who answers them, for the chat widget and for code: no notebook is needed.

`Conversation` is a tree of turns; `ChatSession` asks its questions and tells listeners what happens.
"""

from __future__ import annotations

from mistral_nb.chat.conversation import Conversation
from mistral_nb.chat.events import Event, Rearranged, StatusSaid, TextAdded, TurnEnded, TurnStarted
from mistral_nb.chat.presets import Preset, delete_preset, presets, save_preset
from mistral_nb.chat.session import ChatSession
from mistral_nb.chat.turns import CHAT_FIELDS, Attachment, ChatBusy, ChatError, Choice, Turn, compose

__all__ = [
    "CHAT_FIELDS",
    "Attachment",
    "ChatBusy",
    "ChatError",
    "ChatSession",
    "Choice",
    "Conversation",
    "Event",
    "Preset",
    "Rearranged",
    "StatusSaid",
    "TextAdded",
    "Turn",
    "TurnEnded",
    "TurnStarted",
    "compose",
    "delete_preset",
    "presets",
    "save_preset",
]
