"""A SentencePiece vocabulary in a GGUF file, written as the `tokenizer.model` that it came from.

The file is a protobuf message: pieces (text, score, type), the trainer's settings, the normaliser's. SentencePiece
merges the pair whose piece has the highest score, so text, score and type of each piece are what decides the ids.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence

from mistral_nb.errors import ModelError
from mistral_nb.models.gguf_header import GgufHeader
from mistral_nb.models.gguf_vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    GgufVocabulary,
    marks_turns,
)

__all__ = ["tokenizer_model"]

_SPACE = "\u2581"
_BPE = 2
_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# Field numbers of sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALISER = 1, 2, 3
_PIECE, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK = 3, 4, 35
_LONGEST_PIECE = 512
"""Characters; SentencePiece learns none of over 16 unless it is told to, and symbols by hand are names."""
_BY_HAND = 1 << 22
"""Characters of all pieces that may have been defined by hand: each is looked at once for every one of them."""
_IDS = {"unk": (40, 45), "bos": (41, 46), "eos": (42, 47), "pad": (43, 48)}
_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES, _ESCAPE_SPACES = 1, 3, 4, 5


def tokenizer_model(header: GgufHeader, vocabulary: GgufVocabulary) -> bytes:
    """The file's bytes. `ModelError` where the GGUF file has lost what SentencePiece needs."""
    scores = header.values("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise _wrong(header, f"{len(scores)} scores for {len(vocabulary.tokens)} tokens")
    types = _types(header, vocabulary, scores)
    pieces = [
        text.replace(" ", _SPACE) if kind == USER_DEFINED else text
        for text, kind in zip(vocabulary.tokens, types, strict=True)
    ]
    _check(header, pieces, scores, types)
    trainer = [
        _whole(_MODEL_TYPE, _BPE),
        _whole(_VOCAB_SIZE, len(pieces)),
        _whole(_BYTE_FALLBACK, BYTE in types),
    ]
    special = {"unk": types.index(UNKNOWN), "bos": vocabulary.bos, "eos": vocabulary.eos, "pad": vocabulary.pad}
    for name, (id_field, piece_field) in _IDS.items():
        token = special[name]
        if token is not None:
            trainer += [_whole(id_field, token), _text(piece_field, pieces[token])]
    normaliser = [
        _text(_NAME, "identity"),
        _whole(_ADD_DUMMY_PREFIX, header.optional("tokenizer.ggml.add_space_prefix", bool) is not False),
        _whole(_REMOVE_EXTRA_SPACES, header.optional("tokenizer.ggml.remove_extra_whitespaces", bool) is True),
        _whole(_ESCAPE_SPACES, True),
    ]
    parts = [
        _message(_PIECES, [_text(_PIECE, text), _number(_SCORE, score), _whole(_TYPE, kind)])
        for text, score, kind in zip(pieces, scores, types, strict=True)
    ]
    return b"".join([*parts, _message(_TRAINER, trainer), _message(_NORMALISER, normaliser)])


def _types(header: GgufHeader, vocabulary: GgufVocabulary, scores: Sequence[float]) -> list[int]:
    """The pieces' types, GGUF's numbers being SentencePiece's, with those that the usual converter changes put back.

    It makes `<unk>` a control token where Hugging Face's settings list it, and symbols that were defined by hand normal
    ones. No merge leads to those, and their score is 0, so that they are told from pieces that were learnt.
    """
    types = list(vocabulary.types)
    for token in (vocabulary.bos, vocabulary.eos):
        types[token] = CONTROL
    if UNKNOWN not in types and vocabulary.unknown is not None:
        types[vocabulary.unknown] = UNKNOWN
    if max(map(len, vocabulary.tokens)) > _LONGEST_PIECE:
        raise _wrong(header, f"a token of over {_LONGEST_PIECE} characters")
    learnt = {text for text, kind in zip(vocabulary.tokens, types, strict=True) if kind == NORMAL}
    unscored = [token for token, kind in enumerate(types) if kind == NORMAL and scores[token] == 0.0]
    if sum(len(vocabulary.tokens[token]) for token in unscored) > _BY_HAND:
        raise _wrong(header, f"{len(unscored)} tokens of score 0, so that the order of the merges is lost")
    for token in unscored:
        text = vocabulary.tokens[token]
        learnt_too = any(text[:at] in learnt and text[at:] in learnt for at in range(1, len(text)))
        if len(text) > 1 and not learnt_too:
            types[token] = CONTROL if marks_turns(text, vocabulary.template) else USER_DEFINED
    return types


def _check(header: GgufHeader, pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> None:
    """What SentencePiece itself would refuse, and scores that do not say which merge comes first."""
    learnt = {score for text, score, kind in zip(pieces, scores, types, strict=True) if kind == NORMAL and text[1:]}
    bytes_found = [text for text, kind in zip(pieces, types, strict=True) if kind == BYTE]
    problems = {
        "a score that is no number": not all(map(math.isfinite, scores)),
        "tokens without a text": not all(pieces),
        "a token with a null character": any("\0" in text for text in pieces),
        "two tokens of one text": len(set(pieces)) != len(pieces),
        f"{types.count(UNKNOWN)} unknown tokens": types.count(UNKNOWN) != 1,
        "other byte tokens than <0x00> to <0xFF>": bool(bytes_found) and set(bytes_found) != _BYTE_PIECES,
        "the same score for all tokens, so that the order of the merges is lost": len(learnt) == 1,
    }
    for problem, found in problems.items():
        if found:
            raise _wrong(header, problem)


def _wrong(header: GgufHeader, problem: str) -> ModelError:
    return ModelError(f"the SentencePiece vocabulary of {header.path.name} has {problem}; choose another file")


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the high bit set on all but the last."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _whole(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _number(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _message(field: int, parts: Iterable[bytes]) -> bytes:
    return _bytes(field, b"".join(parts))
