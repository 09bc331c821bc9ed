"""A chat on the page: its view and panel, what they are sent, and the transcript below."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ipywidgets as widgets  # type: ignore[import-untyped]
from IPython.core.getipython import get_ipython

from mistral_nb.chat import ChatSession, Choice, presets
from mistral_nb.chat.presets import BUILT_IN
from mistral_nb.config import Settings
from mistral_nb.errors import MistralError
from mistral_nb_magics.chat.choosing import choose
from mistral_nb_magics.chat.desk import Desk
from mistral_nb_magics.chat.line import keep_free, say
from mistral_nb_magics.chat.outbox import Outbox
from mistral_nb_magics.chat.panel import Panel
from mistral_nb_magics.chat.projection import who_is_next
from mistral_nb_magics.chat.transcript import Transcript
from mistral_nb_magics.chat.view import ChatView

__all__ = ["Stage"]

WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"


class Stage:
    """Shows one session. Its methods may be called from any thread."""

    def __init__(self, session: ChatSession, settings: Callable[[], Settings]) -> None:
        self._session = session
        self._settings = settings
        self._lock = threading.RLock()
        self._greetings = 0
        self._writes = False
        self._panel: Panel | None = None
        self._transcript = Transcript(session.conversation)
        self._view = ChatView(Desk(session, self, _namespace).receive)
        self._outbox = Outbox(session.conversation, partial(say, self._view), self._state, self._settled)
        self._unlisten = session.listen(self._outbox.put)
        self.widget = widgets.VBox([self._view])
        keep_free(self._view)

    def show(self, publisher: Any, text: str) -> None:
        """Put the widget and the transcript below a cell; `text` is for those who can show neither."""
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        publisher.publish(data={WIDGET_VIEW: view, "text/plain": text}, metadata={})
        self._transcript.show(publisher)

    def put(self, message: Mapping[str, Any]) -> None:
        """Send the page a message, after those that were put before."""
        self._outbox.put(message)

    def flush(self, timeout: float) -> None:
        """Wait until the page and the transcript have what there is now, for `timeout` seconds at most."""
        self._outbox.flush(timeout)

    def choose(self, choice: Choice) -> None:
        """Have the next question answered so, and show it in the panel."""
        with self._lock:
            choose(self._session, choice)
            if self._panel is not None:
                self._panel.show(choice, self._session.compare)
        self.put({"type": "state"})

    def open_panel(self, is_open: bool) -> None:
        with self._lock:
            if self._panel is None and is_open:
                self._panel = Panel(self._session.choice, self._session.compare, self._chosen, self._lock)
                self.widget.children = [self._view, self._panel.widget]
            if self._panel is not None:
                if is_open:
                    self._panel.offer(_models(), _adapters())
                self._panel.open(is_open)
        self.put({"type": "state"})

    def greeted(self, writes: bool) -> None:
        """A page has come; it can write into the notebook's file, or not."""
        self._greetings += 1
        self._writes = writes
        if self._is_anew:
            self.put({"type": "transcript", "data": self._transcript.bundle()})

    def insert(self, cells: list[dict[str, Any]]) -> bool:
        """Have cells put below the chat's own; False where the page cannot."""
        if self._writes and cells:
            self.put({"type": "cells", "cells": cells})
        return self._writes

    def close(self) -> None:
        """Take it off the page."""
        self._unlisten()
        self._outbox.close()
        for each in _all_of(self.widget):
            each.close()

    def _chosen(self, choice: Choice, compare: Choice | None) -> None:
        with self._lock:
            self._session.choice, self._session.compare = choice, compare
        self.put({"type": "state"})

    def _state(self) -> dict[str, Any]:
        """What the page shows besides the turns."""
        conversation, choice = self._session.conversation, self._session.choice
        return {
            "undo": conversation.undoable,
            "title": conversation.title,
            "who": who_is_next(choice, self._settings),
            "panel": self._panel is not None and self._panel.is_open,
            "compare": self._session.compare is not None,
            "presets": _preset_names(),
            "system": choice.system or "",
        }

    def _settled(self) -> None:
        data = self._transcript.update()
        if data is not None and self._is_anew:
            self.put({"type": "transcript", "data": data})

    @property
    def _is_anew(self) -> bool:
        """Whether the page has been loaded again: it no longer knows the outputs by their ids, and writes itself."""
        return self._greetings > 1 and self._writes


def _all_of(widget: Any) -> list[Any]:
    """What a widget is made of, and itself last."""
    below = [each for child in getattr(widget, "children", ()) for each in _all_of(child)]
    return [*below, *(getattr(widget, part) for part in ("layout", "style") if hasattr(widget, part)), widget]


def _namespace() -> Mapping[str, Any]:
    """The user's variables, as they are now: a cell may run and change them meanwhile."""
    shell = get_ipython()
    return dict(shell.user_ns) if shell is not None else {}


def _preset_names() -> list[str]:
    try:
        return list(presets())
    except MistralError:  # a file of presets that cannot be read is told when one is picked
        return list(BUILT_IN)


def _models() -> list[str]:
    from mistral_nb_magics.completion import known_models

    return known_models()


def _adapters() -> list[str]:
    from mistral_nb.finetunes.known import known_names

    return known_names()
