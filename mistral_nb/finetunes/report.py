"""What the commands about adapters print: tables of them, what one is, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mistral_nb.checkpoints import open_checkpoint
from mistral_nb.checkpoints.adapter_files import RANK, RANK_ON_CPU, open_adapter
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.config import Settings
from mistral_nb.errors import AdapterError, ModelError
from mistral_nb.finetunes.adapter import DEFAULT_MODEL, Adapter
from mistral_nb.finetunes.check import AdapterInfo, check, fixed_copy
from mistral_nb.finetunes.cloudflare import listed
from mistral_nb.finetunes.store import AdapterStore
from mistral_nb.models import installed
from mistral_nb.progress import amount
from mistral_nb.tables import table

__all__ = [
    "account_report",
    "add_report",
    "check_report",
    "local_report",
    "public_report",
    "pushed",
    "remove_report",
]


def local_report() -> str:
    """The adapters on this machine."""
    store = AdapterStore()
    adapters = store.list()
    if not adapters:
        told = f"No adapters on this machine ({store.folder}); add one with: mistral-nb lora add FOLDER"
    else:
        lacking = [" and ".join(store.missing_files(adapter)) for adapter in adapters]
        told = f"On this machine ({store.folder}):\n{_rows(adapters, lacking)}"
    damaged = [f"{folder} has a record that cannot be read; remove that folder" for folder in store.damaged()]
    return "\n".join([told, *damaged])


def account_report(settings: Settings) -> str:
    """The adapters of the Cloudflare account, if the settings have one. Raises `MistralError`."""
    if not settings.cloudflare_account_id or not settings.cloudflare_api_token:
        return "No Cloudflare account: set CLOUDFLARE_ACCOUNT_ID and CLOUDFLARE_API_TOKEN to see its adapters"
    adapters, left_out = listed(settings)
    told = "No adapters on the Cloudflare account; put one there with: mistral-nb lora push FOLDER --name NAME"
    if adapters:
        told = f"On the Cloudflare account:\n{_rows(adapters)}"
    return "\n".join(filter(None, (told, left_out)))


def public_report(settings: Settings) -> str:
    """Cloudflare's own adapters. Raises `MistralError`."""
    adapters, left_out = listed(settings, public=True)
    told = f"Cloudflare's own, for every account:\n{_rows(adapters)}" if adapters else "Cloudflare has none of its own."
    return "\n".join(filter(None, (told, left_out)))


def check_report(folder: Path, *, for_cloudflare: bool, fix: Path | None, lora_rank: int | None) -> str:
    """What the adapter in a folder is; with `fix`, of a mended copy made there. `AdapterError` where it is unfit.

    `lora_rank` is the setting.
    """
    if fix is not None:
        fixed_copy(folder, fix)
        folder = fix
    info = _for_cloudflare(folder) if for_cloudflare else check(folder, for_cloudflare=False)
    copy = f"{folder} is a copy whose adapter_config.json says model_type {info.model_type}.\n" if fix else ""
    if for_cloudflare:
        fit = "for Cloudflare, by its published limits."
    else:
        fit = f"to be added to this machine; {_fit_here(folder, info, lora_rank)}"
    return f"{copy}{_facts(info)}\nFit {fit}"


def _for_cloudflare(folder: Path) -> AdapterInfo:
    """What the adapter in a folder is; where Cloudflare alone would refuse it, the error says so."""
    try:
        return check(folder, for_cloudflare=True)
    except AdapterError as error:
        if not _is_sound(folder):
            raise
        here = "For an engine on this machine it is sound: check it with --local, which tells what models it fits"
        raise AdapterError(f"{error}\n{here}", error.problems) from error


def _is_sound(folder: Path) -> bool:
    try:
        check(folder, for_cloudflare=False)
    except AdapterError:
        return False
    return True


def pushed(adapter: Adapter, untried: str, doubt: str) -> str:
    """That an adapter is on the account, how it is used, and `Push.untried` and `Push.doubt`."""
    name = quoted(adapter.name)
    use = f"use it with --lora {name} --model {quoted(adapter.model)}"
    warning = f"\nWARNING: {doubt}" if doubt else ""
    if untried:
        return f"{name} ({quoted(adapter.id)}) is on the account, and was not tried: {untried}\nThen {use}{warning}"
    return f"{name} ({quoted(adapter.id)}) is on the account; {use}{warning}"


def add_report(folder: Path, name: str | None, model: str | None, description: str, lora_rank: int | None) -> str:
    """Check an adapter and copy it into this machine's store: that it is there, what it fits, and what should be known.

    Its name is by default the folder's, and its model the one that it was trained on. `AdapterError` where it is unfit.
    """
    info = check(folder, for_cloudflare=False)
    store = AdapterStore()
    adapter = store.add(folder, name or info.name, model or info.base_model or DEFAULT_MODEL, description)
    told = f"{quoted(adapter.name)} ({quoted(adapter.id)}) is in {store.path(adapter)}"
    use = f"use it with --lora {quoted(adapter.name)}, on the local engine"
    fit = _fit_here(folder, info, lora_rank)
    return "\n".join([f"{told}; {use}", f"{fit[0].upper()}{fit[1:]}", *(f"note: {note}" for note in info.warnings)])


def remove_report(adapter: str) -> str:
    """Remove an adapter from this machine's store, and say so. `AdapterError` where no adapter is called so."""
    return f"Removed {quoted(AdapterStore().remove(adapter).name)} from this machine."


def _rows(adapters: Sequence[Adapter], lacking: Sequence[str] | None = None) -> str:
    """A table; with `lacking`, what each one lacks."""
    head = ["NAME", "MODEL", "CREATED", "ID", *(["LACKS"] if lacking else []), "DESCRIPTION"]
    rows = [
        [
            *(quoted(text) for text in (adapter.name, adapter.model, adapter.created_at[:10], adapter.id)),
            *([lacking[index] or "nothing"] if lacking else []),
            quoted(adapter.description),
        ]
        for index, adapter in enumerate(adapters)
    ]
    return table([head, *rows])


def _fit_here(folder: Path, info: AdapterInfo, lora_rank: int | None) -> str:
    """Which of the models in the store an adapter that is sound can be applied to, and what that takes."""
    names = []
    for model in installed():
        with suppress(ModelError):
            open_adapter(folder, open_checkpoint(model.path).args)
            names.append(model.name)
    fits = f"it fits {', '.join(names)}" if names else "none of the models here is one that it fits"
    return f"{fits}.{_too_large(info.rank or 0, lora_rank)}"


def _too_large(rank: int, lora_rank: int | None) -> str:
    """How to start an engine that takes the rank, where it would not as it is set."""
    if rank <= (lora_rank or RANK):
        return ""
    where = "on a GPU, " if lora_rank is None and rank <= RANK_ON_CPU else ""
    return f" Of rank {rank}: {where}start the engine with --lora-rank {rank}, or set lora_rank to {rank}."


def _facts(info: AdapterInfo) -> str:
    unknown = "not told"
    rows = [
        ["adapter", quoted(info.name)],
        ["base model", quoted(info.base_model) if info.base_model else unknown],
        ["model type", quoted(info.model_type) if info.model_type else unknown],
        ["rank", f"{info.rank or unknown}, alpha {unknown if info.alpha is None else f'{info.alpha:g}'}"],
        ["modules", ", ".join(info.target_modules)],
        ["weights", f"{info.parameters:,} in {info.dtype}, {amount(info.bytes)}"],
        *(["note", warning] for warning in info.warnings),
    ]
    return table(rows)
