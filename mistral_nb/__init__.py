"""Mistral-7B-Instruct in a notebook: `%load_ext mistral_nb`, then `%%mistral`; in Python `mistral_nb.ask("...")`.

Every public name is imported when it is first used, so that the extension loads at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from mistral_nb.answer import Answer, Result, Timings
    from mistral_nb.asking import ask, stream
    from mistral_nb.binding import AI
    from mistral_nb.chat import ChatBusy, ChatError, Choice, Conversation
    from mistral_nb.errors import (
        AdapterError,
        AuthenticationError,
        BackendError,
        ConfigurationError,
        ConnectionFailed,
        ContextOverflow,
        EngineBusy,
        EngineCrashed,
        EngineError,
        EngineStartError,
        InvalidRequest,
        MissingDependency,
        MistralError,
        ModelError,
        PullError,
        RateLimited,
        RequestTimeout,
        StreamTruncated,
        UnknownModel,
    )
    from mistral_nb.types import Chunk, Description, Function, GenerationRequest, Message, Usage
    from mistral_nb_magics.chat.widget import Chat

__all__ = [
    "AI",
    "AdapterError",
    "Answer",
    "AuthenticationError",
    "BackendError",
    "Chat",
    "ChatBusy",
    "ChatError",
    "Choice",
    "Chunk",
    "ConfigurationError",
    "ConnectionFailed",
    "ContextOverflow",
    "Conversation",
    "Description",
    "EngineBusy",
    "EngineCrashed",
    "EngineError",
    "EngineStartError",
    "Function",
    "GenerationRequest",
    "InvalidRequest",
    "Message",
    "MissingDependency",
    "MistralError",
    "ModelError",
    "PullError",
    "RateLimited",
    "RequestTimeout",
    "Result",
    "StreamTruncated",
    "Timings",
    "UnknownModel",
    "Usage",
    "__version__",
    "ask",
    "load_ipython_extension",
    "stream",
    "unload_ipython_extension",
]

_HOMES = {
    "mistral_nb.answer": ("Answer", "Result", "Timings"),
    "mistral_nb.asking": ("ask", "stream"),
    "mistral_nb.binding": ("AI",),
    "mistral_nb.chat": ("ChatBusy", "ChatError", "Choice", "Conversation"),
    "mistral_nb.types": ("Chunk", "Description", "Function", "GenerationRequest", "Message", "Usage"),
    "mistral_nb_magics.chat.widget": ("Chat",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mistral_nb' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME.get(name, "mistral_nb.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: InteractiveShell) -> None:
    """`%load_ext mistral_nb`: register `%mistral` and `%%mistral`."""
    from mistral_nb_magics import register

    register(ipython)


def unload_ipython_extension(ipython: InteractiveShell) -> None:
    """`%unload_ext mistral_nb`: take them away again."""
    from mistral_nb_magics import unregister

    unregister(ipython)
