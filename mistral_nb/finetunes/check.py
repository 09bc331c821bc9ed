"""Checks an adapter's folder before anything is done with it: its names, its configuration, its matrices, its model.

No tensor is read, and nothing in the folder is executed or changed. The limits are Cloudflare's published ones.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.adapter_files import CONFIG_FILE, CONFIG_LIMIT, WEIGHTS_FILE, is_count, is_scale
from mistral_nb.checkpoints.adapter_tensors import LoraTensors, read_tensors
from mistral_nb.checkpoints.untrusted import quoted, read_object, readable, stay_inside
from mistral_nb.errors import AdapterError, ModelError
from mistral_nb.finetunes import rules
from mistral_nb.finetunes.adapter import ASSETS

__all__ = ["AdapterInfo", "check", "fixed_copy", "inspect"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What an adapter is. `name` is its folder's; `bytes` the size of its weights; `files` all that lies in its folder.

    `base_model`, `model_type`, `rank` and `alpha` are None where the folder tells none; `rank` is the matrices' own.
    """

    name: str
    base_model: str | None
    model_type: str | None
    rank: int | None
    alpha: float | None
    target_modules: tuple[str, ...]
    dtype: str
    parameters: int
    bytes: int
    files: tuple[str, ...]
    warnings: tuple[str, ...]


def inspect(folder: Path) -> AdapterInfo:
    """What the adapter in a folder is, fit for use or not. `AdapterError` where its two files cannot be read."""
    survey = _Survey(folder)
    if survey.config is None or survey.tensors is None:
        raise survey.error()
    return survey.info


def check(folder: Path, *, for_cloudflare: bool) -> AdapterInfo:
    """What the adapter in a folder is. `AdapterError` with everything that is wrong with it, all at once."""
    survey = _Survey(folder)
    survey.judge(for_cloudflare)
    if survey.problems:
        raise survey.error()
    return survey.info


def fixed_copy(folder: Path, target: Path) -> AdapterInfo:
    """A copy of an adapter of Mistral-7B, in a new folder, whose configuration says so with `model_type`.

    A copy, since PEFT before 0.13 refuses to load a configuration with a key that it does not know. `AdapterError` with
    whatever else makes the adapter unfit for Cloudflare: then there is no copy.
    """
    survey = _Survey(folder)
    if survey.config is not None:
        survey.config["model_type"] = rules.MODEL_TYPE
    survey.judge(for_cloudflare=True)
    if survey.problems:
        raise survey.error()
    try:
        with _new_folder(target):
            (target / CONFIG_FILE).write_text(f"{json.dumps(survey.config, indent=2)}\n", encoding="utf-8")
            shutil.copyfile(folder / WEIGHTS_FILE, target / WEIGHTS_FILE)
    except OSError as error:
        raise AdapterError(f"{target} cannot be made ({error.strerror}); check the disk and its permissions") from error
    return check(target, for_cloudflare=True)


@contextmanager
def _new_folder(path: Path) -> Iterator[None]:
    """Make a folder, which is gone again where the block fails."""
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise AdapterError(f"{path} is there already; name a new folder for the copy") from error
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


class _Survey:
    """One adapter's folder as it is read: what could be read of it, what is wrong, what should be known."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.config: dict[str, Any] | None = None
        self.tensors: LoraTensors | None = None
        with readable(folder):
            if not folder.is_dir():
                raise AdapterError(f"{quoted(folder)} is no folder; give the one PEFT's save_pretrained has written")
            self.files = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_file()))
            missing = [name for name in ASSETS if name not in self.files]
            self.problems += [_instead_of(name, folder, self.files) for name in missing]
            if CONFIG_FILE not in missing and self._may_open(CONFIG_FILE):
                with self._noting():
                    self.config = read_object(folder / CONFIG_FILE, CONFIG_LIMIT)
            if WEIGHTS_FILE not in missing and self._may_open(WEIGHTS_FILE):
                with self._noting():
                    self.tensors = read_tensors(folder / WEIGHTS_FILE)

    @property
    def info(self) -> AdapterInfo:
        config, tensors = self.config, self.tensors
        assert config is not None
        assert tensors is not None
        rank = config.get("r")
        alpha = config.get("lora_alpha")
        return AdapterInfo(
            name=self.folder.resolve().name,
            base_model=rules.text(config.get("base_model_name_or_path")),
            model_type=rules.text(config.get("model_type")),
            rank=tensors.rank or (rank if is_count(rank) else None),
            alpha=float(alpha) if is_scale(alpha) else None,
            target_modules=tensors.modules,
            dtype=", ".join(tensors.dtypes),
            parameters=tensors.parameters,
            bytes=tensors.bytes,
            files=self.files,
            warnings=tuple(self.warnings),
        )

    def error(self) -> AdapterError:
        if len(self.problems) == 1:
            told = f"{self.folder}: {self.problems[0]}"
        else:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            told = f"{self.folder} has {len(self.problems)} problems:{listed}"
        return AdapterError(told, tuple(self.problems))

    def judge(self, for_cloudflare: bool) -> None:
        """Find what is wrong with what was read, and what should be known."""
        found = rules.judge(self.config, self.tensors)
        self.problems += found.problems
        self.warnings += found.warnings
        if for_cloudflare:
            found = rules.judge_for_cloudflare(self.config, self.tensors, self.folder)
            self.problems += found.problems
            self.warnings += found.warnings

    def _may_open(self, name: str) -> bool:
        """Whether a file is a regular one in the folder; else it is a problem."""
        before = len(self.problems)
        with self._noting():
            stay_inside(self.folder / name)
        return len(self.problems) == before

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """A `ModelError` of the block is one problem more."""
        try:
            yield
        except ModelError as error:
            self.problems.append(str(error).replace(f"{self.folder}{os.sep}", ""))


def _instead_of(wanted: str, folder: Path, files: tuple[str, ...]) -> str:
    """That a file is missing, and which one may be meant."""
    same = next((name for name in files if name.lower() == wanted.lower()), None)
    if same:
        return f"{same} must be called {wanted}; rename it"
    inside = next((entry.name for entry in sorted(folder.iterdir()) if (entry / wanted).is_file()), None)
    if inside:
        return f"there is no {wanted}; there is one in {quoted(inside)}: give that folder"
    if wanted == CONFIG_FILE:
        return f"there is no {CONFIG_FILE}; PEFT's save_pretrained writes it beside the weights"
    pickle = next((name for name in files if name.endswith(_PICKLES)), None)
    if pickle:
        return (
            f"{quoted(pickle)} is a pickle, which may run code when it is opened; it was not. Load the adapter with "
            f"PEFT where you trust it, and save_pretrained writes {WEIGHTS_FILE}"
        )
    other = next((name for name in files if name.endswith(".safetensors")), None)
    if other:
        return f"there is no {WEIGHTS_FILE}; if {quoted(other)} is the adapter, rename it"
    return f"there is no {WEIGHTS_FILE}; PEFT's save_pretrained writes it"
