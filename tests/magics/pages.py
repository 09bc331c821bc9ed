"""A page that shows a chat, without a browser: it applies what it is sent as `static/store.js` does."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mistral_nb.rendering import Block, apply
from tests.backends.scripted import PATIENCE
from tests.magics.kernels import TIMEOUT, Kernel

MAX_HISTORY = 50
ANSWERS = ("done", "refused", "names", "text")


class Page:
    """What a page holds: `state` is all but the turns, `turns` are in their order."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.turns: dict[str, dict[str, Any]] = {}
        self.heard: list[dict[str, Any]] = []
        self.is_known = False
        self._changed = threading.Condition()

    def take(self, message: Mapping[str, Any]) -> None:
        """One message of the kernel."""
        message = copy.deepcopy(dict(message))
        with self._changed:
            self.heard.append(message)
            if message["type"] == "snapshot":
                self._take_snapshot(message)
            elif self.is_known:
                self._take_change(message)
            self._changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, PATIENCE), self.heard[-3:]

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.heard if message["type"] == kind]

    def answer(self, ref: int) -> dict[str, Any]:
        """What a message with this number was answered."""
        self.until(lambda: bool(self._answers(ref)))
        return self._answers(ref)[0]

    def _answers(self, ref: int) -> list[dict[str, Any]]:
        return [message for message in self.heard if message.get("ref") == ref and message["type"] in ANSWERS]

    @property
    def shows(self) -> dict[str, Any]:
        """All that it shows."""
        return {**self.state, "turns": list(self.turns.values())}

    def text(self, turn_id: str) -> str:
        return "".join(block["body"] for block in self.turns[turn_id]["blocks"])

    def _take_snapshot(self, message: dict[str, Any]) -> None:
        self.is_known = True
        self.turns = {turn["id"]: turn for turn in message.pop("turns")}
        self.state = {name: value for name, value in message.items() if name not in ("type", "ref")}

    def _take_change(self, message: dict[str, Any]) -> None:
        match message:
            case {"type": "state", **state}:
                self.state.update(state)
            case {"type": "turn", "turn": turn}:
                self._take_turn(turn)
            case {"type": "patch", "id": turn_id, **patch}:
                parts = [Block(**block) for block in self.turns[turn_id]["blocks"]]
                self.turns[turn_id]["blocks"] = [vars_of(block) for block in apply(parts, patch)]

    def _take_turn(self, turn: dict[str, Any]) -> None:
        old = self.turns.get(turn["id"])
        if old is None:
            prompt, history = turn["prompt"], self.state["history"]
            self.state["history"] = [*(each for each in history if each != prompt), prompt][-MAX_HISTORY:]
        self.turns[turn["id"]] = {"blocks": old["blocks"] if old else [], **turn}
        self.state["busy"] = any(each["running"] for each in self.turns.values())


def vars_of(block: Block) -> dict[str, str]:
    return {"kind": block.kind, "body": block.body, "language": block.language, "marks": block.marks}


class KernelPage(Page):
    """The page of a chat in a real kernel; `wire` has every message that the kernel broadcast since it was opened."""

    def __init__(self, kernel: Kernel, comm: str) -> None:
        super().__init__()
        self.comm = comm
        self.wire: list[dict[str, Any]] = []
        self._kernel = kernel
        self._ref = 0

    def send(self, **message: Any) -> int:
        """Send as the widget's model does; returns the number under which the answer comes."""
        self._ref += 1
        content = {"comm_id": self.comm, "data": {"method": "custom", "content": {**message, "ref": self._ref}}}
        client = self._kernel.client
        client.shell_channel.send(client.session.msg("comm_msg", content))
        return self._ref

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send, and wait for the answer."""
        ref = self.send(**message)
        self.read_until(lambda: bool(self._answers(ref)))
        return self._answers(ref)[0]

    def read_until(self, condition: Callable[[], bool]) -> None:
        """Read what the kernel broadcasts until this is so."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, self.heard[-3:]
            self.read(self._kernel.client.get_iopub_msg(timeout=TIMEOUT))

    def read(self, message: dict[str, Any]) -> None:
        self.wire.append(message)
        content = message["content"]
        if message["msg_type"] == "comm_msg" and content["comm_id"] == self.comm:
            data = content["data"]
            if data["method"] == "custom":
                self.take(data["content"])

    def updates(self) -> list[dict[str, Any]]:
        """The data of the displays that were written again."""
        return [each["content"]["data"] for each in self.wire if each["msg_type"] == "update_display_data"]


def open_chat(kernel: Kernel, code: str) -> KernelPage:
    """Run a cell that shows one chat, and open its page."""
    run = kernel.run(code)
    assert run.status == "ok", run.reply
    views = [
        output.content["comm_id"]
        for output in run.outputs
        if output.kind == "comm_open" and "_esm" in output.content["data"]["state"]
    ]
    assert len(views) == 1
    return KernelPage(kernel, views[0])
