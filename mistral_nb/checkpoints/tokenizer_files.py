"""Which of a folder's tokenizer files and chat templates the engine takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mistral_nb.checkpoints.untrusted import AGAIN, TOKENIZER_LIMIT, read_bytes, read_object
from mistral_nb.checkpoints.vocabulary import read_tokenizer
from mistral_nb.errors import ModelError

__all__ = ["SENTENCEPIECE_FILES", "is_mistral_template", "speaks_mistral", "template_source", "tokenizer_file"]

SENTENCEPIECE_FILES = ("tokenizer.model.v3", "tokenizer.model.v1", "tokenizer.model")
"""Names of SentencePiece models, the first that is there is taken."""

_ID = re.compile(r"[0-9]{1,9}")
_LOWEST = 2
"""<unk>, <s> and </s> are in every SentencePiece file."""
_TEMPLATE_LIMIT = 1_000_000
_MARK = re.compile(r"<\|[^<>\s]*\|>|</?[A-Za-z][\w.:-]*>")
"""What a template marks turns or parts of an answer with, such as <|im_end|> or <think>."""


def tokenizer_file(folder: Path) -> Path:
    """SentencePiece is the original for Mistral, and tokenizer.json for others and where it has more tokens.

    `ModelError` where there is neither.
    """
    model = next((folder / name for name in SENTENCEPIECE_FILES if _there(folder / name)), None)
    file = folder / "tokenizer.json"
    if model and (not _there(file) or (speaks_mistral(folder) and not _has_more(folder, model))):
        return model
    if _there(file):
        return file
    if _there(folder / "tekken.json"):
        raise ModelError(
            f"{folder} has only a tekken tokenizer (tekken.json), which is not supported; "
            "put the model's tokenizer.json beside it"
        )
    raise ModelError(f"{folder} holds no tokenizer.json and no tokenizer.model; {AGAIN}")


def _has_more(folder: Path, model: Path) -> bool:
    """Whether tokens were added behind those of the SentencePiece file, as a fine-tune does.

    The settings tell; the tokenizer.json, which is large, is read only where there are none.
    """
    ids = list(_added_ids(folder)) or [read_tokenizer(folder / "tokenizer.json").size - 1]
    return max(ids) > _LOWEST and max(ids) >= read_tokenizer(model).size


def _added_ids(folder: Path) -> Iterator[int]:
    settings, added = folder / "tokenizer_config.json", folder / "added_tokens.json"
    if _there(settings):
        decoder = read_object(settings).get("added_tokens_decoder")
        yield from (int(token) for token in (decoder if isinstance(decoder, Mapping) else ()) if _ID.fullmatch(token))
    if _there(added):
        yield from (token for token in read_object(added).values() if type(token) is int)


def speaks_mistral(folder: Path) -> bool:
    """Whether a checkpoint has Mistral's own chat format: a fine-tune may have brought another, such as ChatML.

    It has not where the settings name another end of an answer than `</s>`.
    """
    config = folder / "config.json"
    if _there(config) and not _is_mistral(read_object(config)):
        return False
    source = template_source(folder)
    if source is not None and not is_mistral_template(source):
        return False
    settings = folder / "tokenizer_config.json"
    end = read_object(settings).get("eos_token") if _there(settings) else None
    if isinstance(end, Mapping):
        end = end.get("content")
    return end in (None, "</s>") and not _is_byte_level(folder)


def _is_mistral(config: Mapping[str, Any]) -> bool:
    kind = config.get("model_type")
    return kind == "mistral" or (kind is None and config.get("architectures") == ["MistralForCausalLM"])


def is_mistral_template(source: str) -> bool:
    """Whether a template writes Mistral's format: its marks, and none that another format has."""
    return "[INST]" in source and set(_MARK.findall(source)) <= {"<s>", "</s>"}


def _is_byte_level(folder: Path) -> bool:
    """Whether the vocabulary is one of bytes, such as tekken's, with which Mistral writes its format otherwise."""
    file = folder / "tokenizer.json"
    if not _there(file) or any(_there(folder / name) for name in SENTENCEPIECE_FILES):
        return False
    decoder = read_object(file, TOKENIZER_LIMIT).get("decoder")
    inner = decoder.get("decoders") if isinstance(decoder, Mapping) else None
    kinds = [decoder, *(inner if isinstance(inner, list) else ())]
    return any(isinstance(kind, Mapping) and kind.get("type") == "ByteLevel" for kind in kinds)


def template_source(folder: Path) -> str | None:
    """The text of the chat template, which is not rendered here; None where there is none."""
    file = folder / "chat_template.jinja"
    if _there(file):
        try:
            return read_bytes(file, _TEMPLATE_LIMIT).decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{file} is not UTF-8 text (byte {error.start}); {AGAIN}") from error
    settings = folder / "tokenizer_config.json"
    source: Any = read_object(settings).get("chat_template") if _there(settings) else None
    if isinstance(source, list):
        named = [
            entry.get("template") for entry in source if isinstance(entry, Mapping) and entry.get("name") == "default"
        ]
        source = named[-1] if named else None
    return source if isinstance(source, str) else None


def _there(path: Path) -> bool:
    """Also for what is no regular file: it is refused rather than passed over."""
    return path.exists() or path.is_symlink()
