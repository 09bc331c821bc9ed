"""`{{name}}` in a prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from IPython.core.error import UsageError

from mistral_nb_magics.interpolate import interpolate

NAMES = {
    "topic": "tides",
    "table": SimpleNamespace(columns=["year", "height"], size=2),
    "data": {"key": {"inner": "deep"}},
    "nested": "{{topic}} and {topic}",
    "_private": "p",
}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("About {{topic}}.", "About tides."),
        ("{{ topic }}{{topic}}", "tidestides"),
        ("{{table.columns[0]}} {{table.columns[-1]}} {{table.size}}", "year height 2"),
        ("{{data['key']['inner']}} {{data}}", "deep {'key': {'inner': 'deep'}}"),
        ("{{nested}}", "{{topic}} and {topic}"),
        ("{topic} ${topic} $topic {} {{}} }} {{", "{topic} ${topic} $topic {} {{}} }} {{"),
        ("{{_private}}", "p"),
    ],
)
def test_values_are_put_in_once(text: str, wanted: str) -> None:
    assert interpolate(text, NAMES) == wanted


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{topik}}", "no variable 'topik'; did you mean 'topic'?"),
        ("{{topic.uper}}", "type str has no attribute 'uper'; did you mean 'upper'"),
        ("{{table.columns[2]}}", "nothing at [2]"),
        ("{{data['ky']}}", "nothing at ['ky'] (KeyError)"),
        ("{{table[0]}}", "TypeError"),
        ("{{len(topic)}}", "only a name"),
        ("{{topic.upper()}}", "only a name"),
        ("{{topic[topic]}}", "only a name"),
        ("{{topic + topic}}", "only a name"),
        ("{{__import__('os').system}}", "only a name"),
        ("{{a: 1}}", "only a name"),
    ],
)
def test_what_is_not_a_known_value_is_named(text: str, told: str) -> None:
    with pytest.raises(UsageError) as failure:
        interpolate(f"See {text} here.", NAMES)
    assert type(failure.value) is UsageError
    assert text in str(failure.value)
    assert told in str(failure.value)


class Broken:
    """Every way of reading it fails."""

    @property
    def part(self) -> str:
        raise RuntimeError("no part")

    def __getitem__(self, index: object) -> str:
        raise RuntimeError("no item")

    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(("text", "told"), [("{{b}}", "no text"), ("{{b.part}}", "no part"), ("{{b[0]}}", "no item")])
def test_what_a_value_raises_is_told_in_short(text: str, told: str) -> None:
    with pytest.raises(UsageError) as failure:
        interpolate(text, {"b": Broken()})
    assert f"{text}: reading it raised RuntimeError: {told}" in str(failure.value)


def test_the_way_out_is_named() -> None:
    with pytest.raises(UsageError, match="--no-interpolate"):
        interpolate("{{nobody}}", {})
