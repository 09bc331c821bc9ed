"""Which cells show a chat: one whose cell has shown another since, and that is nowhere else, is closed."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

from IPython.core.displaypub import CapturingDisplayPublisher

__all__ = ["Places"]


class Closable(Protocol):
    def close(self) -> None: ...


class Places:
    """The chats that each cell shows, by the cell's id, each with the run of the cell that has shown it last.

    A front end that names no cells never has a chat closed. May be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shown: dict[str, dict[Closable, str]] = {}
        self._elsewhere = weakref.WeakSet[Closable]()

    def keep(self, chat: Closable) -> None:
        """It may be shown where nobody can tell."""
        with self._lock:
            self._elsewhere.add(chat)

    def forget(self, chat: Closable) -> None:
        with self._lock:
            self._elsewhere.discard(chat)
            for here in self._shown.values():
                here.pop(chat, None)

    def show(self, chat: Closable, shell: Any) -> None:
        """It is shown by the cell that runs. When that ends, those are closed that only a run before has shown."""
        parent = shell.get_parent() if hasattr(shell, "get_parent") else {}
        cell = parent.get("metadata", {}).get("cellId")
        if not isinstance(cell, str) or isinstance(shell.display_pub, CapturingDisplayPublisher):
            self.keep(chat)
            return
        run = str(parent["header"]["msg_id"])
        with self._lock:
            here = self._shown.setdefault(cell, {})
            is_first = run not in here.values()
            here[chat] = run
        if is_first:
            self._at_end(shell, cell, run)

    def _at_end(self, shell: Any, cell: str, run: str) -> None:
        def ended(_result: object) -> None:
            shell.events.unregister("post_run_cell", ended)
            for chat in self._replaced(cell, run):
                chat.close()

        shell.events.register("post_run_cell", ended)

    def _replaced(self, cell: str, run: str) -> list[Closable]:
        """Takes out those that only another run of the cell has shown."""
        with self._lock:
            here = self._shown[cell]
            self._shown[cell] = {chat: its for chat, its in here.items() if its == run}
            kept = {chat for each in self._shown.values() for chat in each} | set(self._elsewhere)
            return [chat for chat in here if chat not in kept]
