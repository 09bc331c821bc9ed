"""The store: a folder of checkpoint folders, and what may be said of each without loading it.

A folder in the store is an ordinary checkpoint: one that was pulled, with its manifest, or one that the user placed
there. What is hidden belongs to pulls under way. A folder that lacks a file, or whose files are not of their manifest's
sizes, is not installed.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mistral_nb.checkpoints import find_files
from mistral_nb.checkpoints.untrusted import readable
from mistral_nb.errors import ModelError, UnknownModel
from mistral_nb.locks import StartLock
from mistral_nb.models.known import BY_NAME, KNOWN, find_known
from mistral_nb.models.manifest import MANIFEST, PACKED, Manifest, damage, is_newer, read_manifest, strangers
from mistral_nb.models.staging import file_sha256, staging_path
from mistral_nb.progress import Progress

__all__ = [
    "InstalledModel",
    "broken",
    "canonical",
    "clear_leftovers",
    "clear_removed",
    "existing_path",
    "installed",
    "is_hub_id",
    "locate",
    "locate_in_store",
    "lock_path",
    "packed_folder",
    "removable",
    "remove",
    "store_folder",
    "store_name_of_hub_id",
    "store_path",
    "unfinished",
    "verify",
]

_REMOVED = ".removed-"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_ID_LIMIT = 96
_REVISION = re.compile(r"[\w.][\w./-]*")
_NO_NAMES = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A checkpoint in the store; `bytes` is its size on disk. A known model has its own name, whatever its folder's."""

    name: str
    path: Path
    title: str
    bytes: int


def store_path() -> Path:
    """The folder of the store, which need not exist: `$MISTRAL_NB_HOME/models`, else the user's data folder."""
    home = os.environ.get("MISTRAL_NB_HOME")
    base = Path(home).expanduser() if home else platformdirs.user_data_path("mistral-nb", appauthor=False)
    return Path(base).absolute() / "models"


def lock_path(name: str) -> Path:
    """The file of the lock under which the store's model of that name is made and removed."""
    return store_path() / f".{name}.lock"


def store_folder(name: str) -> Path:
    """The store's folder of a store name, which need not exist: of a known model, whichever spelling of it is there.

    The exact name comes first. Aliases and the hub's spelling count, in whatever case.
    """
    store = store_path()
    known = find_known(name)
    if known is None or os.path.lexists(store / name):
        return store / name
    spellings = {spelling.lower() for spelling in (known.name, *known.aliases, known.hub_id.partition("/")[2])}
    return store / next((entry for entry in _entries() if entry.lower() in spellings), name)


def packed_folder(name: str) -> Path | None:
    """The folder for the packed copies of a model in the store: in the model's own, so that they go where it goes.

    None for a folder elsewhere and for a link to one, which are the user's own.
    """
    if Path(name).is_absolute():
        return None
    folder = store_folder(name)
    return None if folder.is_symlink() else folder / PACKED


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hugging Face hub id, `org/name`."""
    return len(name) <= _HUB_ID_LIMIT and _HUB_ID.fullmatch(name) is not None and ".." not in name


def existing_path(name: str) -> Path | None:
    """The path that a user's word leads to, if something is there. `ModelError` where the system does not tell."""
    try:
        path = Path(name).expanduser()
        path.stat()
    except (ValueError, RuntimeError):  # a NUL, and the home of nobody
        return None
    except OSError as error:
        if error.errno in _NO_NAMES:
            return None
        raise ModelError(f"{name} cannot be read ({error.strerror}); check its permissions and the disk") from error
    return path if name else None


def store_name_of_hub_id(hub_id: str) -> str:
    """The name in the store of a model from the hub: a known model's own, else `org--name`."""
    known = find_known(hub_id)
    return known.name if known else hub_id.replace("/", "--")


def canonical(name: str) -> str:
    """The store name of a name, alias or hub id, or the absolute path of an existing folder. Else `UnknownModel`.

    A known model has its own name whatever its folder's, see `store_folder`; a folder of the very name comes first.
    """
    known = find_known(name)
    in_store = {folder.name for folder in _folders()}
    if name in in_store:
        return _model_name(store_path() / name)
    if known:
        return known.name
    if is_hub_id(name) and store_name_of_hub_id(name) in in_store:
        return store_name_of_hub_id(name)
    path = existing_path(name)
    if path and path.is_dir():
        return str(path.resolve())
    if path and path.suffix.lower() == ".gguf":
        raise UnknownModel(f"{name} is a GGUF file; bring it into the store with: mistral-nb pull {name}")
    if is_hub_id(name):
        raise UnknownModel(f"{name} is not in the store, nor a folder here; run: mistral-nb pull {name}")
    near = difflib.get_close_matches(name.lower(), {*BY_NAME, *in_store}, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    names = ", ".join(sorted({model.name for model in KNOWN} | in_store))
    raise UnknownModel(
        f"no model {name!r}: {hint}Known are {names} (embedded is the small one); or give a folder, or ORG/NAME of the "
        "Hugging Face hub"
    )


def installed() -> list[InstalledModel]:
    """The whole checkpoints in the store, by name."""
    found = []
    for folder in _folders():
        with suppress(ModelError, OSError):
            name = _model_name(folder)
            locate_in_store(name)
            known = find_known(name)
            title = known.title if known and known.name == name else name
            found.append(InstalledModel(name, folder, title, _size(folder, follow_symlinks=True)))
    return found


def broken() -> dict[str, str]:
    """What is wrong with those folders in the store that are no whole checkpoints, by name, with the next step."""
    problems = {}
    for folder in _folders():
        name = _model_name(folder)
        try:
            locate_in_store(name)
        except ModelError as error:
            problems[name] = str(error)
    return problems


def unfinished() -> dict[str, int]:
    """The names of models whose pull was cut short, or is under way, and the bytes on disk."""
    prefix = staging_path(store_path(), "").name
    return {
        entry.removeprefix(prefix): _size(store_path() / entry, follow_symlinks=False)
        for entry in _entries(hidden=True)
        if entry.startswith(prefix) and os.path.isdir(store_path() / entry)
    }


def locate(name: str) -> Path:
    """The folder of a model. `ModelError`, with the command to run, when it is not there or lacks a file.

    What is in the files is not read: `mistral_nb.checkpoints.describe` does that.
    """
    store_name = canonical(name)
    if not Path(store_name).is_absolute():
        return locate_in_store(store_name)
    return _whole(Path(store_name), lambda: f"copy it again, or, if you changed it yourself, remove its {MANIFEST}")


def locate_in_store(name: str) -> Path:
    """The store's folder of that name; otherwise as `locate`."""
    folder = store_folder(name)
    if not os.path.isdir(folder):
        raise ModelError(f"{name} is not in the store; run: {_pull_command(name, folder)}")
    return _whole(folder, lambda: _mending(name, folder))


def verify(name: str, progress: Callable[[Progress], None] = lambda progress: None) -> list[str]:
    """Read every file of a pulled model: what is wrong by the manifest's SHA-256 sums, one line each; empty if nothing.

    `ModelError` for a model that is not there and for one that was not pulled, since nobody knows its sums.
    """
    folder = locate(name)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ModelError(f"{folder} was not pulled, so there are no sums to compare; pull it from where it came")
    wrong = []
    total, before = sum(entry.size for entry in manifest.files.values()), 0
    for file, entry in manifest.files.items():

        def report(step: str, done: int, size: int | None, before: int = before) -> None:
            progress(Progress(step, before + done, total))

        try:
            found = file_sha256(folder / file, report)
        except OSError as error:
            wrong.append(f"{file} cannot be read ({error.strerror or error})")
        else:
            if found != entry.sha256:
                wrong.append(f"{file} has the SHA-256 {found}, not {entry.sha256}")
        before += entry.size
    return wrong


def removable(name: str) -> str:
    """The store name of what is in the store, or was begun to be pulled or removed; errors as of `remove`."""
    store = store_path()
    known = find_known(name)
    if known and name not in _entries():
        store_name = known.name
    else:
        store_name = store_name_of_hub_id(name) if is_hub_id(name) else name
    plain = store_name != "" and Path(store_name).name == store_name and not store_name.startswith(".")
    left = (staging_path(store, store_name), store / f"{_REMOVED}{store_name}")
    if plain and (os.path.lexists(store_folder(store_name)) or any(map(os.path.isdir, left))):
        return _model_name(store_folder(store_name))
    path = existing_path(name)
    if path and path.is_dir():
        raise ModelError(f"{name} is no model of the store but a folder of yours; remove it yourself")
    here = ", ".join(folder.name for folder in _folders()) or "nothing"
    raise UnknownModel(f"{store_name!r} is not in the store, which holds {here}; give one of those")


def remove(name: str) -> int:
    """Remove a model from the store, with what an unfinished pull of it left: the bytes that were freed.

    Of a link only the link goes. `UnknownModel` for a name that is not there. `ModelError` for a folder elsewhere,
    which is the user's own, while the model is being pulled, and when the store cannot be written. Whether an engine
    has it loaded is the caller's to ask.
    """
    store_name = removable(name)
    lock = StartLock(lock_path(store_name))
    try:
        if not lock.try_acquire():
            raise ModelError(f"{store_name} is being pulled; interrupt that pull first")
        try:
            freed = _remove_locked(store_name)
        finally:
            lock.release()
    except OSError as error:
        raise ModelError(
            f"{store_name} cannot be removed ({error}); mend that, then run: mistral-nb rm {store_name}"
        ) from error
    clear_leftovers(store_name)
    return freed


def clear_leftovers(name: str) -> None:
    """Remove what pulls left beside a model that is there, and what `clear_removed` does."""
    _clear(staging_path(store_path(), name), name)
    clear_removed()


def clear_removed() -> None:
    """Remove what removals that were cut short left, of whatever model."""
    for folder in store_path().glob(f"{_REMOVED}*"):
        _clear(folder, folder.name.removeprefix(_REMOVED))


def _clear(folder: Path, owner: str) -> None:
    """Not while somebody holds the lock of that model, and not where the store cannot be written."""
    with suppress(OSError):
        if folder.exists() and (lock := StartLock(lock_path(owner))).try_acquire():
            try:
                shutil.rmtree(folder)
            finally:
                lock.release()


def _remove_locked(name: str) -> int:
    store = store_path()
    folder, staging, gone = store_folder(name), staging_path(store, name), store / f"{_REMOVED}{name}"
    freed = 0
    for each in (gone, staging):
        if each.exists():
            freed += _size(each, follow_symlinks=False)
            shutil.rmtree(each)
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        freed += _size(folder, follow_symlinks=False)
        folder.rename(gone)
        shutil.rmtree(gone)
    return freed


def _pull_command(name: str, folder: Path) -> str:
    """The command that makes a model in the store whole again, by its name or by what its manifest tells."""
    known = find_known(name)
    manifest: Manifest | None = None
    with suppress(ValueError):
        manifest = read_manifest(folder)
    source = manifest.source if manifest else {}
    revision = source.get("revision", "main")
    option = f" --revision {revision}" if revision != "main" and _REVISION.fullmatch(revision) else ""
    if source.get("path", "").isprintable() and "path" in source:
        return f"mistral-nb pull {shlex.quote(source['path'])} --name {name}"
    if known:
        return f"mistral-nb pull {known.aliases[0] if known.aliases else known.name}{option}"
    if is_hub_id(source.get("hub", "")):
        return f"mistral-nb pull {source['hub']}{option}"
    return f"mistral-nb rm {name}, and pull it again from where it came"


def _mending(name: str, folder: Path) -> str:
    """The next step for a folder in the store that does not match its manifest: a pull does not replace all of them."""
    by_hand = f"or, if you changed it yourself, remove its {MANIFEST}"
    if folder.is_symlink() or strangers(folder):
        return f"move it away or run: mistral-nb rm {name}, then pull it again, {by_hand}"
    return f"run: {_pull_command(name, folder)}, {by_hand}"


def _whole(folder: Path, advice: Callable[[], str]) -> Path:
    with readable(folder):
        problem = damage(folder)
        if problem:
            mending = "upgrade mistral-nb" if is_newer(folder) else advice()
            raise ModelError(f"{folder} does not match its manifest ({problem}); {mending}")
        find_files(folder)
    return folder


def _model_name(folder: Path) -> str:
    """The name of the model in a folder of the store: a known model's own where the folder is a spelling of it."""
    known = find_known(folder.name)
    return known.name if known and store_folder(known.name) == folder else folder.name


def _entries(*, hidden: bool = False) -> list[str]:
    """The names in the store, sorted; what is hidden is a pull's own. `ModelError` for a store that cannot be read."""
    store = store_path()
    try:
        return sorted(name for name in os.listdir(store) if hidden or not name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ModelError(
            f"the store {store} cannot be read ({error.strerror}); mend that, or set MISTRAL_NB_HOME to another folder"
        ) from error


def _folders() -> list[Path]:
    """The store's folders by name, whole or not."""
    return [store_path() / name for name in _entries() if os.path.isdir(store_path() / name)]


def _size(folder: Path, *, follow_symlinks: bool) -> int:
    """The bytes of the files in a folder and below."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # a pull under way moves its own
            size += path.stat(follow_symlinks=follow_symlinks).st_size if path.is_file() else 0
    return size
