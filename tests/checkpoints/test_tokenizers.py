"""Tokenizers and chat templates of a checkpoint: which are taken, and whether they belong to the weights."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import pytest
import sentencepiece

from mistral_nb.checkpoints import describe, find_files
from mistral_nb.checkpoints.vocabulary import TokenizerFacts, check_vocabulary, read_tokenizer
from mistral_nb.errors import ModelError
from tests.checkpoints import tiny

MISTRAL_DATA = Path(mistral_common.__file__).parent / "data"


def both_tokenizers(folder: Path, size: int) -> Path:
    """A Mistral checkpoint with a SentencePiece file of under 384 tokens and a tokenizer.json of `size`."""
    tiny.hugging_face(folder)
    (folder / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    (folder / "tokenizer.json").write_text(tiny.json_tokenizer(size))
    return folder


@pytest.mark.parametrize("told", ["tokenizer_config.json", "added_tokens.json", "nothing"])
@pytest.mark.parametrize("more", [False, True])
def test_tokens_that_were_added_to_mistrals(told: str, more: bool, tmp_path: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece_model()).vocab_size()
    folder = both_tokenizers(tmp_path / "checkpoint", pieces + more)
    last = pieces - 1 + more
    contents = {
        "tokenizer_config.json": {"added_tokens_decoder": {"0": {"content": "<unk>"}, str(last): {"content": "[PAD]"}}},
        "added_tokens.json": {"[PAD]": last},
    }
    if told in contents:
        (folder / told).write_text(json.dumps(contents[told]))
    assert find_files(folder).tokenizer.name == ("tokenizer.json" if more else "tokenizer.model")


def test_finding_the_files_does_not_read_a_large_tokenizer(tmp_path: Path) -> None:
    folder = both_tokenizers(tmp_path / "checkpoint", 384)
    (folder / "tokenizer.json").write_text("damaged")
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"2": {"content": "</s>"}}}')
    assert find_files(folder).tokenizer.name == "tokenizer.model"


def test_templates(tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "<|im_start|>{{ messages }}"}))
    assert describe(folder).template == "chat template (Jinja), 26 characters"
    settings.write_text(json.dumps({"chat_template": [{"name": "default", "template": "[INST] x [/INST]"}]}))
    assert describe(folder).template == "Mistral v1"
    for source in ("[INST] x [/INST]<think>", "[INST] x [/INST]<|im_end|>", "[INST] <<SYS>> x [/INST]"):
        settings.write_text(json.dumps({"chat_template": source}))
        assert describe(folder).template == f"chat template (Jinja), {len(source)} characters"
    settings.write_text(json.dumps({"chat_template": "[INST] x [/INST]", "eos_token": {"content": "<|im_end|>"}}))
    assert describe(folder).template.startswith("chat template")
    settings.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    assert describe(folder).template == "none: raw prompts only"
    settings.write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert describe(folder).template == "Mistral v1"
    (folder / "chat_template.jinja").write_text("{{ 1 }}")
    assert describe(folder).template == "chat template (Jinja), 7 characters"
    tiny.change_json(folder / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    (folder / "chat_template.jinja").unlink()
    settings.unlink()
    assert describe(folder).template == "none: raw prompts only"
    assert describe(folder).architecture == "Llama"


@pytest.mark.parametrize(
    ("file", "size", "inst"),
    [("tokenizer.model.v1", 32000, False), ("mistral_instruct_tokenizer_240323.model.v3", 32768, True)],
)
def test_mistrals_own_tokenizers(file: str, size: int, inst: bool) -> None:
    path = MISTRAL_DATA / file
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    facts = read_tokenizer(path)
    assert facts.size == model.vocab_size() == size
    controls = {model.id_to_piece(token) for token in range(size) if model.is_control(token)}
    assert facts.controls == controls
    assert ("[INST]" in facts.controls) == inst


@pytest.mark.parametrize(
    ("size", "vocab_size", "mistral", "fits"),
    [
        (32000, 32000, True, True),
        (32768, 33000, True, True),
        (32000, 32768, True, False),
        (32768, 32000, True, False),
        (32000, 32256, False, True),
        (32001, 33000, False, True),
        (30000, 32000, False, False),
        (32001, 32000, False, False),
    ],
)
def test_vocabularies_that_fit(size: int, vocab_size: int, mistral: bool, fits: bool) -> None:
    facts = TokenizerFacts("BPE", size, frozenset(), size)
    if fits:
        check_vocabulary(Path("tokenizer.json"), facts, vocab_size, mistral=mistral)
    else:
        with pytest.raises(ModelError, match="the tokenizer of another"):
            check_vocabulary(Path("tokenizer.json"), facts, vocab_size, mistral=mistral)


@pytest.mark.parametrize(("count", "fits"), [(1, True), (16, True), (17, False)])
def test_added_tokens_without_embeddings(count: int, fits: bool, tmp_path: Path) -> None:
    folder = tiny.hugging_face(tmp_path / "checkpoint")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"] += [
        {**data["added_tokens"][0], "id": tiny.VOCABULARY + number, "content": f"[PAD{number}]"}
        for number in range(count)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    if fits:
        assert describe(folder)
        return
    with pytest.raises(ModelError, match=r"adds 17 tokens .* such as \[PAD0\] with the id 384 of 384.*; fetch the tok"):
        describe(folder)


def test_which_tokens_are_controls(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    added = [("<s>", 0, True), ("<think>", 1, False), ("word", 2, False), ("pad", 3, True)]
    tokens = [{"content": text, "id": token, "special": special} for text, token, special in added]
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 4}}, "added_tokens": tokens}))
    facts = read_tokenizer(path)
    assert facts.controls == {"<s>", "<think>", "pad"}
    assert (facts.size, facts.learnt, facts.added[3]) == (5, 5, "pad")
