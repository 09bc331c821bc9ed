"""The vocabulary of a GGUF file: its tokens, their types, the special ones, and the chat template."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mistral_nb.checkpoints.tokenizer_files import is_mistral_template
from mistral_nb.checkpoints.vocabulary import has_sign
from mistral_nb.errors import ModelError
from mistral_nb.models.gguf_header import GgufHeader

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "USER_DEFINED",
    "GgufVocabulary",
    "marks_turns",
    "read_vocabulary",
    "speaks_mistral",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's token types; SentencePiece has the same numbers."""

_KEY = "tokenizer.ggml"
_MARK = re.compile(r"<\|[^\s]*\|>")
_MISTRAL_NAME = re.compile(r"mistral.*instruct", re.IGNORECASE)
_NAMES = ("general.name", "general.basename", "general.base_model.0.name", "general.base_model.0.repo_url")


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """`model` is "llama" (SentencePiece) or "gpt2" (byte-level); the special tokens are ids within `tokens`.

    `turn_end` ends an answer besides `eos`; `add_bos`: whether `bos` goes before a raw prompt.
    """

    model: str
    tokens: list[str]
    types: list[int]
    bos: int
    eos: int
    pad: int | None
    unknown: int | None
    turn_end: int | None
    add_bos: bool
    template: str | None

    @property
    def controls(self) -> dict[int, str]:
        """The control tokens' texts by id."""
        pairs = zip(self.tokens, self.types, strict=True)
        return {token: text for token, (text, kind) in enumerate(pairs) if kind == CONTROL}

    @property
    def special_ids(self) -> dict[str, Any]:
        """As config.json names them."""
        ids = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}
        return {name: token for name, token in ids.items() if token is not None}


def read_vocabulary(header: GgufHeader) -> GgufVocabulary:
    """`ModelError` where a part is missing or an id lies outside."""
    tokens = header.values(f"{_KEY}.tokens", str)
    types = header.values(f"{_KEY}.token_type", int)
    if len(types) != len(tokens) or not all(NORMAL <= kind <= BYTE for kind in types):
        raise ModelError(f"{header.path.name} has no type for each of its {len(tokens)} tokens; fetch the file again")
    model = header.value(f"{_KEY}.model", str)
    template = header.optional("tokenizer.chat_template", str)
    add_bos = header.optional(f"{_KEY}.add_bos_token", bool)
    return GgufVocabulary(
        model=model,
        tokens=tokens,
        types=[
            CONTROL if kind == USER_DEFINED and marks_turns(text, template) else kind
            for text, kind in zip(tokens, types, strict=True)
        ],
        bos=_known(header, "bos", header.value(f"{_KEY}.bos_token_id", int), len(tokens)),
        eos=_known(header, "eos", header.value(f"{_KEY}.eos_token_id", int), len(tokens)),
        pad=_optional(header, "padding", len(tokens)),
        unknown=_optional(header, "unknown", len(tokens)),
        turn_end=_optional(header, "eot", len(tokens)),
        add_bos=model == "llama" if add_bos is None else add_bos,
        template=template,
    )


def marks_turns(text: str, template: str | None) -> bool:
    """Whether a token that was defined by hand is one that a template writes, and so none that user text may become.

    Such are `<|im_end|>` and, where the template names it, `<think>`; not a run of spaces or signs.
    """
    if _MARK.fullmatch(text):
        return True
    named = template is not None and text in template
    return named and has_sign(text) and any(map(str.isalpha, text))


def speaks_mistral(header: GgufHeader, vocabulary: GgufVocabulary) -> bool:
    """Whether the engine's own chat format is the model's: by its template, or without one by its name.

    It is not where an answer ends with another token than `</s>`.
    """
    if vocabulary.model != "llama" or not {"<s>", "</s>"} <= set(vocabulary.controls.values()):
        return False
    if vocabulary.tokens[vocabulary.eos] != "</s>":
        return False
    if vocabulary.template is not None:
        return is_mistral_template(vocabulary.template)
    return any(_MISTRAL_NAME.search(str(header.metadata.get(key, ""))) for key in _NAMES)


def _optional(header: GgufHeader, name: str, size: int) -> int | None:
    token = header.optional(f"{_KEY}.{name}_token_id", int)
    return None if token is None else _known(header, name, token, size)


def _known(header: GgufHeader, name: str, token: int, size: int) -> int:
    if not 0 <= token < size:
        raise ModelError(
            f"{header.path.name} has {token} for {_KEY}.{name}_token_id and only {size} tokens; fetch the file again"
        )
    return token
