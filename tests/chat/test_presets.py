"""Presets: the built-in ones, and the user's own in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_nb.chat import ChatError, Choice, Preset, delete_preset, presets, save_preset
from mistral_nb.chat.presets import BUILT_IN, presets_path
from mistral_nb.errors import InvalidRequest


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MISTRAL_NB_CONFIG", str(tmp_path / "mine" / "config.toml"))
    return tmp_path / "mine"


def test_the_built_in_ones() -> None:
    assert list(presets()) == ["plain", "concise", "precise", "creative", "code", "explain errors", "translate"]
    assert presets()["precise"].fields == {"temperature": 0.0}
    assert not presets_path().exists()


def test_a_preset_replaces_text_and_sampling_and_keeps_the_rest() -> None:
    choice = Choice(
        "local", "embedded", "Old.", {"top_k": 5, "temperature": 1, "seed": 3, "max_tokens": 9, "lora": "a"}
    )
    precise = BUILT_IN["precise"].applied(choice)
    assert (precise.backend, precise.model) == ("local", "embedded")
    assert precise.fields == {"seed": 3, "max_tokens": 9, "lora": "a", "temperature": 0.0}
    assert BUILT_IN["plain"].applied(precise) == Choice("local", "embedded", None, choice.fields).with_fields(
        top_k=None, temperature=None
    )


def test_ones_own_are_kept_changed_and_deleted(folder: Path) -> None:
    save_preset("Höflich 🦊", Preset("Be polite.", {"stop": ["x"], "max_tokens": 4}))
    save_preset("plain", Preset("Not so plain."))
    assert list(presets())[-1] == "Höflich 🦊"
    assert presets()["Höflich 🦊"] == Preset("Be polite.", {"stop": ("x",), "max_tokens": 4})
    assert presets()["plain"].system == "Not so plain."
    delete_preset("plain")
    assert presets()["plain"] == BUILT_IN["plain"]
    assert [path.name for path in folder.iterdir()] == ["presets.json"]
    with pytest.raises(ChatError, match="no preset 'plain' of your own"):
        delete_preset("plain")
    for bad in ("", " x", "x" * 41, "a\nb", "\x1b"):
        with pytest.raises(ChatError, match="no name for a preset"):
            save_preset(bad, Preset())
    with pytest.raises(InvalidRequest):
        Preset(fields={"temperature": 9})


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "[" * 99999, '{"a": 1}', '{"": {}}', '{"a": {"html": ""}}', '{"a": {"system": 1}}'),
        *('{"a": {"fields": []}}', '{"a": {"fields": {"x": 1}}}', '{"a": {"system": "\\ud800"}}'),
    ],
)
def test_a_broken_file_is_named_and_left_alone(text: str, folder: Path) -> None:
    folder.mkdir()
    presets_path().write_text(text)
    with pytest.raises(ChatError, match=r"the presets in .*presets\.json cannot be read: .*\. Correct or delete"):
        presets()
    with pytest.raises(ChatError, match="cannot be read"):
        save_preset("x", Preset())
    assert presets_path().read_text() == text
