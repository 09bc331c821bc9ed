"""A conversation: a tree of turns, of which one path is shown, with undo. Safe to use from several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mistral_nb.chat.turns import ChatError, Turn
from mistral_nb.types import MAX_TEXT, Message

__all__ = ["Conversation"]

MAX_UNDO = 100
_TITLE = 60


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a step took away: the turns as they were, in their order, and the parents that others had before.

    `loaded` is what came in their place.
    """

    why: str
    turns: tuple[Turn, ...]
    order: tuple[str, ...]
    parents: Mapping[str, str | None]
    head: str | None
    loaded: Mapping[str, Turn]


class Conversation:
    """Turns by their ids, each with the turn before as its `parent`; `head` is the last one of the path that is shown.

    Iterating gives the turns of that path, from the first to the head. Asking again and editing add branches; nothing
    that was written is lost but by `delete` and `clear`, which `undo` takes back, also after more was asked.
    `ChatError` where there is no such turn.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._turns: dict[str, Turn] = {}
        self._children: dict[str | None, list[str]] = {}
        self._head: str | None = None
        self._taken: list[_Taken] = []
        self._watchers: list[Callable[[str], None]] = []

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns of all branches, in the order in which they were asked; a parent comes before its children."""
        with self._lock:
            return tuple(self._turns.values())

    @property
    def path(self) -> tuple[Turn, ...]:
        with self._lock:
            return self._line(self._head)

    @property
    def shown(self) -> tuple[tuple[Turn, ...], ...]:
        """The path, each turn followed by those that it was compared with."""
        with self._lock:
            return tuple((turn, *(each for each in self.compared(turn.id) if each is not turn)) for turn in self.path)

    @property
    def head(self) -> str | None:
        return self._head

    @property
    def title(self) -> str:
        """The first question on one line, cut; empty where nothing was asked yet."""
        first = next(iter(self.path), None)
        words = " ".join(first.prompt.split()) if first else ""
        return words if len(words) <= _TITLE else f"{words[: _TITLE - 3]}..."

    def __iter__(self) -> Iterator[Turn]:
        return iter(self.path)

    def __len__(self) -> int:
        return len(self.path)

    def __bool__(self) -> bool:
        return True

    def __contains__(self, turn_id: object) -> bool:
        return turn_id in self._turns

    def __repr__(self) -> str:
        turns, path = len(self._turns), len(self.path)
        branches = f" of {turns} in all" if turns != path else ""
        return f"<Conversation {self.title!r}: {path} {'turn' if path == 1 else 'turns'}{branches}>"

    def steady(self) -> AbstractContextManager[object]:
        """While it is entered, no other thread changes the conversation: for several questions about one state."""
        return self._lock

    def turn(self, turn_id: str) -> Turn:
        with self._lock:
            return self._get(turn_id)

    def branches(self, turn_id: str) -> tuple[Turn, ...]:
        """The turns of the same parent, `turn_id` among them, in the order in which they were asked.

        Those of one comparison count as one branch: as `turn_id` itself, or the one of them that is on the path, or
        the first of them.
        """
        with self._lock:
            turn = self._get(turn_id)
            shown = {each.id for each in self._line(self._head)}
            found: dict[str, Turn] = {}
            for each in self._below(turn.parent):
                key = each.group or each.id
                if each.id == turn_id or key not in found or (each.id in shown and found[key].id != turn_id):
                    found[key] = each
            return tuple(found.values())

    def compared(self, turn_id: str) -> tuple[Turn, ...]:
        """The turns of the same comparison, `turn_id` among them; that one alone where there is none."""
        with self._lock:
            turn = self._get(turn_id)
            if turn.group is None:
                return (turn,)
            return tuple(each for each in self._below(turn.parent) if each.group == turn.group)

    @property
    def undoable(self) -> str:
        """What `undo` would take back: "delete", "clear" or "load"; empty where there is nothing."""
        with self._lock:
            return self._taken[-1].why if self._taken else ""

    def add(self, *turns: Turn) -> None:
        """Put turns under parents that are there; the first of them becomes the head."""
        with self._lock:
            new = [turn.id for turn in turns]
            if len({*new}) < len(new) or any(name in self._turns for name in new):
                raise ChatError(f"there is a turn {' or '.join(new)} already; give each turn an id of its own")
            for turn in turns:
                if turn.parent is not None:
                    self._get(turn.parent)
            for turn in turns:
                self._put(turn)
            self._head = new[0] if new else self._head

    def change(self, turn_id: str, **changes: Any) -> Turn:
        """Replace fields of a turn, such as its answer; `id`, `parent` and `group` stay as they are."""
        with self._lock:
            turn = self._turns[turn_id] = replace(self._get(turn_id), **changes)
            return turn

    def write(self, turn_id: str, **changes: Any) -> Turn | None:
        """`change` for a turn that is being written. None, and nothing changed, where there is no such turn."""
        with self._lock:
            return self.change(turn_id, **changes) if self.is_running(turn_id) else None

    def is_running(self, turn_id: str) -> bool:
        """Whether there is such a turn and its answer is being written."""
        with self._lock:
            return turn_id in self._turns and self._turns[turn_id].running

    def select(self, turn_id: str) -> None:
        """Show the branch of a turn, down to the newest turn below it."""
        with self._lock:
            self._head = self._newest(turn_id)
        self._tell("select")

    def delete(self, turn_id: str) -> None:
        """Take away one turn; those below it move up to its parent. An answer that is being written ends."""
        with self._lock:
            turn = self._get(turn_id)
            below = self._children.get(turn_id, [])
            self._take("delete", (turn,), dict.fromkeys(below, turn_id))
            for child in below:
                self._turns[child] = replace(self._turns[child], parent=turn.parent)
            del self._turns[turn_id]
            self._index()
            if self._head == turn_id:
                self._head = self._beside(turn, below)
        self._tell("delete")

    def clear(self) -> None:
        """Take away all turns of all branches. Answers that are being written end."""
        with self._lock:
            if not self._turns:
                return
            self._become("clear", (), None)
        self._tell("clear")

    def replace_with(self, other: Conversation) -> None:
        """Hold what `other` holds, in place of what is here; `undo` takes that back."""
        with other.steady():
            turns, head = _settled(other.turns), other.head
        with self._lock:
            self._become("load", turns, head)
        self._tell("load")

    def undo(self) -> str:
        """Take the last `delete`, `clear` or `replace_with` back, and say which it was. What was asked since stays.

        Empty where there is nothing to take back. Turns that were loaded go when the loading is taken back, but where
        something was asked since.
        """
        with self._lock:
            if not self._taken:
                return ""
            taken = self._taken.pop()
            old = {turn.id: turn for turn in taken.turns}
            since = {
                name: replace(turn, parent=old[name].parent) if name in old else turn
                for name, turn in self._turns.items()
                if turn != taken.loaded.get(name)
            }
            both = {**self._turns, **old, **since} if since else old
            ids = dict.fromkeys((*(name for name in taken.order if name in both), *both))
            for child, parent in taken.parents.items():
                both[child] = replace(both[child], parent=parent)
            self._turns = {name: both[name] for name in ids}
            self._index()
            if not since or self._head not in self._turns or not any(each.id in old for each in self._line(self._head)):
                self._head = taken.head
        self._tell("undo")
        return taken.why

    def messages(self) -> tuple[Message, ...]:
        """The path as `mistral_nb.ask` takes it: system text first. Turns without an answer are left out."""
        with self._lock:
            path = self._line(self._head)
        system = path[-1].choice.system if path else None
        return (*_system(system), *(message for turn in path for message in _exchange(turn)))

    def asking(self, turn_id: str, left_out: int = 0) -> tuple[Message, ...]:
        """What is sent to have a turn answered: its system text, the turns before it, and its question last.

        `left_out` of the turns before it, the oldest, are not sent; turns without an answer never are.
        """
        with self._lock:
            turn = self._get(turn_id)
            before = [_exchange(each) for each in self._line(turn.parent) if each.answer.strip()]
        kept = [message for pair in before[left_out:] for message in pair]
        return (*_system(turn.choice.system), *kept, Message("user", turn.question))

    def watch(self, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call `callback` with "select", "delete", "clear", "load" or "undo" after each. Returns how to end that."""
        with self._lock:
            self._watchers.append(callback)

        def end() -> None:
            with self._lock:
                if callback in self._watchers:
                    self._watchers.remove(callback)

        return end

    def to_markdown(self) -> str:
        """The path as a document to read: each answer as the model wrote it."""
        from mistral_nb.chat.export import to_markdown

        return to_markdown(self)

    def to_cells(self) -> list[dict[str, Any]]:
        """The path as cells of a notebook (nbformat 4.5), Python code of the answers in code cells."""
        from mistral_nb.chat.export import to_cells

        return to_cells(self)

    def to_json(self) -> str:
        """All that is here but the undo history; `from_json` reads it."""
        from mistral_nb.chat.files import to_json

        return to_json(self)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Raises `ChatError` that names what is wrong."""
        from mistral_nb.chat.files import from_json

        return from_json(text)

    def save(self, path: str | Path) -> Path:
        """Write .json (which `load` reads), .md or .ipynb (to read, of the path that is shown) as the name says.

        The file is there whole or not at all. Returns its path; `ChatError` where it cannot be written.
        """
        from mistral_nb.chat.files import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Conversation:
        """A conversation saved as .json. Raises `ChatError` that names the file and what is wrong."""
        from mistral_nb.chat.files import load

        return load(path)

    def _get(self, turn_id: str) -> Turn:
        turn = self._turns.get(turn_id)
        if turn is None:
            raise ChatError(f"there is no turn {turn_id!r} in this conversation; `turns` lists those that there are")
        return turn

    def _line(self, turn_id: str | None) -> tuple[Turn, ...]:
        """The turns from the first to `turn_id`."""
        line = []
        while turn_id is not None:
            line.append(self._turns[turn_id])
            turn_id = line[-1].parent
        return tuple(reversed(line))

    def _below(self, turn_id: str | None) -> list[Turn]:
        return [self._turns[name] for name in self._children.get(turn_id, [])]

    def _newest(self, turn_id: str) -> str:
        """The newest turn at or below a turn; of a comparison that nothing follows the first, or `turn_id` itself."""
        self._get(turn_id)
        if turn_id not in self._children:
            return turn_id
        found, stack = set[str](), [turn_id]
        while stack:
            found.add(stack[-1])
            stack.extend(self._children.get(stack.pop(), []))
        newest = next(name for name in reversed(self._turns) if name in found)
        return self.compared(newest)[0].id

    def _beside(self, turn: Turn, moved: list[str]) -> str | None:
        """The head after a turn that was it is gone: below it, its comparison, the newest branch, or its parent."""
        if moved:
            return self._newest(moved[-1])
        others = self._below(turn.parent)
        same = [each for each in others if turn.group and each.group == turn.group]
        return self._newest((same or others)[-1].id) if others else turn.parent

    def _put(self, turn: Turn) -> None:
        self._turns[turn.id] = turn
        self._children.setdefault(turn.parent, []).append(turn.id)

    def _index(self) -> None:
        self._children = {}
        for turn in self._turns.values():
            self._children.setdefault(turn.parent, []).append(turn.id)

    def _take(
        self, why: str, turns: tuple[Turn, ...], parents: Mapping[str, str | None], loaded: tuple[Turn, ...] = ()
    ) -> None:
        """Note what is about to go. What is being written then counts as cancelled."""
        now = {turn.id: turn for turn in loaded}
        self._taken.append(_Taken(why, _settled(turns), tuple(self._turns), parents, self._head, now))
        del self._taken[:-MAX_UNDO]

    def _become(self, why: str, turns: tuple[Turn, ...], head: str | None) -> None:
        self._take(why, self.turns, {}, turns)
        self._hold(turns, head)

    def _hold(self, turns: tuple[Turn, ...], head: str | None) -> None:
        self._turns = {turn.id: turn for turn in turns}
        self._head = head
        self._index()

    def _tell(self, why: str) -> None:
        with self._lock:
            watchers = list(self._watchers)
        for callback in watchers:
            callback(why)


def _settled(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(replace(turn, finish_reason="cancelled") if turn.running else turn for turn in turns)


def _exchange(turn: Turn) -> tuple[Message, ...]:
    """Question and answer; nothing without an answer. A message holds so many characters and no more."""
    if not turn.answer.strip():
        return ()
    return (Message("user", turn.question), Message("assistant", turn.answer[:MAX_TEXT]))


def _system(text: str | None) -> tuple[Message, ...]:
    return (Message("system", text),) if text else ()
