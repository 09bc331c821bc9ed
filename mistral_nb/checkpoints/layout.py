"""Which files of a folder make the checkpoint, found without reading the weights; what is wrong with them by name."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mistral_nb.checkpoints.header import FRESH_S
from mistral_nb.checkpoints.tokenizer_files import tokenizer_file
from mistral_nb.checkpoints.untrusted import AGAIN, parse_object, quoted, read_bytes, readable, stay_inside
from mistral_nb.errors import ModelError

__all__ = ["SIDE_FILES", "CheckpointFiles", "Layout", "WeightFiles", "find_files", "find_weights"]

Layout = Literal["safetensors", "mistral"]
"""Hugging Face's safetensors folder, or Mistral's own consolidated one."""

SIDE_FILES = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
"""Files that the engine reads where they are there."""

_LAYOUTS: tuple[tuple[Layout, str, str], ...] = (
    ("safetensors", "config.json", "model.safetensors"),
    ("mistral", "params.json", "consolidated.safetensors"),
)
_INDEX_LIMIT = 8_000_000
_INDEX_VALUES = 200_000
_SHARDS = 1000
_NAME = 120
"""Characters of a shard's name, which is in every message about it."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".download")
_HUB_DOWNLOADS = Path(".cache", "huggingface", "download")


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The config and the weight files of a folder, which may have no tokenizer. `index` is None for a single file.

    `shards` maps a tensor, by its name in the files, to the file that the index says it is in; empty without an index.
    """

    layout: Layout
    config: Path
    index: Path | None
    weights: tuple[Path, ...]
    shards: dict[str, Path]


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """The files that make a checkpoint: `config` is config.json or params.json, `index` None for a single file."""

    folder: Path
    layout: Layout
    config: Path
    index: Path | None
    weights: tuple[Path, ...]
    tokenizer: Path


def find_files(folder: Path) -> CheckpointFiles:
    """The checkpoint's files, from names, sizes and small JSON files alone.

    `ModelError` names what is missing, half-written, a pickle, or leads out of the folder.
    """
    with readable(folder), _written(folder):
        found = _find_weights(folder)
        tokenizer = tokenizer_file(folder)
        stay_inside(tokenizer)
    return CheckpointFiles(folder, found.layout, found.config, found.index, found.weights, tokenizer)


def find_weights(folder: Path) -> WeightFiles:
    """As `find_files`, for a folder that need not have a tokenizer."""
    with readable(folder), _written(folder):
        return _find_weights(folder)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Around the finding of files, of which the hub's client may still be writing some.

    What it wrote to within the last minute refuses the folder; what is older tells why a file is missing.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give the folder of a checkpoint")
    downloads = _hub_downloads(folder)
    _refuse_unfinished(folder, filter(_is_fresh, downloads))
    try:
        yield
    except ModelError:
        _refuse_unfinished(folder, downloads)
        raise


def _find_weights(folder: Path) -> WeightFiles:
    names = frozenset(path.name for path in folder.iterdir())
    _refuse_unfinished(folder, (folder / name for name in sorted(names)))
    for name in SIDE_FILES:
        if name in names:
            stay_inside(folder / name)
    layout, config_name, single_name = _choose(folder, names)
    config, single, index = folder / config_name, folder / single_name, folder / f"{single_name}.index.json"
    stay_inside(config)
    if single_name in names:
        stay_inside(single)
        return WeightFiles(layout, config, None, (single,), {})
    stay_inside(index)
    shards = _read_index(index, names)
    return WeightFiles(layout, config, index, tuple(sorted(set(shards.values()))), shards)


def _hub_downloads(folder: Path) -> list[Path]:
    """What the hub's client has in the places where files grow. Some of it is left of downloads that were given up."""
    places = [folder / _HUB_DOWNLOADS]
    whole = folder.resolve()
    if whole.parent.name == "snapshots":
        places.append(whole.parent.parent / "blobs")
    return sorted(path for place in places if place.is_dir() for path in place.iterdir())


def _is_fresh(file: Path) -> bool:
    try:
        return 0 <= time.time() - file.lstat().st_mtime < FRESH_S
    except FileNotFoundError:  # it has just become whole
        return False


def _refuse_unfinished(folder: Path, files: Iterable[Path]) -> None:
    """Downloaders keep what they have not got whole under such names."""
    for file in files:
        if file.name.endswith(_UNFINISHED):
            inside = file.is_relative_to(folder)
            name = file.relative_to(folder).as_posix() if inside else f"../../blobs/{file.name}"
            raise ModelError(
                f"{folder} is still being written: it holds {quoted(name)}; wait for that download to end, "
                "or remove that file if none is running"
            )


def _choose(folder: Path, names: frozenset[str]) -> tuple[Layout, str, str]:
    """The layout with its names of config and weights. Hugging Face's is taken where both are there."""
    has_weights = [entry for entry in _LAYOUTS if entry[2] in names or f"{entry[2]}.index.json" in names]
    for entry in has_weights:
        if entry[1] in names:
            return entry
    if has_weights:
        _, config, weights = has_weights[0]
        raise ModelError(f"{folder} holds {weights}, or its index, but no {config}; {AGAIN}")
    if "adapter_config.json" in names:
        raise ModelError(
            f"{folder} is an adapter (adapter_config.json), not a whole model; give the folder of the model that it "
            "was made for, or of one that it was merged into"
        )
    ggufs = sorted(name for name in names if name.lower().endswith(".gguf"))
    if ggufs:
        raise ModelError(
            f"{folder} holds GGUF weights only; bring them into the store with: "
            f"mistral-nb pull {shlex.quote(str(folder / quoted(ggufs[0])))}"
        )
    pickles = sorted(name for name in names if name.lower().endswith(_PICKLES))
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only ({quoted(pickles[0])}), which can run any code and are never opened; "
            "fetch the safetensors version of the model"
        )
    raise ModelError(
        f"{folder} holds no weights (no model.safetensors or consolidated.safetensors, nor an index of either); "
        "give the folder of a checkpoint"
    )


def _read_index(index: Path, names: frozenset[str]) -> dict[str, Path]:
    """Each tensor's shard. A shard is a safetensors file beside its index, one of the folder's `names`."""
    weight_map = parse_object(read_bytes(index, _INDEX_LIMIT), str(index), values=_INDEX_VALUES, unique=True).get(
        "weight_map"
    )
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map, or an empty one; {AGAIN}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise ModelError(f"{index} gives {quoted(tensor)} a shard that is no file name; {AGAIN}")
    shards = set(weight_map.values())
    if len(shards) > _SHARDS:
        raise ModelError(f"{index} names {len(shards)} shards, and at most {_SHARDS} make sense; {AGAIN}")
    files = dict(_shard_paths(index, sorted(shards), names))
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _shard_paths(index: Path, shards: list[str], names: frozenset[str]) -> Iterator[tuple[str, Path]]:
    for name in shards:
        if name in ("", ".", "..") or any(sign in name for sign in "/\\:\0"):
            raise ModelError(f"{index} points outside its folder, to {quoted(name)}; {AGAIN}")
        if not name.isprintable() or len(name) > _NAME:
            raise ModelError(f"{index} names the shard {quoted(name)}, which is no plain file name; {AGAIN}")
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{index} names {quoted(name)}, which is no safetensors file and was not opened; "
                "fetch the safetensors version of the model"
            )
        if name not in names:
            raise ModelError(f"{index.parent} lacks the shard {quoted(name)}; {AGAIN}")
        stay_inside(index.parent / name)
        yield name, index.parent / name
