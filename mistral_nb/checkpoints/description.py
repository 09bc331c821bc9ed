"""What may be said of a model without loading it, after every check that can be made so."""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mistral_nb.checkpoints.layout import SIDE_FILES, find_files
from mistral_nb.checkpoints.tokenizer_files import speaks_mistral, template_source
from mistral_nb.checkpoints.untrusted import open_file, quoted, read_object, readable, stay_inside
from mistral_nb.checkpoints.vocabulary import TokenizerFacts, check_vocabulary, read_tokenizer
from mistral_nb.errors import ModelError

__all__ = ["ModelDescription", "describe"]

_LAYOUTS = {"safetensors": "safetensors", "mistral": "Mistral's consolidated safetensors"}
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_README_LICENCE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]+)", re.MULTILINE)
_LICENCE = 80
_BEGINNING = 65_536
_MANIFEST = "mistral_nb.json"


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A model in words and numbers. `bytes` is what its files take on disk; `licence` is None where nothing says."""

    name: str
    folder: Path
    architecture: str
    layout: str
    parameters: int
    dtype: str
    args: ModelArgs
    tokenizer: str
    template: str
    licence: str | None
    bytes: int
    checkpoint: Checkpoint


def describe(folder: Path) -> ModelDescription:
    """Check all of a checkpoint that can be checked without reading its weights, and say what it is.

    `ModelError` names what is wrong. Nothing of the folder is imported, executed, unpickled or rendered.
    """
    with readable(folder):
        return _describe(folder)


def _describe(folder: Path) -> ModelDescription:
    files = find_files(folder)
    checkpoint = open_checkpoint(folder)
    facts = read_tokenizer(files.tokenizer)
    mistral = _is_mistral(checkpoint)
    check_vocabulary(files.tokenizer, facts, checkpoint.args.vocab_size, mistral=mistral)
    kinds = Counter[str]()
    for tensor in checkpoint.tensors.values():
        kinds[tensor.dtype] += tensor.end - tensor.start
    shards = len(files.weights)
    sides = [folder / name for name in SIDE_FILES if (folder / name).is_file()]
    for side in sides:
        if side.suffix == ".json":
            read_object(side)
    return ModelDescription(
        name=_name(folder),
        folder=folder,
        architecture="Mistral" if mistral else "Llama",
        layout=f"{_LAYOUTS[files.layout]}, {shards} file{'s' if shards > 1 else ''}",
        parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        dtype=", ".join(kind for kind, _ in kinds.most_common()),
        args=checkpoint.args,
        tokenizer=f"{facts.kind}, {facts.size} tokens ({files.tokenizer.name})",
        template=_template(files.tokenizer, facts),
        licence=quoted(licence[:_LICENCE]) if (licence := _licence(folder)) else None,
        bytes=sum(path.stat().st_size for path in (*checkpoint.files, files.tokenizer, *sides)),
        checkpoint=checkpoint,
    )


def _is_mistral(checkpoint: Checkpoint) -> bool:
    if checkpoint.layout == "mistral":
        return True
    config = read_object(checkpoint.folder / "config.json")
    return config.get("model_type") == "mistral" or config.get("architectures") == ["MistralForCausalLM"]


def _name(folder: Path) -> str:
    """The folder's name; of a snapshot in the Hugging Face cache, `org/name`."""
    repository = folder.resolve().parent.parent.name
    if folder.resolve().parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return folder.absolute().name


def _template(tokenizer: Path, facts: TokenizerFacts) -> str:
    folder = tokenizer.parent
    if speaks_mistral(folder):
        if "[SYSTEM_PROMPT]" in facts.controls or not {"<s>", "</s>"} <= facts.controls:
            raise ModelError(
                f"{tokenizer} is a Mistral tokenizer that is none of v1 to v3, which are what is supported; "
                "choose another model"
            )
        return "Mistral v3" if "[INST]" in facts.controls else "Mistral v1"
    source = template_source(folder)
    return "none: raw prompts only" if source is None else f"chat template (Jinja), {len(source)} characters"


def _licence(folder: Path) -> str | None:
    """By the manifest of a pull, else a licence file's first line, else the README's front matter."""
    manifest = folder / _MANIFEST
    if manifest.is_file():
        with suppress(ModelError):
            licence = read_object(manifest).get("licence")
            if isinstance(licence, str) and licence:
                return licence
    for name in _LICENCE_FILES:
        lines = [line.strip(" #") for line in _beginning(folder / name).splitlines()]
        if any(lines):
            return next(line for line in lines if line)
    before, _, rest = _beginning(folder / "README.md").partition("---")
    found = None if before.strip() else _README_LICENCE.search(rest.partition("\n---")[0])
    return found[1] if found else None


def _beginning(path: Path) -> str:
    """The first 64 kB of a text; empty where there is none, or none of this folder."""
    if not path.is_file():
        return ""
    try:
        stay_inside(path)
        with open_file(path) as file:
            return file.read(_BEGINNING).decode(errors="replace")
    except ModelError:
        return ""
