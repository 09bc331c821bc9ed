"""The `%mistral` and `%%mistral` magics."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["register", "unregister"]


def register(shell: InteractiveShell) -> None:
    """Add the magics and their completion to `shell`; does nothing when they are there."""
    from mistral_nb_magics.cell import Mistral
    from mistral_nb_magics.completion import add_completion

    if "Mistral" not in shell.magics_manager.registry:
        shell.register_magics(Mistral)
        add_completion(shell)


def unregister(shell: InteractiveShell) -> None:
    """Take away what `register` added."""
    from mistral_nb_magics.completion import remove_completion

    manager = shell.magics_manager
    magics = manager.registry.pop("Mistral", None)
    if magics is not None:
        for kind in ("line", "cell"):
            manager.magics[kind].pop("mistral", None)
        shell.configurables.remove(magics)
        remove_completion(shell)
