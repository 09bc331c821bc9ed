"""Engines and settings as plain text tables, for the terminal and for `%mistral status`."""

from __future__ import annotations

from collections.abc import Sequence

from mistral_nb.backends import resolve
from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.config import SETTINGS, Settings, config_path
from mistral_nb.engine_control import EngineStatus, Health, status
from mistral_nb.errors import MistralError
from mistral_nb.model_report import models_summary
from mistral_nb.models import store_path
from mistral_nb.progress import duration
from mistral_nb.runtime import runtime_dir
from mistral_nb.secret import Secret
from mistral_nb.tables import indent, table

__all__ = ["engines_table", "status_report"]


def status_report(settings: Settings) -> str:
    """Who would answer and why, which engines run, which models are here, and the settings with where each was set.

    Starts nothing.
    """
    sections = (
        ("Who answers", _selection(settings)),
        ("Engines", _engines(settings)),
        ("Models", models_summary()),
        ("Settings", _settings(settings)),
    )
    return "\n\n".join(f"{title}\n{indent(text)}" for title, text in sections)


def engines_table(engines: Sequence[EngineStatus]) -> str:
    """One row for each engine, then what is wrong with those that fail, and the logs."""
    if not engines:
        return "No engine is running."
    rows: list[tuple[str, ...]] = [("MODEL", "STATE", "DEVICE", "ACTIVE", "SERVED", "UPTIME", "PROCESS", "ADDRESS")]
    notes = []
    for engine in engines:
        record, health = engine.record, engine.health
        if health is None:
            told: tuple[str, ...] = ("silent", "", "", "", "")
            notes.append(f"{record.model} does not respond; end it with: mistral-nb stop --force")
        else:
            told = (health.state, health.where, str(health.active), str(health.served), duration(health.uptime_s))
        if health and health.error:
            notes.append(f"{record.model}: {health.error}")
        rows.append((record.model, *told, str(record.pid), record.base_url))
        if health and health.why:
            notes.append(f"Precision of {record.model}: {health.why}")
        if health and health.kv_tokens:
            notes.append(f"Use of {record.model}: {_use(health)}")
        if health and health.kernels:
            notes.append(f"Kernels of {record.model}: {health.kernels}")
        notes.append(f"Log of {record.model}: {record.log}")
    return "\n".join([table(rows), *notes])


def _use(health: Health) -> str:
    """Such as "0.6 GB of memory, KV 280 of 65536 tokens, 71.3 tokens/s lately"."""
    parts = [f"{health.memory / 1e9:.1f} GB of memory"] if health.memory is not None else []
    parts.append(f"KV {health.kv_used} of {health.kv_tokens} tokens")
    if health.tokens_per_second is not None:
        parts.append(f"{health.tokens_per_second:.1f} tokens/s lately")
    if health.adapters:
        parts.append(f"adapters in use: {', '.join(map(quoted, health.adapters))}")
    return ", ".join(parts)


def _selection(settings: Settings) -> str:
    try:
        selection = resolve(settings)
    except MistralError as error:
        return f"nobody: {error}"
    who = selection.backend.describe()
    stands_in = f", standing in for {who.stand_in_for}" if who.stand_in_for else ""
    device = f" on {who.device}" if who.device else ""
    return f"{who.model}{stands_in}, through the backend {who.backend}{device}\n{selection.why}"


def _engines(settings: Settings) -> str:
    try:
        return engines_table(status(settings))
    except MistralError as error:
        return str(error)


def _settings(settings: Settings) -> str:
    rows = []
    for setting in SETTINGS:
        value = getattr(settings, setting.name)
        shown = "set" if isinstance(value, Secret) else "not set" if value is None else str(value)
        rows.append((setting.name, shown, f"({settings.source(setting.name)})"))
    folders = [("file", str(config_path())), ("models", str(store_path())), ("runtime", _runtime_dir())]
    return f"{table(rows)}\n{table(folders)}"


def _runtime_dir() -> str:
    try:
        return str(runtime_dir())
    except MistralError as error:
        return str(error)
