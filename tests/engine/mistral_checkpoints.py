"""Mistral checkpoint folders, without weights, from the tokenizers that mistral-common ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mistral_common
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import generate_merges

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
KEPT_AS = {"v1": "tokenizer.model", "v3": "tokenizer.model.v3"}
SPACE = "\u2581"


def processor(version: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(DATA / FILES[version]))


def checkpoint(folder: Path, version: str, *, as_json: bool) -> Path:
    """A Hugging Face folder of v0.2 (v1) or v0.3 (v3), with the SentencePiece file or only with tokenizer.json."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}))
    if not as_json:
        shutil.copy(DATA / FILES[version], folder / KEPT_AS[version])
        return folder
    converted(processor(version), legacy=version == "v1").save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ bos_token }}[INST] {{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def converted(model: SentencePieceProcessor, *, legacy: bool) -> Tokenizer:
    """As transformers converts a SentencePiece BPE model; `legacy` as v0.1 and v0.2 lie on the hub, else as v0.3."""
    pieces = [model.id_to_piece(token) for token in range(model.vocab_size())]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    merges = generate_merges(vocab, [(piece, model.get_score(token)) for token, piece in enumerate(pieces)])
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [token for token in range(len(pieces)) if model.is_control(token) or model.is_unknown(token)]
    tokenizer.add_special_tokens([AddedToken(pieces[token], special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
