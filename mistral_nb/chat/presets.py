"""Presets: a system text and how to sample, under a name. A few are built in; a user's own are in a JSON file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_nb.chat.files import read_text, write_text
from mistral_nb.chat.turns import ChatError, Choice
from mistral_nb.config import config_path
from mistral_nb.errors import MistralError

__all__ = ["BUILT_IN", "SAMPLING", "Preset", "delete_preset", "presets", "presets_path", "save_preset"]

# The fields that a preset sets or, where it does not name them, puts back to their defaults.
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "frequency_penalty", "presence_penalty")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]{0,38}[^\s\x00-\x1f\x7f])?")
_MAX_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Preset:
    """`system` None is no system text. `fields` are those of a `Choice`. Raises `InvalidRequest` for a wrong one."""

    system: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checked = Choice(system=self.system, fields=self.fields)
        object.__setattr__(self, "system", checked.system)
        object.__setattr__(self, "fields", checked.fields)

    def applied(self, choice: Choice) -> Choice:
        """`choice` with this system text and sampling; seed, max_tokens, adapter and stop texts stay if not named."""
        kept = {name: value for name, value in choice.fields.items() if name not in SAMPLING}
        return Choice(choice.backend, choice.model, self.system, {**kept, **self.fields})


BUILT_IN: Mapping[str, Preset] = {
    "plain": Preset(),
    "concise": Preset("Answer in as few words as are needed to be right. No introduction, no summary, no repetition."),
    "precise": Preset(
        "Answer exactly what is asked. Say plainly what you do not know, and do not guess.", {"temperature": 0}
    ),
    "creative": Preset(
        "Write with imagination: pick the unexpected word, and avoid stock phrases.",
        {"temperature": 1.0, "top_p": 0.95},
    ),
    "code": Preset(
        "You are a careful programmer. Give code that runs as it is, in one fenced block with its language named, in "
        "Python unless another is asked for. Explain only what is not plain from the code, after it and briefly.",
        {"temperature": 0.2},
    ),
    "explain errors": Preset(
        "You explain errors to a programmer. Say first what went wrong in one sentence, then why, then the smallest "
        "change that mends it, as code in a fenced block. If the cause cannot be seen, say what to look at next.",
        {"temperature": 0.2},
    ),
    "translate": Preset(
        "Translate what you are given: into English, or from English into the language that is named. Keep the "
        "meaning, the tone and the formatting; leave code and names as they are. Give the translation alone.",
        {"temperature": 0.2},
    ),
}


def presets_path() -> Path:
    """The file of a user's own presets, beside the configuration file; it need not exist."""
    return config_path().with_name("presets.json")


def presets() -> dict[str, Preset]:
    """The built-in ones and then the user's own, which may take a built-in one's name.

    Raises `ChatError` that names the file where it cannot be read.
    """
    return {**BUILT_IN, **_own()}


def save_preset(name: str, preset: Preset) -> None:
    """Keep a preset under a name, in place of one of that name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ChatError(f"{name!r} is no name for a preset: give 1 to 40 characters on one line")
    _write({**_own(), name: preset})


def delete_preset(name: str) -> None:
    """Take one of the user's own away. A built-in one of that name is there again."""
    own = _own()
    if name not in own:
        raise ChatError(f"there is no preset {name!r} of your own; they are in {presets_path()}")
    del own[name]
    _write(own)


def _own() -> dict[str, Preset]:
    path = presets_path()
    if not path.exists():
        return {}
    try:
        data = json.loads(read_text(path, _MAX_BYTES))
        if not isinstance(data, dict):
            raise ChatError("it holds no object of presets by name")
        return {name: _read(name, value) for name, value in data.items()}
    except (ValueError, RecursionError, MistralError) as error:
        raise ChatError(f"the presets in {path} cannot be read: {error}. Correct or delete that file") from error


def _read(name: str, value: Any) -> Preset:
    if not isinstance(value, dict) or not set(value) <= {"system", "fields"} or not _NAME.fullmatch(name):
        raise ChatError(
            f'{name!r} is no preset: each has a name and is an object such as {{"system": "...", "fields": {{}}}}'
        )
    if not isinstance(value.get("fields", {}), dict):
        raise ChatError(f"the fields of {name!r} are no object")
    return Preset(value.get("system"), value.get("fields", {}))


def _write(own: Mapping[str, Preset]) -> None:
    data = {name: {"system": preset.system, "fields": dict(preset.fields)} for name, preset in own.items()}
    path = presets_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ChatError(
            f"{path.parent} cannot be made: {error.strerror}. Set MISTRAL_NB_CONFIG to another place"
        ) from error
    write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")
