"""What a mutant is, and all of them: single lines of the kernels that are broken on purpose."""

from tests.kernels.mutations import attention, layers, linear, lora, sampling
from tests.kernels.mutations.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: tuple[Mutant, ...] = (*attention.MUTANTS, *layers.MUTANTS, *linear.MUTANTS, *lora.MUTANTS, *sampling.MUTANTS)
