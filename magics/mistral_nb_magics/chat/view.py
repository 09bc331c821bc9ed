"""The chat's front end as an anywidget: joins the static parts and carries messages to and from the browser."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anywidget
import traitlets

__all__ = ["SCRIPTS", "STYLES", "ChatView"]

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
SCRIPTS = (
    "dom",
    "notebook",
    "wire",
    "store",
    "blocks",
    "turns",
    "menus",
    "attach",
    "composer",
    "keep",
    "header",
    "chat",
)
"""The files under `static/` that make one ES module, in this order."""

STYLES = ("text", "transcript", "composer", "chat")


def join_scripts() -> str:
    """One ES module, without the comment lines and the indentation, which every chat would send to its browser.

    The scripts hold no template literal of several lines and begin no line of code with a `*`.
    """
    lines = (line.strip() for name in SCRIPTS for line in (STATIC / f"{name}.js").read_text("utf-8").splitlines())
    return "\n".join(line for line in lines if line and not line.startswith(("//", "/**", "*")))


def join_styles() -> str:
    lines = (line.strip() for name in STYLES for line in (STATIC / f"{name}.css").read_text("utf-8").splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("/*"))


class ChatView(anywidget.AnyWidget):
    """Shows what it is sent and gives what the user does to `receive`.

    `receive` gets each message of a browser, a mapping with a "type" and mostly a "ref": a page sent it, so nothing
    else in it has been checked. `saved` belongs to the browser: the transcript, as a saved notebook keeps it.
    """

    _esm = join_scripts()
    _css = join_styles()
    saved = traitlets.Dict().tag(sync=True)

    def __init__(self, receive: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._receive = receive
        self.on_msg(self._hear)

    def _hear(self, _widget: object, content: object, _buffers: object) -> None:
        if isinstance(content, Mapping) and isinstance(content.get("type"), str):
            self._receive(content)
        else:
            logger.warning("The chat's page sent something that is not a message; it is ignored.")
