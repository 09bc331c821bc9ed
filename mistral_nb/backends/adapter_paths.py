"""A folder in the place of an adapter's name: made whole for an engine on this machine, and sent to nobody else."""

from __future__ import annotations

import os
from pathlib import Path

from mistral_nb.errors import InvalidRequest
from mistral_nb.finetunes.adapter import CONFIG_FILE, is_path
from mistral_nb.types import GenerationRequest

__all__ = ["refuse_path", "with_whole_path"]


def with_whole_path(request: GenerationRequest) -> GenerationRequest:
    """`request` with its adapter's path from the root on, where it has one: the engine has a folder of its own.

    `InvalidRequest` for the home folder of nobody.
    """
    if request.lora is None or not is_path(request.lora):
        return request
    try:
        return request.with_(lora=str(Path(request.lora).expanduser().absolute()))
    except RuntimeError as error:
        raise InvalidRequest("lora", request.lora, "nobody here is called so; give the folder by its path") from error


def refuse_path(request: GenerationRequest, instead: str, *, slash_in_names: bool = False) -> None:
    """`InvalidRequest` for a path, which tells others what folders are here; `instead` is what to do.

    `slash_in_names` is for servers whose adapters may be called as org/adapter.
    """
    lora = request.lora
    if lora is None or not is_path(lora) or (slash_in_names and _may_be_a_name(lora)):
        return
    raise InvalidRequest("lora", lora, f"is a folder's path, which only an engine here takes; {instead}")


def _may_be_a_name(lora: str) -> bool:
    path = Path(lora)
    begins_as_path = lora.startswith((".", "~")) or path.anchor
    return not begins_as_path and "\\" not in lora and not os.path.isfile(path / CONFIG_FILE)
