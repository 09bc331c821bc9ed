"""What a repository of the hub holds, and which of its files make the checkpoint; nothing that it says is trusted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.layout import SIDE_FILES
from mistral_nb.checkpoints.tokenizer_files import SENTENCEPIECE_FILES
from mistral_nb.checkpoints.untrusted import parse_object, read_object
from mistral_nb.errors import ModelError, PullError
from mistral_nb.foreign import clean
from mistral_nb.models.download import RemoteFile

__all__ = ["Choice", "Listing", "choose", "read_listing", "shards"]

_TOKENIZERS = (*SENTENCEPIECE_FILES, "tokenizer.json")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_TEXTS = re.compile(r"(LICEN[CS]E|NOTICE)[A-Za-z_-]*(\.(txt|md))?|README\.md")
_LAYOUTS = (("config.json", "model"), ("params.json", "consolidated"))
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX_LIMIT = 16_000_000
_LARGEST_TEXT = 1_000_000
_LARGEST_SMALL = 100_000_000
"""Bytes beyond which a file is no configuration and no tokenizer."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A commit of a repository: all its `names`, and what is needed to fetch those `files` that have a size and a sum.

    Names may be anything: a file is taken by a name that is known here, or by a plain one.
    """

    hub_id: str
    commit: str
    licence: str | None
    names: tuple[str, ...]
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True, slots=True)
class Choice:
    """The files that make the checkpoint. `index` names the weights where there are several; `weights` is a guess then.

    `small` has the tokenizer, the texts and the settings, without `config` and `index`.
    """

    config: RemoteFile
    index: RemoteFile | None
    small: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]

    @property
    def before_weights(self) -> tuple[RemoteFile, ...]:
        """All others, in the order of what may refuse the checkpoint."""
        return (self.config, *([self.index] if self.index else ()), *self.small)


def read_listing(answer: bytes, hub_id: str, url_of: Callable[[str, str], str]) -> Listing:
    """From the hub's JSON; `url_of(name, commit)` is where a file is. `ValueError` when it is no listing."""
    from huggingface_hub import ModelInfo

    try:
        info = ModelInfo(**parse_object(answer, "the listing"))  # type: ignore[no-untyped-call]
        siblings = [(str(each.rfilename), each) for each in info.siblings or ()]
        commit = str(info.sha)
        licence = getattr(info.card_data, "license", None)
        if not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise ValueError(f"the commit {clean(commit)!r}")
        files = {name: file for name, each in siblings if (file := _file(name, each, url_of, commit))}
    except (KeyError, TypeError, AttributeError, ModelError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if isinstance(licence, list):
        licence = ", ".join(str(each) for each in licence)
    return Listing(hub_id, commit, clean(licence) if licence else None, tuple(dict(siblings)), files)


def _file(name: str, told: Any, url_of: Callable[[str, str], str], commit: str) -> RemoteFile | None:
    """None for what lacks its size or its sum."""
    lfs = told.lfs
    size, found = (lfs.size, lfs.sha256) if lfs else (told.size, told.blob_id)
    sized = type(size) is int and size >= 0
    summed = isinstance(found, str) and re.fullmatch(r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}", found)
    return RemoteFile(name, url_of(name, commit), size, found, git=not lfs) if sized and summed else None


def choose(listing: Listing) -> Choice:
    """Hugging Face's layout if it is there, else Mistral's. `ModelError` for what this engine cannot run."""
    names = set(listing.names)
    for config, stem in _LAYOUTS:
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        if config not in names or not names & {single, index}:
            continue
        _check_tokenizer(listing)
        sharded = index in names and single not in names
        weights = _sharded(listing, stem) if sharded else [_wanted(listing, single)]
        small = [_small(listing, name) for name in listing.names if name in _TOKENIZERS + SIDE_FILES]
        texts = [file for name, file in listing.files.items() if _TEXTS.fullmatch(name) and file.size < _LARGEST_TEXT]
        return Choice(
            config=_small(listing, config),
            index=_small(listing, index) if sharded else None,
            small=(*small, *texts),
            weights=tuple(weights),
        )
    raise ModelError(_no_weights(listing))


def shards(listing: Listing, index: Path) -> tuple[RemoteFile, ...]:
    """The weight files that an index names. `ModelError` when it is none, or names what the repository lacks."""
    weight_map = read_object(index, _INDEX_LIMIT).get("weight_map")
    named = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    lacking = [
        name
        for name in named
        if name not in listing.names or not _PLAIN.fullmatch(name) or not name.endswith(".safetensors")
    ]
    if lacking or not named:
        told = f"{_some(lacking)}, no .safetensors file at the top level of the repository" if lacking else "no file"
        raise ModelError(f"{index.name} names {told}; choose another revision or model")
    return tuple(_wanted(listing, name) for name in named)


def _sharded(listing: Listing, stem: str) -> list[RemoteFile]:
    form = re.compile(rf"{stem}-\d+-of-\d+\.safetensors")
    return [file for name, file in listing.files.items() if form.fullmatch(name)]


def _wanted(listing: Listing, name: str) -> RemoteFile:
    if name not in listing.files:
        raise PullError(
            f"the hub does not tell the size and the sum of {clean(name)} in {listing.hub_id}, so it could not be "
            "checked; unset HF_ENDPOINT, or choose another model"
        )
    return listing.files[name]


def _small(listing: Listing, name: str) -> RemoteFile:
    file = _wanted(listing, name)
    if file.size > _LARGEST_SMALL:
        raise ModelError(
            f"{name} of {listing.hub_id} has {file.size / 1e6:.0f} MB, which it cannot need; choose another"
        )
    return file


def _check_tokenizer(listing: Listing) -> None:
    if not set(_TOKENIZERS) & set(listing.names):
        has = "only tekken.json, which is not supported" if "tekken.json" in listing.names else "no tokenizer"
        raise ModelError(
            f"{listing.hub_id} has {has}; choose a model with tokenizer.json or tokenizer.model, or convert it "
            "elsewhere and pull that folder"
        )


def _no_weights(listing: Listing) -> str:
    """Why a repository cannot be pulled, by what it holds."""
    hub_id, names = listing.hub_id, listing.names
    gguf = [name for name in names if name.lower().endswith(".gguf")]
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if "adapter_config.json" in names:
        return f"{hub_id} is an adapter (adapter_config.json), not a whole model; pull the model that it was made for"
    if gguf:
        return (
            f"{hub_id} has its weights as GGUF only ({_some(gguf)}); fetch one, such as with `hf download {hub_id} "
            f"{clean(gguf[0])} --local-dir .`, and run: mistral-nb pull ./{clean(gguf[0])}"
        )
    if pickles:
        return (
            f"{hub_id} has its weights as pickles only ({_some(pickles)}), which can run code when they are read, so "
            "they are not fetched; choose a model or a revision with .safetensors files"
        )
    if any(name.endswith(".safetensors") for name in names):
        return (
            f"{hub_id} has .safetensors files, but neither config.json with model.safetensors or its index, nor "
            "params.json with consolidated.safetensors; choose a model in one of those layouts"
        )
    return f"{hub_id} has no weights (no .safetensors file); choose another"


def _some(names: Iterable[str]) -> str:
    """Three names at most, and how many more."""
    shown = [clean(name) for name in names]
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    return ", ".join(shown[:3]) + more
