"""The two kinds of tokenizer file: SentencePiece's `tokenizer.model` and Hugging Face's `tokenizer.json`.

Both encode a prompt's parts and give each token's piece. In neither can a text part become a control token.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from mistral_nb.checkpoints.untrusted import TOKENIZER_LIMIT, quoted, read_object
from mistral_nb.checkpoints.vocabulary import has_sign
from mistral_nb.engine.detokenizer import SPACE, Errors, Piece
from mistral_nb.engine.mistral_format import Control, Part
from mistral_nb.errors import MissingDependency, ModelError

__all__ = ["UNKNOWN_SHOWN", "JsonVocabulary", "SentencePieceVocabulary", "Vocabulary", "read_json"]

UNKNOWN_SHOWN = " \u2047 "
"""What an answer shows for the unknown token, as SentencePiece does."""

_ADVICE = "fetch the checkpoint again"


class Vocabulary(Protocol):
    """What a tokenizer file holds.

    `controls` maps to its id the text of each token that only a template or a raw prompt can write, and `begins_with`
    is the one put before every prompt, if any.
    `per_part`: each text part is encoded by itself and begins with a space of its own. `errors` and `drop_space` are
    the detokenizer's.
    """

    controls: dict[str, int]
    size: int
    begins_with: str | None
    per_part: bool
    errors: Errors
    drop_space: bool

    def encode(self, parts: Sequence[Part]) -> list[int]: ...

    def piece(self, token: int) -> Piece:
        """What an answer shows for `token`: nothing for a special token and for an id that does not exist."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file, `ModelError` where it holds something else."""
    return read_object(path, TOKENIZER_LIMIT) if path.exists() else {}


class SentencePieceVocabulary:
    """A `tokenizer.model` file. Each text part is encoded by itself."""

    per_part = True
    drop_space = True
    errors: Errors = "mistral_nb.each_byte"

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingDependency(
                f'{path.name} needs the package sentencepiece; run: pip install "mistral-nb[local]"'
            ) from error
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ModelError(f"{path} is no SentencePiece model ({quoted(error)}); {_ADVICE}") from error
        self.size = self._model.vocab_size()
        every = range(self.size)
        self.controls = {self._model.id_to_piece(token): token for token in every if self._model.is_control(token)}
        bos = self._model.bos_id()
        self.begins_with = self._model.id_to_piece(bos) if bos >= 0 else None

    def encode(self, parts: Sequence[Part]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [self.controls[part.token]] if isinstance(part, Control) else self._model.encode(part)
        return ids

    def piece(self, token: int) -> Piece:
        if not 0 <= token < self.size or self._model.is_control(token):
            return ""
        if self._model.is_byte(token):
            return bytes([int(self._model.id_to_piece(token)[3:-1], 16)])
        if self._model.is_unknown(token):
            return UNKNOWN_SHOWN
        return self._model.id_to_piece(token)


class JsonVocabulary:
    """A `tokenizer.json` file that holds a BPE model.

    Control tokens are the added tokens that are special, and of the others those with a sign in their text, such as
    `<|im_start|>` or `<think>`: whether special or not, they are what a template marks turns with. An answer shows
    those that are not special. Other added tokens are words and runs of spaces, which any text may hold.

    Control tokens keep their ids but get private names with a random number in them, in the model's vocabulary too, and
    merges that would make one from text are left out. A prompt whose control tokens go by these names is then encoded
    in one call, exactly as transformers does it, and the token's usual text is text like any other.

    `per_part`: encode each text part by itself and begin it with a space, as SentencePiece does for Mistral. Tokens
    from the id `limit` on, for which the model has no embeddings, are left out.
    """

    def __init__(self, path: Path, *, per_part: bool, limit: int | None = None) -> None:
        data = read_json(path)
        try:
            _check_model(data, path)
            data = data if limit is None else _within(data, limit)
            added = data.get("added_tokens") or []
            special = {int(token["id"]) for token in added if token["special"]}
            self.controls = {
                token["content"]: int(token["id"]) for token in added if token["special"] or has_sign(token["content"])
            }
            nonce = f"{secrets.randbelow(10**24):024}"
            self._names = {text: f"\ue000{nonce}{token}\ue001" for text, token in self.controls.items()}
            self._bytes = "ByteLevel" in _types(data["decoder"])
            self._unknown = self.controls.get(data["model"].get("unk_token") or "")
            self._tokenizer = _build(_renamed(data, self._names, per_part))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is no tokenizer file ({quoted(repr(error))}); {_ADVICE}") from error
        moved = [text for text, name in self._names.items() if self._tokenizer.token_to_id(name) != self.controls[text]]
        if moved:
            raise ModelError(f"{path} gives {quoted(moved[0])} an id that the tokenizer cannot keep; {_ADVICE}")
        self.size = self._tokenizer.get_vocab_size()
        self.per_part = per_part
        self.drop_space = per_part or _drops_space(data["decoder"])
        self.errors: Errors = "replace" if self._bytes else "mistral_nb.each_byte"
        self._hidden = frozenset(special)
        self._shown = {token: text for text, token in self.controls.items() if token not in special}
        self.begins_with = self._first_of_everything()

    def _first_of_everything(self) -> str | None:
        """The control token that the file puts before every text, if any."""
        plain = self._tokenizer.encode("x", add_special_tokens=False).ids
        whole = self._tokenizer.encode("x").ids
        if whole[: len(plain)] == plain:
            return None
        return next((text for text, token in self.controls.items() if token == whole[0]), None)

    def encode(self, parts: Sequence[Part]) -> list[int]:
        if self.per_part:
            return [token for part in parts if part for token in self._encode([part])]
        return self._encode(parts)

    def _encode(self, parts: Sequence[Part]) -> list[int]:
        text = "".join(self._names[part.token] if isinstance(part, Control) else part for part in parts)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, token: int) -> Piece:
        text = self._shown.get(token) or (self._tokenizer.id_to_token(token) if token >= 0 else None)
        if self._bytes:
            return b"" if text is None or token in self._hidden else _bytes_of(text)
        if token == self._unknown:
            return UNKNOWN_SHOWN
        if text is None or token in self._hidden:
            return ""
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes([int(text[3:-1], 16)])
        return text


def _build(data: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(data))
    except Exception as error:  # tokenizers raises no narrower type
        raise ValueError(str(error)) from error


def _check_model(data: Mapping[str, Any], path: Path) -> None:
    if data["model"]["type"] != "BPE":
        raise ModelError(f"{path} holds a {quoted(data['model']['type'])} model; supported is BPE")
    if not _types(data.get("decoder")) & {"ByteLevel", "ByteFallback", "Metaspace"}:
        raise ModelError(f"{path} has a decoder that is not known here; supported are byte-level and SentencePiece's")


def _types(component: Any) -> set[str]:
    """The types of a component of tokenizer.json and of all that it is made of."""
    if not component:
        return set()
    inner = component.get("decoders") or component.get("pretokenizers") or component.get("normalizers") or []
    return {component["type"]}.union(*map(_types, inner))


def _drops_space(decoder: Mapping[str, Any]) -> bool:
    if decoder["type"] == "Metaspace":
        return bool(decoder.get("prepend_scheme", "always") != "never")
    return "Strip" in _types(decoder)


def _renamed(data: Mapping[str, Any], names: Mapping[str, str], per_part: bool) -> dict[str, Any]:
    """The same tokenizer with its control tokens under other names; if `per_part`, with SentencePiece's space rule."""
    model = data["model"]
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    kept = [pair for pair in merges if "".join(pair) not in names and not (pair[0] in names or pair[1] in names)]
    vocab = {names.get(text, text): token for text, token in model["vocab"].items()}
    added = [_added(token, names) for token in data.get("added_tokens") or []]
    unknown = model.get("unk_token")
    renamed = {
        **data,
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "model": {**model, "vocab": vocab, "merges": kept, "unk_token": names.get(unknown, unknown)},
    }
    if per_part:
        prepend = {"type": "Prepend", "prepend": SPACE}
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        renamed |= {"normalizer": {"type": "Sequence", "normalizers": [prepend, spaces]}, "pre_tokenizer": None}
    return renamed


def _within(data: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """The same tokenizer without the tokens from the id `limit` on."""
    model = data["model"]
    vocab = {text: token for text, token in model["vocab"].items() if token < limit}
    added = [token for token in data.get("added_tokens") or [] if token["id"] < limit]
    if len(vocab) == len(model["vocab"]):
        return {**data, "added_tokens": added}
    pairs = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= vocab.keys()]
    return {**data, "added_tokens": added, "model": {**model, "vocab": vocab, "merges": merges}}


def _added(token: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    """An added token, under its private name if it has one, which is then found wherever it stands."""
    if token["content"] not in names:
        return token
    return {**token, "content": names[token["content"]], "normalized": False, "single_word": False}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 for itself, the rest in order from U+0100."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


def _bytes_of(text: str) -> bytes:
    """A byte-level token's bytes; a token that is not written in that alphabet stands for its own text."""
    if all(character in _BYTES for character in text):
        return bytes(_BYTES[character] for character in text)
    return text.encode()
