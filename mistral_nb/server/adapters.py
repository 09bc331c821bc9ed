"""Which adapter a request names: one of this machine's store, or a folder, for one who may read files here."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_nb.checkpoints.adapter_files import looks
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.errors import AdapterError, InvalidRequest, ModelError
from mistral_nb.finetunes import AdapterStore
from mistral_nb.finetunes.adapter import ASSETS, is_path
from mistral_nb.server.schemas import WireError, shortened
from mistral_nb.types import GenerationRequest

__all__ = ["Adapters", "Named"]

_NO_PATHS = (
    "a folder's path is for programs that find the engine by its record on its machine, as notebooks there do; "
    "add it with `mistral-nb lora add FOLDER --name NAME` there, and give the name"
)


@dataclass(frozen=True, slots=True)
class Named:
    """An adapter whose files are there: what the request calls it, and its folder.

    `key` is equal only where the files are: it has the store's id or the folder, and what the files look like now.
    """

    name: str
    key: str
    folder: Path
    looks: str

    def refused(self, error: AdapterError) -> InvalidRequest:
        """That the engine does not apply it, and why; where the store is, callers are not told."""
        why = "; ".join(error.problems) or str(error).removeprefix(f"{self.folder}: ")
        why = why.replace(f"the adapter {quoted(self.folder.name)} ", "it ")
        return InvalidRequest("lora", self.name, why.replace(f"{self.folder}{os.sep}", ""))


class Adapters:
    """Finds what requests name. Whether it can be applied to the model is the engine's to say."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._fitting: dict[str, bool] = {}

    def find(self, request: GenerationRequest, *, paths: bool) -> Named | None:
        """The adapter of a request, None where it asks for none. `paths` says whether the caller may name a folder.

        `WireError` 3037 (404) for one that is not there or cannot be read, 3039 (400) for one that lacks files, 5006
        (400) for a scale without one; `InvalidRequest` for a folder of one who may not name any.
        """
        if request.lora is None:
            if request.lora_scale is not None:
                raise WireError(400, 5006, "lora_scale: there is no adapter to weigh; name one with lora", "lora_scale")
            return None
        if is_path(request.lora):
            if not paths:
                raise InvalidRequest("lora", request.lora, _NO_PATHS)
            folder = _folder(request.lora)
            return self._named(request.lora, str(folder), folder)
        adapter = self._store.find(request.lora)
        if adapter is None:
            raise _unknown(request.lora, [each.name for each in self._store.list()])
        return self._named(request.lora, adapter.id, self._store.path(adapter))

    def knows(self, id_or_name: str) -> bool:
        return self._store.find(id_or_name) is not None

    def usable(self, fits: Callable[[Named], bool]) -> tuple[str, ...]:
        """The names of those in the store that have their files and fit, the oldest first. Each is asked about once."""
        found, fitting = [], {}
        for adapter in self._store.list():
            with suppress(WireError):
                named = self._named(adapter.name, adapter.id, self._store.path(adapter))
                known = self._fitting.get(named.key)
                fitting[named.key] = fits(named) if known is None else known
                found += [adapter.name] if fitting[named.key] else []
        self._fitting = fitting
        return tuple(found)

    def _named(self, lora: str, whose: str, folder: Path) -> Named:
        missing = " and ".join(name for name in ASSETS if not _is(stat.S_ISREG, folder / name, lora))
        if missing:
            advice = "give the folder that PEFT's save_pretrained has written" if is_path(lora) else "upload it"
            raise WireError(400, 3039, f"the finetune {lora!r} lacks {missing}; {advice}", "lora")
        try:
            seen = looks(folder)
        except ModelError as error:
            raise WireError(404, 3037, f"the finetune {lora!r} was removed just now; name another", "lora") from error
        return Named(lora, f"{whose} {seen}", folder, seen)


def _folder(lora: str) -> Path:
    folder = Path(lora)
    if not folder.is_absolute():
        told = f"{lora!r} is relative, and the engine has a folder of its own; give the whole path on its machine"
        raise WireError(404, 3037, told, "lora")
    if not _is(stat.S_ISDIR, folder, lora):
        told = f"there is no folder {lora!r} on the engine's machine; give one that PEFT's save_pretrained has written"
        raise WireError(404, 3037, told, "lora")
    return folder.resolve()


def _is(kind: Callable[[int], bool], path: Path, lora: str) -> bool:
    """Whether a file of that kind is at `path`. `WireError` 3037 where the engine cannot tell."""
    try:
        return kind(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        told = f"the adapter {lora!r} cannot be read ({error.strerror}); let the engine's user read it"
        added = ", or add it to this machine with `mistral-nb lora add FOLDER`" if is_path(lora) else ""
        raise WireError(404, 3037, f"{told}{added}", "lora") from error


def _unknown(lora: str, names: Sequence[str]) -> WireError:
    near = difflib.get_close_matches(shortened(lora), names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    listed = "`mistral-nb lora list` shows those there are"
    return WireError(404, 3037, f"no finetune {lora!r} here{hint}; {listed}; a folder is given by its path", "lora")
