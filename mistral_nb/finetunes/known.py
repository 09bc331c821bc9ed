"""What adapters are called, as far as that is known without asking anybody: what Tab offers."""

from __future__ import annotations

from contextlib import suppress

from mistral_nb.errors import AdapterError
from mistral_nb.finetunes.adapter import Adapter, is_wire_id
from mistral_nb.finetunes.pushes import pushed_names
from mistral_nb.finetunes.store import AdapterStore

__all__ = ["kept_names", "known_names", "remember"]

_PUBLIC = ("cf-public-cnn-summarization", "cf-public-jigsaw-classification", "cf-public-magicoder")
"""Cloudflare's own, as its documents name them."""

_listed: set[str] = set()


def remember(adapters: list[Adapter]) -> list[Adapter]:
    """Keep what the adapters of a list are called, while this process lasts."""
    _listed.update(adapter.name for adapter in adapters)
    return adapters


def known_names() -> list[str]:
    """Of the store here, of what was pushed from here, of the lists that were shown, and Cloudflare's own.

    Only what a command line takes as one word.
    """
    names = {*_PUBLIC, *_listed, *kept_names()}
    with suppress(OSError):
        names.update(pushed_names())
    return sorted(name for name in names if is_wire_id(name))


def kept_names() -> list[str]:
    """Of the store here. None where it cannot be read, which is told when it is used."""
    with suppress(AdapterError, OSError):
        return sorted(adapter.name for adapter in AdapterStore().list())
    return []
