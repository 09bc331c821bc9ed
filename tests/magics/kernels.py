"""A real ipykernel process, driven as a front end drives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jupyter_client.manager import KernelManager

TIMEOUT = 120.0


@dataclass
class Output:
    """One output message: when it came (seconds after the request), when the kernel sent it, its type, its content."""

    seconds: float
    sent: float
    kind: str
    content: dict[str, Any]

    @property
    def markdown(self) -> str:
        return str(self.content.get("data", {}).get("text/markdown", ""))

    @property
    def plain(self) -> str:
        return str(self.content.get("data", {}).get("text/plain", ""))


@dataclass
class Run:
    """What became of one cell."""

    outputs: list[Output] = field(default_factory=list)
    reply: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        return str(self.reply["status"])

    @property
    def displays(self) -> list[Output]:
        return [each for each in self.outputs if each.kind in ("display_data", "update_display_data")]

    @property
    def saved(self) -> list[Output]:
        """What a notebook file keeps: the last state of each display, and the results."""
        kept: dict[str, Output] = {}
        for number, each in enumerate(self.outputs):
            if each.kind in ("display_data", "update_display_data", "execute_result"):
                kept[each.content.get("transient", {}).get("display_id", str(number))] = each
        return list(kept.values())

    @property
    def printed(self) -> str:
        return "".join(each.content["text"] for each in self.outputs if each.kind == "stream")


class Kernel:
    """A kernel process and the client of it."""

    def __init__(self) -> None:
        self._manager = KernelManager()
        self._manager.start_kernel()
        self.client = self._manager.client()
        try:
            self.client.start_channels()
            self.client.wait_for_ready(timeout=TIMEOUT)
        except BaseException:
            self.close()
            raise

    def run(self, code: str, watch: Callable[[Output], None] = lambda output: None, cell: str | None = None) -> Run:
        """Run a cell, by its id where it has one, until the kernel is idle again. `watch` sees outputs as they come."""
        asked = {"code": code, "silent": False, "store_history": True, "allow_stdin": True, "stop_on_error": False}
        message = self.client.session.msg("execute_request", asked)
        message["metadata"] = {"cellId": cell} if cell else {}
        self.client.shell_channel.send(message)
        request = message["header"]["msg_id"]
        started = time.monotonic()
        result = Run()
        while True:
            message = self.client.get_iopub_msg(timeout=TIMEOUT)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                break
            if kind not in ("status", "execute_input"):
                sent = message["header"]["date"].timestamp()
                result.outputs.append(Output(time.monotonic() - started, sent, kind, content))
                watch(result.outputs[-1])
        while not result.reply:
            message = self.client.get_shell_msg(timeout=TIMEOUT)
            if message["parent_header"].get("msg_id") == request:
                result.reply = message["content"]
        return result

    def interrupt(self) -> None:
        """As Jupyter does: SIGINT to the kernel's whole process group."""
        self._manager.interrupt_kernel()

    def close(self) -> None:
        self.client.stop_channels()
        self._manager.shutdown_kernel(now=True)
        self._manager.cleanup_resources()
