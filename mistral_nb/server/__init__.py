"""The engine process: one model behind the Workers AI wire."""

from __future__ import annotations

from mistral_nb.server.lifecycle import ServeOptions, serve
from mistral_nb.server.listening import Address, Tls

__all__ = ["Address", "ServeOptions", "Tls", "serve"]
