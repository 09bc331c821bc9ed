"""What a mutant is, and all of them: single lines of the kernels that are broken on purpose."""

from tests.kernels.mutations import attention
from tests.kernels.mutations.mutant import Mutant

__all__ = ["MUTANTS", "Mutant"]

MUTANTS: tuple[Mutant, ...] = (*attention.MUTANTS,)
