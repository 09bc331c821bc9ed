"""How each op of the table of configs is launched for the compiler: on CPU tensors, in the engine's layouts."""

from mistral_nb_kernels.launches import attention
from mistral_nb_kernels.launches.attention import Forms

__all__ = ["FIXED", "FORMS", "MATRIX", "Forms"]

FORMS = {**attention.FORMS}
"""By op of the table: from a row and the type of the activations, each form by name and what launches it."""
MATRIX = {**attention.MATRIX}
"""Kernels that multiply on the matrix unit in 16 bits from 8.0 on: its instruction, where that is not mma (HMMA)."""
FIXED = frozenset({*attention.FIXED})
"""Kernels that no config cuts up."""
