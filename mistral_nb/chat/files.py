"""Conversations as JSON, and files that are written whole or not at all. What is read is checked before it is used."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

from mistral_nb.chat.conversation import Conversation
from mistral_nb.chat.turns import Attachment, AttachmentKind, ChatError, Choice, Turn, new_id
from mistral_nb.errors import InvalidRequest
from mistral_nb.types import MAX_TEXT, FinishReason

__all__ = ["from_json", "load", "read_text", "save", "to_json", "write_text"]

FORMAT = "mistral-nb chat"
VERSION = 1
MAX_BYTES = 256 << 20
MAX_TURNS = 100_000
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TURN = tuple(field.name for field in fields(Turn))
_CHOICE = tuple(field.name for field in fields(Choice))
_ATTACHMENT = tuple(field.name for field in fields(Attachment))


class _Broken(Exception):
    """What is wrong with what is read."""


def to_json(conversation: Conversation) -> str:
    """{"format", "version", "head": id or null, "turns": [...]}, a parent before its children."""
    with conversation.steady():
        head, turns = conversation.head, conversation.turns
    data = {"format": FORMAT, "version": VERSION, "head": head, "turns": [_plain(turn) for turn in turns]}
    return json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def _plain(turn: Turn) -> dict[str, Any]:
    data = {name: getattr(turn, name) for name in _TURN}
    data["choice"] = {name: getattr(turn.choice, name) for name in _CHOICE}
    data["attachments"] = [{name: getattr(each, name) for name in _ATTACHMENT} for each in turn.attachments]
    return data


def from_json(text: str) -> Conversation:
    """What `to_json` wrote; an answer that was being written counts as cancelled. `ChatError` says what is wrong."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
        return _read(data)
    except (ValueError, RecursionError) as error:
        problem = f"this is no JSON of a conversation: {_problem(error)}"
    except _Broken as error:
        problem = str(error)
    raise ChatError(f"{problem}. Use a file that save() wrote, as it was written")


def _read(data: Any) -> Conversation:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _Broken(f'this is no conversation: it has no "format": "{FORMAT}"')
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ChatError(f"this conversation has version {_short(version)}; this mistral-nb reads {VERSION}: upgrade it")
    if version != VERSION or isinstance(version, bool):
        raise _Broken(f"this conversation has the version {_short(version)}, which there is not")
    _keys(data, ("format", "version", "head", "turns"), "the conversation")
    turns = _list(data["turns"], "turns")
    if len(turns) > MAX_TURNS:
        raise _Broken(f"this conversation has {len(turns)} turns; at most {MAX_TURNS} are read")
    return _grown(data["head"], turns)


def _grown(head: Any, entries: list[Any]) -> Conversation:
    turns: dict[str, Turn] = {}
    groups: dict[str, str | None] = {}
    for number, entry in enumerate(entries, 1):
        where = f"turn {number}"
        turn = _turn(entry, where)
        if turn.id in turns:
            raise _Broken(f"{where}: there is a turn {turn.id} before it already")
        if turn.parent is not None and turn.parent not in turns:
            raise _Broken(f"{where}: its parent {turn.parent} is not before it")
        if turn.group is not None and groups.setdefault(turn.group, turn.parent) != turn.parent:
            raise _Broken(f"{where}: it has another parent than the rest of its group")
        turns[turn.id] = turn
    if head is not None and (not isinstance(head, str) or head not in turns):
        raise _Broken(f"the head {_short(head)} is none of its turns")
    conversation = Conversation()
    conversation._hold(tuple(turns.values()), head)
    return conversation


def _turn(entry: Any, where: str) -> Turn:
    _keys(entry, _TURN, where)
    optional = {name: _text(entry[name], f"{where}, {name}") for name in ("sent", "error") if entry[name] is not None}
    reason, left_out, served = entry["finish_reason"], entry["left_out"], entry["served"]
    if reason is not None and reason not in get_args(FinishReason):
        raise _Broken(f"{where}: its finish_reason {_short(reason)} is not one of {', '.join(get_args(FinishReason))}")
    if isinstance(left_out, bool) or not isinstance(left_out, int) or left_out < 0:
        raise _Broken(f"{where}: left_out {_short(left_out)} is no number of turns")
    if served is not None and not isinstance(served, dict):
        raise _Broken(f"{where}: served is no object")
    turn = Turn(
        id=_id(entry["id"], f"{where}, id"),
        parent=None if entry["parent"] is None else _id(entry["parent"], f"{where}, parent"),
        prompt=_text(entry["prompt"], f"{where}, prompt"),
        choice=_choice(entry["choice"], where),
        sent=optional.get("sent"),
        attachments=tuple(_attachment(each, where) for each in _list(entry["attachments"], f"{where}, attachments")),
        answer=_text(entry["answer"], f"{where}, answer"),
        finish_reason=reason or "cancelled",
        error=optional.get("error"),
        footer=_text(entry["footer"], f"{where}, footer"),
        served=served,
        left_out=left_out,
        group=None if entry["group"] is None else _id(entry["group"], f"{where}, group"),
        asked_at=_text(entry["asked_at"], f"{where}, asked_at"),
    )
    if max(len(turn.prompt), len(turn.question)) > MAX_TEXT:
        raise _Broken(f"{where}: its question holds more than {MAX_TEXT} characters")
    return turn


def _choice(entry: Any, where: str) -> Choice:
    _keys(entry, _CHOICE, f"{where}, choice")
    if not isinstance(entry["fields"], dict):
        raise _Broken(f"{where}: the fields of its choice are no object")
    try:
        return Choice(**entry)
    except InvalidRequest as error:
        raise _Broken(f"{where}, choice: {error}") from error


def _attachment(entry: Any, where: str) -> Attachment:
    _keys(entry, _ATTACHMENT, f"{where}, attachment")
    if entry["kind"] not in get_args(AttachmentKind):
        raise _Broken(
            f"{where}: an attachment is {', '.join(get_args(AttachmentKind))}, and not {_short(entry['kind'])}"
        )
    name, text = (_text(entry[key], f"{where}, attachment, {key}") for key in ("name", "text"))
    return Attachment(entry["kind"], name, text)


def _keys(entry: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(entry, dict):
        raise _Broken(f"{where} is no object")
    for missing in (name for name in names if name not in entry):
        raise _Broken(f"{where} lacks {missing!r}")
    for unknown in (name for name in entry if name not in names):
        raise _Broken(f"{where} holds {_short(unknown)}, which is not known")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Broken(f"{where} is no list")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _Broken(f"{where} = {_short(value)} is no text")
    return value


def _id(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise _Broken(f"{where} = {_short(value)} is no id: 1 to 64 letters, digits, - and _")
    return value


def _short(value: Any) -> str:
    shown = repr(value) if isinstance(value, str | int | float | None) else f"of type {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _problem(error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "it holds half of a surrogate pair"
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def save(conversation: Conversation, path: str | Path) -> Path:
    """Write `conversation` in the form that the suffix names."""
    from mistral_nb.chat.export import to_markdown, to_notebook

    target = Path(path).expanduser()
    forms: Mapping[str, Callable[[Conversation], str]] = {".json": to_json, ".md": to_markdown, ".ipynb": to_notebook}
    form = forms.get(target.suffix.lower())
    if form is None:
        raise ChatError(f"{target}: what is it to be? Name it {', '.join(f'*{suffix}' for suffix in forms)}")
    write_text(target, form(conversation))
    return target


def load(path: str | Path) -> Conversation:
    """The conversation in a file that `save` wrote as .json."""
    source = Path(path).expanduser()
    if source.suffix.lower() in (".md", ".ipynb"):
        raise ChatError(f"{source} is for reading, and holds one branch: load what was saved as .json")
    try:
        return from_json(read_text(source, MAX_BYTES))
    except ChatError as error:
        told = str(error)
        raise ChatError(told if str(source) in told else f"{source}: {told}") from error


def read_text(path: Path, most: int) -> str:
    """A file of at most `most` bytes, in UTF-8. `ChatError` names it."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise ChatError(f"{path} cannot be read: {error.strerror or error}. Check the path") from error
    if len(data) > most:
        raise ChatError(f"{path} has more than {most >> 20} MiB, and is not read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ChatError(
            f"{path} holds no text in UTF-8 (byte {error.start}). Check that it is the right file"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole: beside it first, then in its place. `ChatError` names it."""
    try:
        target = path.resolve()
        staged = target.with_name(f".{target.name[:64]}-{new_id()}.part")
        mode = target.stat().st_mode & 0o777 if target.exists() else None
        handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        try:
            with open(handle, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                staged.chmod(mode)  # the umask took from it
            os.replace(staged, target)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
    except (OSError, UnicodeEncodeError, RuntimeError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ChatError(f"{path} cannot be written: {problem}. Choose another place") from error
