"""The tokenizer files of a checkpoint, from the vocabulary of a GGUF file: what encodes text, and the settings."""

from __future__ import annotations

import json
from typing import Any

from mistral_nb.checkpoints.untrusted import quoted
from mistral_nb.errors import ModelError
from mistral_nb.models.gguf_header import GgufHeader
from mistral_nb.models.gguf_sentencepiece import tokenizer_model
from mistral_nb.models.gguf_vocabulary import GgufVocabulary

__all__ = ["as_json", "tokenizer_files"]

_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A byte-level vocabulary names how text is cut before the merges. Known are those whose ids were compared with the
# original tokenizer's; another would give other token ids without any error.
_CUTS: dict[str, dict[str, Any]] = {
    "smollm": {"type": "Digits", "individual_digits": True},
    "tekken": {"type": "Split", "pattern": {"Regex": _TEKKEN}, "behavior": "Isolated", "invert": False},
}


def tokenizer_files(header: GgufHeader, vocabulary: GgufVocabulary) -> dict[str, bytes]:
    """The files by name. `ModelError` for a vocabulary that would give other ids than the original's."""
    if vocabulary.model == "llama":
        text, data = "tokenizer.model", tokenizer_model(header, vocabulary)
    else:
        text, data = "tokenizer.json", as_json(_byte_level(header, vocabulary))
    return {text: data, "tokenizer_config.json": as_json(_settings(header, vocabulary))}


def as_json(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


def _control_tokens(vocabulary: GgufVocabulary) -> dict[int, dict[str, Any]]:
    shape = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {token: {"content": text, **shape} for token, text in vocabulary.controls.items()}


def _byte_level(header: GgufHeader, vocabulary: GgufVocabulary) -> dict[str, Any]:
    pre = header.value("tokenizer.ggml.pre", str)
    if vocabulary.model != "gpt2" or pre not in _CUTS:
        raise ModelError(
            f"the tokenizer of {header.path.name} ({quoted(vocabulary.model)}, {quoted(pre)}) is not known here; known "
            f"are llama and, with gpt2, {' and '.join(_CUTS)}: choose another model, or its safetensors checkpoint"
        )
    pieces = {text: token for token, text in enumerate(vocabulary.tokens)}
    if len(pieces) != len(vocabulary.tokens):
        raise ModelError(f"the vocabulary of {header.path.name} has two tokens of one text; choose another file")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, **entry} for token, entry in _control_tokens(vocabulary).items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [_CUTS[pre], _bytes_step(add_prefix_space=False, use_regex=pre == "smollm")],
        },
        "post_processor": _begin(vocabulary) if vocabulary.add_bos else None,
        "decoder": _bytes_step(add_prefix_space=True, use_regex=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": pieces,
            "merges": _merges(header, pieces),
        },
    }


def _bytes_step(*, add_prefix_space: bool, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}


def _merges(header: GgufHeader, pieces: dict[str, int]) -> list[str]:
    merges = header.values("tokenizer.ggml.merges", str)
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= pieces.keys():
            raise ModelError(f"{header.path.name} has the merge {merge[:60]!r} of no tokens; fetch the file again")
    return merges


def _begin(vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Puts the first token before every text."""
    token, text = vocabulary.bos, vocabulary.tokens[vocabulary.bos]
    single = [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _settings(header: GgufHeader, vocabulary: GgufVocabulary) -> dict[str, Any]:
    special = {
        "bos_token": vocabulary.bos,
        "eos_token": vocabulary.eos,
        "pad_token": vocabulary.pad,
        "unk_token": vocabulary.unknown,
    }
    sentencepiece = vocabulary.model == "llama"
    prefix = {"add_bos_token": vocabulary.add_bos} if sentencepiece else {"add_prefix_space": False}
    return {
        "tokenizer_class": "LlamaTokenizer" if sentencepiece else "PreTrainedTokenizerFast",
        **prefix,
        "added_tokens_decoder": {str(token): entry for token, entry in _control_tokens(vocabulary).items()},
        **{name: vocabulary.tokens[token] for name, token in special.items() if token is not None},
        **({} if vocabulary.template is None else {"chat_template": vocabulary.template}),
        "clean_up_tokenization_spaces": False,
        "model_max_length": header.value("llama.context_length", int),
    }
