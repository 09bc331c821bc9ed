"""Thousands of damaged headers, indexes, configs and tokenizers: a `ModelError` or a description, at no cost."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mistral_nb.checkpoints import describe
from mistral_nb.checkpoints.tokenizer_files import speaks_mistral
from mistral_nb.errors import ModelError
from tests.checkpoints import tiny
from tests.checkpoints.broken import INDEX, SHARD, WEIGHTS

ROUNDS = 800
MEMORY = 2_000_000
SPECIAL = (b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"9", b"e", b"\\", b"\xf0\x9f\x98\x80")

WRONG: tuple[Any, ...] = (None, True, 5, float("inf"), "x", [], [[]], [{}], {}, {"a": []})


def damaged(content: bytes, dice: random.Random) -> bytes:
    """`content` with a few bytes flipped, replaced, removed, doubled, or its end cut off."""
    result = bytearray(content)
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        at = dice.randrange(max(1, len(result)))
        length = dice.choice((1, 1, 2, 8, 40))
        kind = dice.randrange(6)
        if kind == 0:
            result[at : at + 1] = bytes([dice.randrange(256)])
        elif kind == 1:
            result[at : at + 1] = dice.choice(SPECIAL)
        elif kind == 2:
            del result[at : at + length]
        elif kind == 3:
            result[at:at] = result[at : at + length]
        elif kind == 4:
            result[at:at] = str(dice.choice((0, -1, 2**31, 2**53, 2**63, 2**64, 10**30))).encode()
        else:
            del result[at:]
    return bytes(result)


def header_of(path: Path) -> slice:
    """Where the length and the header are in a safetensors file."""
    return slice(0, 8 + int.from_bytes(path.read_bytes()[:8], "little"))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tiny.hugging_face, WEIGHTS),
        (tiny.sharded, SHARD),
        (tiny.sharded, INDEX),
        (tiny.hugging_face, "config.json"),
        (tiny.mistral, "params.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_damage_is_a_model_error(make: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    """Only what damage leaves readable may pass, such as a flipped letter in a key that nobody reads."""
    folder = make(tmp_path / "checkpoint")
    path = folder / name
    content = path.read_bytes()
    part = header_of(path) if name.endswith(".safetensors") else slice(0, len(content))
    dice = random.Random(name)
    messages, most = [], 0
    tracemalloc.start()
    try:
        for _ in range(ROUNDS):
            path.write_bytes(damaged(content[part], dice) + content[part.stop :])
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            try:
                describe(folder)
            except ModelError as error:
                messages.append(str(error))
            most = max(most, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    print(f"{name}: {len(messages)} of {ROUNDS} refused, {most / 1e6:.1f} MB at most")
    assert len(messages) > ROUNDS * 0.6
    assert [message for message in messages if str(folder) not in message] == []
    assert most < MEMORY


@pytest.mark.parametrize(
    ("make", "name"), [(tiny.hugging_face, "tokenizer.json"), (tiny.mistral, "tokenizer.model.v3")]
)
def test_damaged_tokenizers(make: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    """Most damage to these is inside of texts, which is for the tokenizer's own library to find."""
    folder = make(tmp_path / "checkpoint")
    content = (folder / name).read_bytes()
    dice = random.Random(name)
    refused = 0
    for _ in range(300):
        (folder / name).write_bytes(damaged(content, dice))
        try:
            describe(folder)
        except ModelError:
            refused += 1
    assert refused > 60


def places(value: Any, *, inner: bool = False) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a JSON text, itself included; of a list or object inside of it through four entries."""
    yield ()
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    for key in [*keys[:3], *keys[3:][-1:]] if inner else keys:
        for way in places(value[key], inner=True):
            yield (key, *way)


def replaced(value: Any, way: tuple[Any, ...], by: Any) -> Any:
    if not way:
        return by
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[way[0]] = replaced(value[way[0]], way[1:], by)
    return copy


def settled(folder: Path) -> Path:
    """A checkpoint whose settings have what is looked at in them, and two tokenizers."""
    tiny.hugging_face(folder)
    settings = {
        "eos_token": {"content": "</s>"},
        "chat_template": [{"name": "default", "template": "[INST]"}],
        "added_tokens_decoder": {"1": {"content": "<s>"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": 1}))
    (folder / "tokenizer.model").write_bytes(tiny.sentencepiece_model())
    return folder


def byte_level(folder: Path) -> Path:
    tiny.hugging_face(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer = {
        "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteLevel"}]},
        "added_tokens": tokenizer["added_tokens"][:3],
        "model": {"type": "BPE", "vocab": {f"<{number}>": number for number in range(tiny.VOCABULARY)}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (settled, "config.json"),
        (settled, "tokenizer_config.json"),
        (settled, "added_tokens.json"),
        (byte_level, "tokenizer.json"),
        (tiny.sharded, INDEX),
        (tiny.mistral, "params.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_value_of_the_wrong_type_is_a_model_error(make: Callable[[Path], Path], name: str, tmp_path: Path) -> None:
    """Each in turn is replaced by one of each type. Only those that nobody reads may pass."""
    folder = make(tmp_path / "checkpoint")
    describe(folder)
    whole = json.loads((folder / name).read_text())
    for way in places(whole):
        for wrong in WRONG:
            (folder / name).write_text(json.dumps(replaced(whole, way, wrong)))
            for read in (describe, speaks_mistral):
                with suppress(ModelError):
                    read(folder)
