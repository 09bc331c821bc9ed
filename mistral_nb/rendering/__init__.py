"""A model's Markdown as blocks that a browser shows safely, whole or as a stream of patches."""

from __future__ import annotations

from mistral_nb.rendering.blocks import Block, blocks
from mistral_nb.rendering.patches import Patch, apply
from mistral_nb.rendering.stream import BlockStream

__all__ = ["Block", "BlockStream", "Patch", "apply", "blocks"]
