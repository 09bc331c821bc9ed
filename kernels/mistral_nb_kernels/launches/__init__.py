"""How each op of the table of configs is launched for the compiler: on CPU tensors, in the engine's layouts."""

from mistral_nb_kernels.launches import attention, layers, linear, lora, sampling
from mistral_nb_kernels.launches.attention import Forms

__all__ = ["FIXED", "FORMS", "HALF", "MATRIX", "ORDERS", "Forms"]

FORMS = {**attention.FORMS, **layers.FORMS, **linear.FORMS, **lora.FORMS, **sampling.FORMS}
"""By op of the table: from a row and the type of the activations, each form by name and what launches it."""
MATRIX = {**attention.MATRIX, **linear.MATRIX, **lora.MATRIX}
"""Kernels that multiply on the matrix unit in 16 bits from 8.0 on: its instruction, where that is not mma (HMMA)."""
ORDERS = attention.ORDERS
"""Sequences of barriers and accesses that must be in the code."""
HALF = frozenset(attention.HALF)
"""Ops whose rows of 16 bits are compiled for fp16 beside bf16."""
FIXED = frozenset({*attention.FIXED, *linear.FIXED})
"""Kernels that no config cuts up."""
