"""The engine process: one model behind the Workers AI wire on a loopback port."""

from __future__ import annotations

from mistral_nb.server.lifecycle import ServeOptions, serve

__all__ = ["ServeOptions", "serve"]
