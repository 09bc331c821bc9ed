"""The line to a chat's page: messages that belong to no cell, so that a cell that runs neither gets nor delays them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

__all__ = ["keep_free", "say"]


def say(widget: Any, message: Mapping[str, Any]) -> None:
    """Send the page a message, from any thread.

    As `widget.send` does, but without a parent in the envelope. A thread has none of its own: it would name whatever
    cell runs or ran last, in 250 bytes, and ipykernel would then have that cell's shell take the page's next message.
    """
    comm = widget.comm
    kernel = getattr(comm, "kernel", None)
    if kernel is None:
        widget.send(dict(message))
        return
    content = {"data": {"method": "custom", "content": dict(message)}, "comm_id": comm.comm_id}
    kernel.session.send(kernel.iopub_socket, "comm_msg", content, ident=comm.topic)


def keep_free(widget: Any) -> None:
    """Have the kernel take the page's messages in the subshell that the page names, as JupyterLab does.

    ipykernel 7.4 has them taken by the shell that sent last on the comm, at its opening that of the cell: while that
    cell runs, a page could stop no answer. A page may name a subshell of a kernel that is no more, where another page
    restarted it: the main shell takes those messages. Source: ipykernel/comm/comm.py, `_reply_subshell_for`.
    """
    comm = widget.comm
    shells = getattr(getattr(comm, "kernel", None), "shell_channel_thread", None)
    if shells is not None and hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = partial(_shell_for, shells.manager)


def _shell_for(shells: Any, _data: object, named: str | None) -> str | None:
    """The subshell of that name; None, for the main shell, where there is none."""
    return named if named in shells.list_subshell() else None
