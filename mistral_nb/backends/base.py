"""The one protocol that the cell, the widget and `ask` talk to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mistral_nb.types import Chunk, Description, GenerationRequest

__all__ = ["Backend", "ChunkStream", "DryRun"]


class ChunkStream(Iterator[Chunk], Protocol):
    """An answer on its way.

    Chunks with `status` may come first, then chunks with `text`, then exactly one chunk with a `finish_reason`.
    A failure before the first text raises; a failure after it yields a last chunk with `finish_reason` `error` or
    `truncated`, and the next step raises. `close()` may be called from any thread, at any time and more than once: it
    cancels the generation at once, and a reader blocked in another thread gets a last chunk `cancelled`.
    """

    def close(self) -> None: ...


class Backend(Protocol):
    """Somebody who answers. Making one contacts nobody; `stream` does."""

    @property
    def name(self) -> str: ...

    def stream(self, request: GenerationRequest) -> ChunkStream:
        """Start answering. Raises `MistralError`, with the next step in its message."""
        ...

    def describe(self) -> Description:
        """Model and device; what is known without a request."""
        ...


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a request would send to the model: the rendered prompt, its token ids, and the context in tokens."""

    prompt: str
    tokens: tuple[int, ...]
    context: int
