"""Which source a name, a hub id or a path is pulled from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mistral_nb.errors import ModelError, UnknownModel
from mistral_nb.models.known import EMBEDDED, find_known
from mistral_nb.models.staging import Source
from mistral_nb.models.store import canonical, existing_path, is_hub_id, store_name_of_hub_id, store_path

__all__ = ["source_of"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}", re.ASCII)


def source_of(name: str, *, revision: str | None = None, store_name: str | None = None) -> Source | None:
    """The source of what a user asked to pull; None for a name that only the store knows.

    `UnknownModel` for what is neither known, nor a hub id, nor a path.
    """
    known = find_known(name)
    path = None if known else existing_path(name)
    if store_name is not None and path is None:
        raise ModelError(f"a name for the store goes with a path, and {name!r} is none here; leave the name out")
    if revision is not None and (path or (known and known.name == EMBEDDED)):
        raise ModelError(f"a revision goes with a model of the Hugging Face hub, and {name!r} is none; leave it out")
    if known and known.name == EMBEDDED:
        from mistral_nb.models.embedded import EmbeddedSource

        return EmbeddedSource()
    if path:
        return _local(path, store_name)
    if name.lower().endswith((".gguf", ".whl")):
        raise UnknownModel(f"there is no file {os.path.abspath(name)}; give the path of one that is here")
    if known or is_hub_id(name):
        from mistral_nb.models.hub import HubSource

        return HubSource(store_name_of_hub_id(name), known.hub_id if known else name, revision)
    in_store = canonical(name)
    if revision is not None:
        raise ModelError(
            f"a revision goes with a hub id (org/name), and {in_store} is a name in the store; give that id"
        )
    return None


def _local(given: Path, store_name: str | None) -> Source:
    """A path's source. What the path leads to is pulled; the name is the given one's."""
    from mistral_nb.models.embedded import EmbeddedSource
    from mistral_nb.models.local import FolderSource, GgufSource

    path = given.resolve()
    if path.is_file() and given.suffix.lower() == ".whl":
        if store_name is not None:
            raise ModelError(f"{given} can only be the embedded model, which has its own name; leave the name out")
        return EmbeddedSource(wheel=path)
    if path.is_dir() and path.parent == store_path().resolve():
        raise ModelError(f"{path} is in the store already; use it as {path.name}")
    if not path.is_dir() and not _is_gguf(path):
        raise ModelError(f"{path} is no GGUF file; give one, or the folder of a checkpoint")
    named = Path(os.path.abspath(given))
    name = store_name
    if name is None:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", named.name if path.is_dir() else named.stem).strip("-._")
    if not _NAME.fullmatch(name):
        raise ModelError(
            f"{name!r} cannot be a model's name in the store: it takes letters, digits, '.', '-' and '_'; "
            "give another one with --name"
        )
    known = find_known(name)
    if known and store_name is None:
        raise ModelError(
            f"{given} has the name of a known model; if it is that one, give --name {known.name}, else another name "
            "with --name"
        )
    name = known.name if known else name
    return FolderSource(name, path) if path.is_dir() else GgufSource(name, path)


def _is_gguf(path: Path) -> bool:
    """By its first bytes, whatever its name is: other programs keep theirs as `sha256-...`."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); change its mode, or give another file") from error
