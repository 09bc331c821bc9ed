"""What the commands about adapters print: tables of them, what one is, and what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.config import Settings
from mistral_nb.finetunes.adapter import Adapter
from mistral_nb.finetunes.check import AdapterInfo, check, fixed_copy
from mistral_nb.finetunes.cloudflare import listed
from mistral_nb.finetunes.store import AdapterStore
from mistral_nb.progress import amount
from mistral_nb.tables import table

__all__ = ["account_report", "added", "check_report", "local_report", "public_report", "pushed"]


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


def check_report(folder: Path, *, for_cloudflare: bool, fix: Path | None) -> str:
    """What the adapter in a folder is; with `fix`, of a mended copy made there. `AdapterError` where it is unfit."""
    if fix is not None:
        fixed_copy(folder, fix)
        folder = fix
    info = check(folder, for_cloudflare=for_cloudflare)
    copy = f"{folder} is a copy whose adapter_config.json says model_type {info.model_type}.\n" if fix else ""
    fit = "Fit for Cloudflare, by its published limits." if for_cloudflare else "Fit to be added to this machine."
    return f"{copy}{_facts(info)}\n{fit}"


def pushed(adapter: Adapter, untried: str, doubt: str) -> str:
    """That an adapter is on the account, how it is used, and `Push.untried` and `Push.doubt`."""
    name = quoted(adapter.name)
    use = f"use it with --lora {name} --model {quoted(adapter.model)}"
    warning = f"\nWARNING: {doubt}" if doubt else ""
    if untried:
        return f"{name} ({quoted(adapter.id)}) is on the account, and was not tried: {untried}\nThen {use}{warning}"
    return f"{name} ({quoted(adapter.id)}) is on the account; {use}{warning}"


def added(adapter: Adapter, info: AdapterInfo, folder: Path) -> str:
    """That an adapter is on this machine, and what should be known about it."""
    warnings = [f"note: {warning}" for warning in info.warnings]
    return "\n".join([f"{quoted(adapter.name)} ({quoted(adapter.id)}) is in {folder}", *warnings])


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
