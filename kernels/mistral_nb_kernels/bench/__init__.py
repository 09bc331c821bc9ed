"""Measuring the kernels: cases, who else runs them, timing, the machine's ceilings, records, and the tuner's shapes.

`python -m mistral_nb_kernels.bench` is the command. Nothing here needs triton, or touches a GPU, before it measures.
"""

from mistral_nb_kernels.bench.tunables import TUNABLES

__all__ = ["TUNABLES"]
