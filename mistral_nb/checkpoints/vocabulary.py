"""How many token ids a tokenizer file has, and its control tokens, without loading it as a tokenizer."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.untrusted import AGAIN, TOKENIZER_LIMIT, quoted, read_bytes, read_object
from mistral_nb.errors import ModelError

__all__ = ["TokenizerFacts", "check_vocabulary", "has_sign", "read_tokenizer"]

_SENTENCEPIECE_LIMIT = 16_000_000
_HIGHEST = 1 << 32
_TOKENS = 500_000
"""Far more than any vocabulary has, as are so many control tokens and fields of one token."""
_CONTROLS = 20_000
_FIELDS = 16
_WITHOUT_EMBEDDING = 16
_PADDING_MISTRAL = 255
_PADDING_SHARE = 0.05
_PIECE, _TEXT, _TYPE, _CONTROL = 1, 1, 3, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """`kind` is SentencePiece or BPE; `size` is the highest id + 1.

    `controls` are the texts that only a template or a raw prompt can write: in a tokenizer.json, of added tokens that
    are special or have a sign in them. `added` are its added tokens by id, `learnt` is the highest id + 1 of others.
    """

    kind: str
    size: int
    controls: frozenset[str]
    learnt: int
    added: Mapping[int, str] = field(default_factory=dict)


def has_sign(text: str) -> bool:
    """Whether `text` holds punctuation or a symbol, SentencePiece's mark for a space aside."""
    return any(unicodedata.category(character)[0] in "PS" for character in text.replace("\u2581", ""))


def read_tokenizer(path: Path) -> TokenizerFacts:
    """What a tokenizer.json or a SentencePiece model says of itself. `ModelError` for a damaged file."""
    if path.suffix != ".json":
        return _sentencepiece(path)
    data = read_object(path, TOKENIZER_LIMIT)
    try:
        return _bpe(path, data)
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is no tokenizer file ({error!r}); {AGAIN}") from error


def check_vocabulary(path: Path, facts: TokenizerFacts, vocab_size: int, *, mistral: bool) -> None:
    """`ModelError` unless a tokenizer can be a model's with `vocab_size` embeddings.

    Embeddings may be padded: by less than 256 in Mistral's own models, by 5% in others. A few added tokens, such as a
    `[PAD]` of the training, may lack embeddings; the engine then does without them.
    """
    size = min(facts.size, vocab_size)
    beyond = sorted(token for token in facts.added if token >= vocab_size)
    if facts.learnt > vocab_size:
        raise ModelError(
            f"{path} has token ids up to {facts.size - 1}, and the model has embeddings for {vocab_size}: "
            f"it is the tokenizer of another model; {AGAIN}"
        )
    if len(beyond) > _WITHOUT_EMBEDDING:
        raise ModelError(
            f"{path} adds {len(beyond)} tokens for which the model has no embeddings, such as "
            f"{quoted(facts.added[beyond[0]][:60])} with the id {beyond[0]} of {vocab_size}: it is the tokenizer of "
            "another model, or the embeddings were not resized to it; fetch the tokenizer that belongs to the weights"
        )
    padding = _PADDING_MISTRAL if mistral else max(_PADDING_MISTRAL, int(vocab_size * _PADDING_SHARE))
    if vocab_size - size > padding:
        raise ModelError(
            f"{path} has only {size} tokens, and the model has embeddings for {vocab_size}: "
            f"it is the tokenizer of another vocabulary; {AGAIN}"
        )


def _bpe(path: Path, data: Mapping[str, Any]) -> TokenizerFacts:
    model = data["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"{path} holds a {str(model['type'])[:40]!r} model, and supported is BPE; choose another model"
        )
    added = data.get("added_tokens") or []
    ids = [*model["vocab"].values(), *(token["id"] for token in added)]
    if not ids or not all(type(token) is int and 0 <= token < _HIGHEST for token in ids):
        raise ModelError(f"{path} has token ids that are no whole numbers below {_HIGHEST}, or none at all; {AGAIN}")
    texts = {token["id"]: str(token["content"]) for token in added}
    controls = frozenset(str(token["content"]) for token in added if token.get("special") or has_sign(token["content"]))
    learnt = max((token for token in model["vocab"].values() if token not in texts), default=-1) + 1
    return TokenizerFacts("BPE", max(ids) + 1, controls, learnt, texts)


def _sentencepiece(path: Path) -> TokenizerFacts:
    """A SentencePiece ModelProto: its field 1, repeated, is a piece with text (1), score (2) and type (3)."""
    data = read_bytes(path, _SENTENCEPIECE_LIMIT)
    size, looked_at, controls = 0, 0, set()
    try:
        for number, value in _fields(data, 0, len(data), _TOKENS):
            if number != _PIECE or not isinstance(value, slice):
                continue
            size += 1
            if data.find(b"\x18\x03", value.start, value.stop) >= 0:
                looked_at += 1
                if looked_at > _CONTROLS:
                    raise ValueError(f"more than {_CONTROLS} control tokens")
                piece = dict(_fields(data, value.start, value.stop, _FIELDS))
                text = piece.get(_TEXT)
                if piece.get(_TYPE) == _CONTROL and isinstance(text, slice):
                    controls.add(data[text].decode(errors="replace"))
    except (IndexError, ValueError) as error:
        raise ModelError(f"{path} is no SentencePiece model, or a damaged one ({error}); {AGAIN}") from error
    if not size:
        raise ModelError(f"{path} is a SentencePiece model without tokens; {AGAIN}")
    return TokenizerFacts("SentencePiece", size, frozenset(controls), size)


def _fields(data: bytes, at: int, end: int, limit: int) -> Iterator[tuple[int, int | slice]]:
    """The fields of a protobuf message in `data[at:end]`: number, and value or the place of its bytes."""
    for _ in range(limit):
        if at >= end:
            return
        tag, at = _varint(data, at, end)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at, end)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at, end)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"a field of kind {kind}")
        if length > end - at:
            raise ValueError(f"a field of {length} bytes where {end - at} are left")
        yield tag >> 3, slice(at, at + length)
        at += length
    raise ValueError(f"more than {limit} fields")


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number that does not end")
