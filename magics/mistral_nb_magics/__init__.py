"""The `%mistral` and `%%mistral` magics, and those that measure kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["register", "unregister"]

_NAMES = {"Mistral": ("mistral",), "KernelBench": ("mistral_bench", "mistral_kernel")}
"""The names of the magics of each class."""


def register(shell: InteractiveShell) -> None:
    """Add the magics and their completion to `shell`; does nothing when they are there."""
    from mistral_nb_magics.bench.magics import KernelBench
    from mistral_nb_magics.cell import Mistral
    from mistral_nb_magics.completion import add_completion

    if "Mistral" not in shell.magics_manager.registry:
        shell.register_magics(Mistral, KernelBench)
        add_completion(shell)


def unregister(shell: InteractiveShell) -> None:
    """Take away what `register` added."""
    from mistral_nb_magics.completion import remove_completion

    manager = shell.magics_manager
    for kind, names in _NAMES.items():
        magics = manager.registry.pop(kind, None)
        if magics is None:
            return
        for name in names:
            manager.magics["line"].pop(name, None)
            manager.magics["cell"].pop(name, None)
        shell.configurables.remove(magics)
    remove_completion(shell)
