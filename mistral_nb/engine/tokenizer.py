"""Text to token ids and back, with the chat format of the checkpoint."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mistral_nb.checkpoints.tokenizer_files import speaks_mistral, template_source, tokenizer_file
from mistral_nb.engine.chat_template import JinjaTemplate, any_of, split_at
from mistral_nb.engine.detokenizer import Detokenizer
from mistral_nb.engine.functions import NOTHING, Offer
from mistral_nb.engine.grammar import Constraint, Grammars
from mistral_nb.engine.mistral_format import BEGIN_INST, BOS, EOS, Control, MistralFormat, Part
from mistral_nb.engine.vocabulary import JsonVocabulary, SentencePieceVocabulary, Vocabulary, read_json
from mistral_nb.errors import InvalidRequest, ModelError
from mistral_nb.types import Function, Message

__all__ = ["Tokenizer", "load_tokenizer"]

_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")
_UNKNOWN = "<unk>"
_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatFormat(Protocol):
    """How a conversation becomes the parts of a prompt. `call_token` is the one that stands before calls, if any."""

    @property
    def call_token(self) -> Control | None: ...

    def parts(self, messages: Sequence[Message], offer: Offer = NOTHING) -> list[Part]: ...

    def render(self, parts: Sequence[Part]) -> str: ...


class Tokenizer:
    """Encodes prompts and decodes answers for one checkpoint.

    `chat` is None for a checkpoint without a chat template. `bos_id` is put before raw prompts, None where the
    checkpoint has no such token; any of `eos_ids` ends an answer.
    """

    def __init__(
        self, vocabulary: Vocabulary, chat: ChatFormat | None, *, begins_with: str | None, eos_ids: frozenset[int]
    ) -> None:
        self._vocabulary = vocabulary
        self._chat = chat
        self._bos = begins_with
        self._raw_controls = set(vocabulary.controls) - {_UNKNOWN}
        self._raw_control = any_of(self._raw_controls)
        self.vocab_size = vocabulary.size
        self.bos_id = None if begins_with is None else vocabulary.controls[begins_with]
        self.eos_ids = eos_ids
        self._grammars: Grammars | None = None
        self._building = threading.Lock()

    def encode_raw(self, text: str) -> list[int]:
        """The ids of a raw prompt: a control token's text is that token, as in the chat template.

        BOS comes first where the checkpoint has one, whether the text begins with it or not. With SentencePiece, one
        space after a control token is the one that each part begins with: `[INST] Hi` and `[INST]Hi` are the same.
        """
        if self._bos is not None and text.lstrip().startswith(self._bos):
            text = text.lstrip()
        parts = split_at(self._raw_control, text, self._raw_controls)
        if self._vocabulary.per_part:
            parts[1:] = [part.removeprefix(" ") if isinstance(part, str) else part for part in parts[1:]]
        if self._bos is not None and parts[:1] != [Control(self._bos)]:
            parts.insert(0, Control(self._bos))
        return self._encode(parts)

    def encode_chat(
        self, messages: Sequence[Message], functions: Sequence[Function] | None = None, choice: str = "auto"
    ) -> list[int]:
        """The ids of a conversation up to where the answer begins. `InvalidRequest` names the turn that is wrong.

        `choice` says what the model is to do with the functions: `auto`, `none`, `required`, or call the one so named.
        """
        return self._encode(self._chat_format().parts(messages, Offer.of(functions, choice)))

    def render_chat(
        self, messages: Sequence[Message], functions: Sequence[Function] | None = None, choice: str = "auto"
    ) -> str:
        """The prompt of a conversation in readable form, its control tokens shown."""
        chat = self._chat_format()
        return chat.render(chat.parts(messages, Offer.of(functions, choice)))

    def constraint(
        self, functions: Sequence[Function] | None, choice: str, vocab_size: int, *, single: bool = False
    ) -> Constraint | None:
        """What holds an answer to whole calls of `functions`, or to a `single` one; None where it cannot hold a call.

        `vocab_size` is the model's, which may be larger than the tokenizer's. Raises `InvalidRequest` for a function
        whose schema no grammar can be made of, and `MissingDependency` without llguidance.
        """
        offer = Offer.of(functions, choice, single=single)
        if not offer.tools:
            return None
        with self._building:
            if self._grammars is None or self._grammars.vocab_size != vocab_size:
                token = self._chat_format().call_token
                call_id = None if token is None else self._vocabulary.controls[token.token]
                self._grammars = Grammars(self._vocabulary, self.eos_ids, vocab_size, call_id)
        return self._grammars.constraint(offer)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer; special tokens have none."""
        stream = self.stream()
        return "".join([*(stream.push(token) for token in ids), stream.flush()])

    def stream(self) -> Detokenizer:
        """A detokenizer for one answer."""
        vocabulary = self._vocabulary
        return Detokenizer(vocabulary.piece, errors=vocabulary.errors, drop_space=vocabulary.drop_space)

    def _chat_format(self) -> ChatFormat:
        if self._chat is None:
            raise InvalidRequest("messages", "a chat", "this checkpoint has no chat template; send a raw prompt")
        return self._chat

    def _encode(self, parts: Sequence[Part]) -> list[int]:
        for part in parts:
            half = None if isinstance(part, Control) else _SURROGATE.search(part)
            if half:
                raise InvalidRequest("prompt", half[0], "is half of a character (a lone surrogate); remove it")
        return self._vocabulary.encode(parts)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder; `ModelError` when it has none or one that is not supported.

    A Mistral checkpoint takes v3 where its vocabulary has `[INST]` as a control token and v1 where it has not, from
    whichever tokenizer file is there; one with a chat template of another kind takes that, and so does one with a
    byte-level vocabulary, with which Mistral writes its format otherwise. Other checkpoints take their
    `tokenizer.json` and chat template.
    """
    settings = read_json(folder / "tokenizer_config.json")
    source = template_source(folder)
    mistral = speaks_mistral(folder)
    vocabulary = _vocabulary(folder, mistral=mistral)
    specials = {name: text for name in _SPECIALS if (text := _text_of(settings.get(name))) is not None}
    begins_with = vocabulary.begins_with if settings.get("add_bos_token") is not False else None
    chat: ChatFormat | None = None
    if mistral:
        chat, begins_with = _mistral_format(folder, vocabulary), BOS.token
    elif source is not None:
        chat = JinjaTemplate(source, controls=vocabulary.controls, specials=specials)
    return Tokenizer(vocabulary, chat, begins_with=begins_with, eos_ids=_eos_ids(folder, vocabulary, specials))


def _mistral_format(folder: Path, vocabulary: Vocabulary) -> MistralFormat:
    if "[SYSTEM_PROMPT]" in vocabulary.controls or not {BOS.token, EOS.token} <= set(vocabulary.controls):
        raise ModelError(f"{folder} has a Mistral tokenizer that is none of v1 to v3, which are what is supported")
    return MistralFormat("v3" if BEGIN_INST.token in vocabulary.controls else "v1")


def _vocabulary(folder: Path, *, mistral: bool) -> Vocabulary:
    file = tokenizer_file(folder)
    if file.suffix != ".json":
        return SentencePieceVocabulary(file)
    return JsonVocabulary(file, per_part=mistral, limit=_embeddings(folder))


def _embeddings(folder: Path) -> int | None:
    """How many token ids the model has embeddings for; None where the folder does not say."""
    for name in ("config.json", "params.json"):
        size = read_json(folder / name).get("vocab_size")
        if isinstance(size, int):
            return size
    return None


def _text_of(token: Any) -> str | None:
    """A special token in tokenizer_config.json: its text, or an object that holds it."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _eos_ids(folder: Path, vocabulary: Vocabulary, specials: Mapping[str, str]) -> frozenset[int]:
    ids = {vocabulary.controls.get(specials.get("eos_token", EOS.token))}
    for name in ("config.json", "generation_config.json"):
        value = read_json(folder / name).get("eos_token_id")
        ids.update(value if isinstance(value, list) else [value])
    return frozenset(token for token in ids if isinstance(token, int))
