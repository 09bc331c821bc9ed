"""Measuring the kernels on an NVIDIA GPU: timing, the machine's ceilings, each set of ops' cases and candidates."""

from mistral_nb_kernels.bench import attention_cases, linear_cases, sampling_cases

__all__ = ["TUNABLES"]

TUNABLES = (*attention_cases.TUNABLES, *linear_cases.TUNABLES, *sampling_cases.TUNABLES)
"""What the tuner tunes."""
