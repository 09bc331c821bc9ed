"""The line to a chat's page: messages that belong to no cell, so that a cell that runs neither gets nor delays them."""

from __future__ import annotations

from collections.abc import Mapping
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

    ipykernel 7.4 notes the shell that sent last on a comm, at its opening that of the cell, and has that shell take
    what comes: while the cell runs, a page could stop no answer. Source: ipykernel/comm/comm.py, `_reply_subshell_for`.
    """
    vars(widget.comm).pop("_reply_subshell_id", None)
