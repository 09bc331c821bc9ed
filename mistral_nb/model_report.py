"""The model store in words: which models there are, all about one of them, and what memory it would take here."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mistral_nb.checkpoints import ModelArgs, ModelDescription, choices_that_fit, describe, estimate
from mistral_nb.checkpoints.memory import CONTEXT
from mistral_nb.errors import ModelError, UnknownModel
from mistral_nb.hardware import Memory, gpu_memories, host_memory
from mistral_nb.models import (
    EMBEDDED,
    KNOWN,
    KnownModel,
    broken,
    canonical,
    find_known,
    installed,
    locate,
    store_path,
    unfinished,
)
from mistral_nb.models.manifest import PACKED, read_manifest
from mistral_nb.models.sources import source_of
from mistral_nb.models.staging import Staging
from mistral_nb.models.store import removable, store_folder
from mistral_nb.progress import amount
from mistral_nb.safe_markdown import plain_text
from mistral_nb.tables import indent, table

__all__ = [
    "kept_by_pull",
    "memory_report",
    "model_report",
    "models_summary",
    "models_table",
    "pulled",
    "unfinished_pulls",
]

USUAL_CONTEXT = 8192
"""Tokens: what the memory is told for besides the whole context, which may be far more than anybody asks for."""

_GO_ON = "pull it again, or drop it with: mistral-nb rm {}"
_BY_HAND = "placed by hand"
_PACKAGE = "registry package"


def models_table() -> str:
    """The known models and those in the store, and what is wrong with those that are broken."""
    here, wrong = {model.name: model for model in installed()}, broken()
    known = {model.name: model for model in KNOWN}
    rows = [("MODEL", "ALIASES", "INSTALLED", "SOURCE", "LICENCE")]
    for name in [*known, *sorted({*here, *wrong} - set(known))]:
        source, licence = _origin(store_folder(name))
        if name in known:
            source = source if name in here else _origin_of_known(known[name])
            licence = licence or known[name].licence
        absent = f"no ({amount(known[name].bytes)})" if name in known else ""
        state = amount(here[name].bytes) if name in here else "broken" if name in wrong else absent
        rows.append((name, ", ".join(known[name].aliases) if name in known else "", state, source, licence))
    problems = [f"{name} is broken: {problem}" for name, problem in wrong.items()]
    return plain_text("\n".join([table(rows), *problems, f"Store: {store_path()}"]))


def models_summary() -> str:
    """The models in the store in a line, those that are broken or half pulled, and where the store is."""
    here = ", ".join(f"{model.name} ({amount(model.bytes)})" for model in installed()) or "none"
    problems = [f"{name} is broken: {problem}" for name, problem in broken().items()]
    return plain_text("\n".join([here, *problems, *unfinished_pulls(), f"in {store_path()}"]))


def unfinished_pulls() -> list[str]:
    """A line on the pulls that were cut short, or are under way; none without any."""
    found = [f"{name}, {amount(size)}: {_GO_ON.format(name)}" for name, size in unfinished().items()]
    return [plain_text(f"Unfinished pulls: {'; '.join(found)}")] if found else []


def model_report(name: str) -> str:
    """All about one model: what it is, where it came from, and what memory it takes in each precision.

    `name` is a name, alias or hub id, or a checkpoint folder; of a known model that is not here it is told how to get
    it. `UnknownModel`, and `ModelError` for what is broken. Reads no weights.
    """
    half = _unfinished(name)
    known = find_known(name)
    if known and not os.path.isdir(store_folder(known.name)):
        return plain_text(_report_absent(known, half))
    try:
        model = canonical(name)
    except UnknownModel as error:
        if half:
            raise UnknownModel(f"{name} is not in the store, but an {half}") from error
        raise
    about = describe(locate(name))
    gpus, host = gpu_memories(), host_memory()
    memory = memory_report(about.args, model, [*gpus, *([host] if host else [])])
    facts = [*_facts(about), *([("besides", half)] if half else [])]
    return plain_text(f"{known.title if known else about.name}\n{indent(table(facts))}\n\n{memory}")


def memory_report(args: ModelArgs, model: str, memories: Sequence[Memory]) -> str:
    """What `model` takes in each precision with its whole context and a usual one, against what is free now."""
    parts = []
    with_device = any(memory.device == "cuda" for memory in memories)
    for memory in memories:
        rows: list[tuple[str, ...]] = [
            ("PRECISION", "CONTEXT", "WEIGHTS", "KV CACHE", "WORKSPACE", "TOTAL", "OPTIONS FOR SERVE")
        ]
        rows += _choices(args, memory, with_device)
        head = f"Memory on {memory.name}: {amount(memory.free)} free of {amount(memory.total)}"
        parts.append(f"{head}\n{indent(table(rows))}")
    if sum(memory.device == "cuda" for memory in memories) > 1:
        parts.append("The engine takes the first GPU that it sees; CUDA_VISIBLE_DEVICES=N shows it another one.")
    if not any(choices_that_fit(args, _left(memory), memory.device) for memory in memories):
        parts.append("Nothing fits now: free memory, or choose a smaller model.")
    else:
        parts.append(f"Run it with: mistral-nb serve --model {shlex.quote(model)} and the options of a row that fits")
    return "\n\n".join(parts)


def pulled(folder: Path, done: bool) -> str:
    """The last word of a pull; without `done`, it found the model there."""
    return f"{folder.name} is in {folder}" if done else f"{folder.name} is in {folder} already; nothing was to be done"


def kept_by_pull(model: str, store_name: str | None = None) -> str:
    """What a pull that was interrupted has left for the next one, in words."""
    source = source_of(model, store_name=store_name)
    assert source, "what nobody can pull cannot be interrupted"
    return Staging(store_path(), source.name).told()


def _unfinished(name: str) -> str:
    """That a pull of this model was cut short, or is under way; empty where none was."""
    try:
        store_name = removable(name)
    except ModelError:
        return ""
    size = unfinished().get(store_name)
    return "" if size is None else f"unfinished pull of it is there, {amount(size)}: {_GO_ON.format(store_name)}"


def _report_absent(known: KnownModel, half: str) -> str:
    fetched = f", from a download of {amount(known.download)}" if known.download < known.bytes else ""
    rows = [
        ("name", known.name),
        *([("aliases", ", ".join(known.aliases))] if known.aliases else []),
        ("source", _origin_of_known(known)),
        ("licence", known.licence),
        ("size", f"{amount(known.bytes)} on disk{fetched}"),
        ("here", f"no; run: mistral-nb pull {known.name}, in a notebook %mistral pull {known.name}"),
        *([("besides", half)] if half else []),
    ]
    return f"{known.title}\n{indent(table(rows))}"


def _facts(about: ModelDescription) -> Iterator[tuple[str, str]]:
    args = about.args
    source, _ = _origin(about.folder, whole=True)
    yield "name", about.name
    yield "folder", str(about.folder)
    yield "source", source
    yield (
        "architecture",
        f"{about.architecture}: {args.n_layers} layers of {args.dim}, {args.n_heads} heads, "
        + (f"{args.n_kv_heads} of keys and values"),
    )
    yield "layout", about.layout
    yield "parameters", f"{_count(about.parameters)} in {about.dtype}"
    window = args.sliding_window or args.context
    seen = f"each sees the last {window}" if window < args.context else "full attention"
    yield "context", f"{args.context} tokens, {seen}"
    yield "tokenizer", about.tokenizer
    yield "template", about.template
    yield "licence", about.licence or "not told"
    packed = sum(copy.stat().st_size for copy in (about.folder / PACKED).glob("*.safetensors"))
    yield "on disk", amount(about.bytes) + (f", and {amount(packed)} packed for the engine" if packed else "")


def _choices(args: ModelArgs, memory: Memory, with_device: bool) -> Iterator[tuple[str, ...]]:
    """A row for each precision of the device at the whole context, the usual one, and the largest one that fits."""
    fitting = {choice.precision: choice.context for choice in choices_that_fit(args, _left(memory), memory.device)}
    device = f"--device {memory.device} " if with_device else ""
    for precision in [choice.precision for choice in choices_that_fit(args, sys.maxsize, memory.device)]:
        largest = fitting.get(precision, 0)
        for context in sorted({args.context, min(USUAL_CONTEXT, args.context), largest} - {0}, reverse=True):
            need = estimate(args, precision, context, memory.device)
            cut = f" --context {context}" if context < args.context else ""
            options = f"{device}--precision {precision}{cut}" if context <= largest else "does not fit"
            own = CONTEXT[memory.device]
            sizes = (amount(size) for size in (need.weights, need.kv, need.workspace + own, need.total + own))
            yield precision, str(context), *sizes, options


def _left(memory: Memory) -> int:
    """Bytes for a model, of what is free before a process has begun."""
    return memory.free - CONTEXT[memory.device]


def _origin(folder: Path, *, whole: bool = False) -> tuple[str, str]:
    """Where a folder came from, with the `whole` commit or its beginning, and its licence, by its manifest."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return "", ""
    if manifest is None:
        return _BY_HAND, ""
    return _origin_of(manifest.source, whole), manifest.licence or ""


def _origin_of(source: Mapping[str, str], whole: bool) -> str:
    if "hub" in source:
        commit = source.get("commit", "")
        return f"{source['hub']} at {commit if whole else commit[:8]}"
    if "package" in source:
        return f"{_PACKAGE} {source['package']}"
    return source.get("path", "")


def _origin_of_known(known: KnownModel) -> str:
    return _PACKAGE if known.name == EMBEDDED else known.hub_id


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"
