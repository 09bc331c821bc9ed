"""The models that are known by name."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EMBEDDED", "KNOWN", "KnownModel", "find_known"]

EMBEDDED = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model known by name: about `bytes` on disk, from a download of about `download` bytes.

    `stand_in` marks one that only stands in for Mistral-7B.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    licence: str
    hub_id: str
    bytes: int
    download: int
    stand_in: bool = False


KNOWN: tuple[KnownModel, ...] = (
    KnownModel(
        EMBEDDED,
        ("embedded", "smollm2"),
        "SmolLM2 135M Instruct",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        540_000_000,
        93_000_000,
        stand_in=True,
    ),
    *(
        KnownModel(
            f"mistral-7b-instruct-{version}",
            aliases,
            f"Mistral 7B Instruct {version}",
            "Apache-2.0",
            f"mistralai/Mistral-7B-Instruct-{version}",
            14_500_000_000,
            14_500_000_000,
        )
        for version, aliases in (
            ("v0.1", ()),
            ("v0.2", ("mistral-7b", "mistral-7b-instruct")),
            ("v0.3", ()),
        )
    ),
)
BY_NAME = {spelling.lower(): model for model in KNOWN for spelling in (model.name, *model.aliases, model.hub_id)}
"""Each known model by its name, aliases and hub id, in lower case."""


def find_known(name: str) -> KnownModel | None:
    """The known model of that name, alias or hub id, whatever the case."""
    return BY_NAME.get(name.lower())
