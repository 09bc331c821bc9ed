"""Mistral's fine-tunes: whose chat format and which tokenizer file they take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mistral_nb.engine.tokenizer import Tokenizer, load_tokenizer
from mistral_nb.types import Message
from tests.engine.mistral_checkpoints import DATA, checkpoint
from tests.engine.test_tokenizer import text_ids


def rendered(tokenizer: Tokenizer) -> str:
    return tokenizer.render_chat([Message("user", "Hi")])


@pytest.mark.parametrize("as_json", [False, True])
def test_a_mistral_fine_tune_keeps_its_own_template(tmp_path: Path, as_json: bool) -> None:
    folder = checkpoint(tmp_path / "tune", "v1", as_json=as_json)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "<s>{{ messages[0].content }}</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert rendered(tokenizer) == "<s>Hi</s>"
    assert tokenizer.encode_chat([Message("user", "a</s>b")]) == [1, *text_ids(tokenizer, "a</s>b"), 2]
    settings["chat_template"] = "[INST] {{ 'anything' }} [/INST]"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert rendered(load_tokenizer(folder)) == "<s>[INST] Hi [/INST]"
    settings["chat_template"] = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]<think>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert rendered(load_tokenizer(folder)) == "<s>[INST] Hi [/INST]<think>"


def test_a_mistral_fine_tune_with_tokens_more_than_the_original(tmp_path: Path) -> None:
    """The SentencePiece file that it was made from lies beside its tokenizer.json, and knows none of them."""
    folder = checkpoint(tmp_path / "tune", "v1", as_json=True)
    shutil.copy(DATA / "tokenizer.model.v1", folder / "tokenizer.model")
    data = json.loads((folder / "tokenizer.json").read_text())
    end = {**data["added_tokens"][0], "id": 32000, "content": "<|end|>"}
    data["added_tokens"].append(end)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|end|>", "added_tokens_decoder": {"32000": {"content": "<|end|>"}}}
    settings["chat_template"] = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]{{ eos_token }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert 32000 in tokenizer.eos_ids
    assert tokenizer.encode_chat([Message("user", "Hi <|end|>")]).count(32000) == 1
    settings |= {"eos_token": "</s>", "chat_template": "[INST]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(folder)
    assert rendered(tokenizer) == "<s>[INST] Hi [/INST]"
    assert tokenizer.encode_raw("a<|end|>")[-1] == 32000
