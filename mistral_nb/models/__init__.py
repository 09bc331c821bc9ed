"""The model store: which models are known, which are here, and how they get here, are checked and removed."""

from __future__ import annotations

from mistral_nb.models.known import EMBEDDED, KNOWN, KnownModel, find_known
from mistral_nb.models.pull import pull
from mistral_nb.models.store import (
    InstalledModel,
    broken,
    canonical,
    installed,
    locate,
    packed_folder,
    remove,
    store_path,
    unfinished,
    verify,
)
from mistral_nb.progress import Progress

__all__ = [
    "EMBEDDED",
    "KNOWN",
    "InstalledModel",
    "KnownModel",
    "Progress",
    "broken",
    "canonical",
    "find_known",
    "installed",
    "locate",
    "packed_folder",
    "pull",
    "remove",
    "store_path",
    "unfinished",
    "verify",
]
