"""`mistral_nb.Chat`: a chat in the notebook, and the same conversation from code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.getipython import get_ipython

from mistral_nb.answer import Result
from mistral_nb.chat import Attachment, ChatSession, Choice, Conversation
from mistral_nb.config import Settings, load_settings
from mistral_nb_magics.chat.choosing import choice_of, choose, compared
from mistral_nb_magics.chat.projection import who_is_next

if TYPE_CHECKING:
    from mistral_nb_magics.chat.stage import Stage

__all__ = ["Chat"]

_PATIENCE = 1.0  # seconds


class Chat:
    """A chat: shown where it is the last line of a cell, and used from code with `ask`.

    `backend`, `model`, `system` and the fields of a request, such as `temperature=0`, say who answers and how, as for
    `mistral_nb.ask`; `preset` names a system text with sampling fields (`mistral_nb.chat.presets()`). `compare` is whom
    to ask the same side by side: a mapping such as {"backend": "cloudflare"} or {"lora": "name"}. `conversation` is one
    to go on with; a conversation belongs to one chat at a time. All of these can be changed in the panel. Raises
    `InvalidRequest` and `ChatError`.
    """

    def __init__(
        self,
        conversation: Conversation | None = None,
        *,
        backend: str | None = None,
        model: str | None = None,
        system: str | None = None,
        preset: str | None = None,
        compare: Choice | Mapping[str, Any] | None = None,
        settings: Callable[[], Settings] = load_settings,
        **fields: Any,
    ) -> None:
        choice = choice_of(backend, model, system, preset, fields)
        other = compare if compare is None or isinstance(compare, Choice) else compared(choice, compare)
        self._settings = settings
        self._session = ChatSession(conversation, choice, other, settings)
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._shown_in: int | None = None

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> Chat:
        """A chat that goes on with a conversation saved as .json; `options` are those of `Chat`. Raises `ChatError`."""
        return cls(Conversation.load(path), **options)

    @property
    def conversation(self) -> Conversation:
        """The turns: to read, and to select, delete, clear and undo, which is shown at once."""
        return self._session.conversation

    @property
    def choice(self) -> Choice:
        """Who answers the next question, and how."""
        return self._session.choice

    @choice.setter
    def choice(self, choice: Choice) -> None:
        if self._stage is None:
            choose(self._session, choice)
        else:
            self._stage.choose(choice)

    @property
    def widget(self) -> Any:
        """The chat as an ipywidget, to be put into a layout of your own; there is no transcript below it then."""
        return self._on_stage().widget

    def ask(self, prompt: str, *, attachments: Sequence[Attachment] = ()) -> Result:
        """Ask in this chat, wait for the answer and return it. It streams into the chat where that is shown.

        Raises what `mistral_nb.ask` does, and `ChatBusy` while another answer is being written. An interrupt stops the
        answer and keeps its text.
        """
        try:
            return self._session.ask(prompt, attachments=attachments)
        finally:
            self._show_all()

    def send(self, prompt: str, *, attachments: Sequence[Attachment] = (), compare: bool | None = None) -> None:
        """Ask, and return at once."""
        self._session.send(prompt, attachments=attachments, compare=compare)

    def stop(self) -> None:
        """End the answers that are being written; their text stays."""
        self._session.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is being written, for `timeout` seconds at most; whether that came."""
        is_quiet = self._session.wait(timeout)
        if is_quiet:
            self._show_all()
        return is_quiet

    def clear(self) -> None:
        """Take all turns away; `undo` brings them back."""
        self.conversation.clear()

    def undo(self) -> str:
        """Take the last delete, clear or load back, and say which it was; empty where there is nothing."""
        return self.conversation.undo()

    def save(self, path: str | Path) -> Path:
        """Write the conversation as .json (for `Chat.load`), .md or .ipynb, as the name says. Raises `ChatError`."""
        return self.conversation.save(path)

    def to_cells(self, insert: bool = True) -> list[dict[str, Any]]:
        """The conversation as cells of a notebook (nbformat 4.5).

        With `insert` they are put below the chat where the front end lets a widget do that (JupyterLab, Notebook 7);
        elsewhere the code of the answers is offered as the next cell.
        """
        cells = self.conversation.to_cells()
        if not insert or (self._stage is not None and self._stage.insert(cells)):
            return cells
        shell = get_ipython()
        code = [str(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        if shell is not None and code:
            shell.set_next_input("\n\n".join(code), replace=False)
        return cells

    def close(self) -> None:
        """End what runs and take the chat off the page. The conversation stays, and so does the transcript."""
        self.stop()
        self.wait(5)
        with self._lock:
            stage, self._stage, self._shown_in = self._stage, None, None
        if stage is not None:
            stage.close()

    def _show_all(self) -> None:
        """Have what a cell asked in its notebook when it ends: a program that runs notebooks stops listening then."""
        stage = self._stage
        if stage is not None and self._session.wait(_PATIENCE):
            stage.flush(_PATIENCE)

    def __repr__(self) -> str:
        return f"<Chat {self.conversation!r} with {who_is_next(self.choice, self._settings)}>"

    def _ipython_display_(self) -> None:
        """Once in a cell, however often it is named there."""
        shell = get_ipython()
        if shell is None or getattr(shell, "kernel", None) is None:
            from mistral_nb_magics.chat.transcript import bundle

            print(f"{bundle(self.conversation)['text/plain']}\n\n{self!r}: here chat.ask(...) asks")
            return
        with self._lock:
            if self._shown_in == shell.execution_count:
                return
            self._shown_in = shell.execution_count
        self._on_stage().show(shell.display_pub, repr(self))

    def _on_stage(self) -> Stage:
        """What is shown of it is made where it is first shown: a chat in code alone has no widgets."""
        from mistral_nb_magics.chat.stage import Stage

        with self._lock:
            if self._stage is None:
                self._stage = Stage(self._session, self._settings)
            return self._stage
