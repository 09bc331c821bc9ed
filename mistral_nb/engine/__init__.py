"""The local engine as a library: token ids in, token ids out; text and templates in `tokenizer`."""

from __future__ import annotations

from mistral_nb.engine.adapters import AdapterSource
from mistral_nb.engine.engine import Engine, EngineInfo
from mistral_nb.engine.grammar import Constraint
from mistral_nb.engine.sampling import Sampling
from mistral_nb.engine.scheduler import Generation, Token

__all__ = ["AdapterSource", "Constraint", "Engine", "EngineInfo", "Generation", "Sampling", "Token"]
