"""Thousands of damaged headers, indexes, configs and tokenizers: a `ModelError` or a description, at no cost."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from mistral_nb.checkpoints import describe
from mistral_nb.errors import ModelError
from tests.checkpoints import tiny
from tests.checkpoints.broken import INDEX, SHARD, WEIGHTS

ROUNDS = 800
MEMORY = 2_000_000
SPECIAL = (b"\0", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"9", b"e", b"\\", b"\xf0\x9f\x98\x80")


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
