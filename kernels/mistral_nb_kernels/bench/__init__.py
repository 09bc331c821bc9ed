"""Measuring the kernels on an NVIDIA GPU: timing, the machine's own ceilings, and the attention ops' cases."""
