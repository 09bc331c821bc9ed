"""A checkpoint folder, read without loading it: what is in it, whether it is whole, and what memory it would take.

Nothing here needs torch, and nothing in the folder is ever imported, unpickled or executed.
"""

from __future__ import annotations

from mistral_nb.checkpoints.args import ModelArgs
from mistral_nb.checkpoints.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from mistral_nb.checkpoints.description import ModelDescription, describe
from mistral_nb.checkpoints.layout import CheckpointFiles, find_files
from mistral_nb.checkpoints.memory import Estimate, Precision, check_fits, choices_that_fit, estimate

__all__ = [
    "Checkpoint",
    "CheckpointFiles",
    "Estimate",
    "ModelArgs",
    "ModelDescription",
    "Precision",
    "TensorInfo",
    "check_fits",
    "choices_that_fit",
    "describe",
    "estimate",
    "find_files",
    "open_checkpoint",
]
