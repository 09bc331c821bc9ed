"""LoRA adapters: checking one before it is used, those on Cloudflare, and those on this machine."""

from __future__ import annotations

from mistral_nb.finetunes.adapter import Adapter
from mistral_nb.finetunes.store import AdapterStore, adapters_path

__all__ = ["Adapter", "AdapterStore", "adapters_path"]
