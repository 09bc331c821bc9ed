"""What an engine tells of itself: what was loaded, and what it takes now."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mistral_nb.checkpoints.memory import Precision
from mistral_nb.hardware import resident_memory

__all__ = ["EngineInfo", "EngineUse", "held_memory"]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded. `context` in tokens; `threads` are those that read prompts on the CPU; `why`, in words, is that
    precision where it is not the usual one.
    """

    model: str
    device: str
    precision: Precision
    context: int
    vocab_size: int
    threads: int
    kernels: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class EngineUse:
    """What an engine takes now.

    memory: bytes, on a GPU those that torch holds, else the process's; None where the system does not tell. kv_used
    of kv_tokens are handed out in the pages. tokens_per_second is over its latest steps in which nothing but decoding
    ran.
    """

    memory: int | None
    kv_used: int
    kv_tokens: int
    tokens_per_second: float | None


def held_memory(device: torch.device) -> int | None:
    """Bytes: see `EngineUse`."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return resident_memory()
